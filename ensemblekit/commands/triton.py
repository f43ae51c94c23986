"""Owns a model repository for Triton Inference Server: its folders and config.pbtxt.

Input: a finished ONNX file. The form follows Triton's documentation (model configuration, ONNX
Runtime backend); no server takes part here.
"""

import shutil
from pathlib import Path

from ensemblekit.errors import UsageError
from ensemblekit.files import from_os_error
from ensemblekit.graphs.saving import data_name
from ensemblekit.runtimes.onnx_runtime import Session, Slot

_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(double)": "TYPE_FP64",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int16)": "TYPE_INT16",
    "tensor(int8)": "TYPE_INT8",
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(bool)": "TYPE_BOOL",
}
_MAX_BATCH = 64


def write_repository(folder: Path, name: str, file: Path, provider: str, *, force: bool) -> Path:
    """`FOLDER/NAME/config.pbtxt` and `FOLDER/NAME/1/model.onnx`.

    Raises:
        UsageError: The model is there already.
        MachineError: The machine said no.
    """
    place = folder / name
    if place.exists() and not force:
        raise UsageError(
            f"--triton: {place} exists already", hint="another name with -o, or --force"
        )
    session = Session(file, "cpu" if provider == "cpu" else provider)
    text = config(name, session.inputs, session.outputs, gpu=provider != "cpu")
    try:
        version = place / "1"
        version.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, version / "model.onnx")
        data = file.with_name(data_name(file.name))
        if data.exists():
            shutil.copyfile(data, version / data.name)
        (place / "config.pbtxt").write_text(text, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, place, doing="write") from error
    return place


def config(name: str, inputs: tuple[Slot, ...], outputs: tuple[Slot, ...], *, gpu: bool) -> str:
    """The text of config.pbtxt.

    Where all first sizes are open, Triton batches requests, and the sizes leave the batch out.
    """
    slots = (*inputs, *outputs)
    batched = all(slot.dims and not isinstance(slot.dims[0], int) for slot in slots)
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {_MAX_BATCH if batched else 0}",
    ]
    for what, group in (("input", inputs), ("output", outputs)):
        entries = []
        for slot in group:
            dims = slot.dims[1:] if batched else slot.dims
            sizes = ", ".join(str(d) if isinstance(d, int) else "-1" for d in dims)
            entries.append(
                f'  {{\n    name: "{slot.name}"\n    data_type: {_TYPES[slot.dtype]}\n'
                f"    dims: [ {sizes} ]\n  }}"
            )
        lines.append(f"{what} [\n" + ",\n".join(entries) + "\n]")
    if batched:
        lines.append("dynamic_batching { }")
    lines.append(f"instance_group [\n  {{\n    kind: {'KIND_GPU' if gpu else 'KIND_CPU'}\n  }}\n]")
    return "\n".join(lines) + "\n"
