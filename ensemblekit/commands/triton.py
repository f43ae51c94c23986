"""Owns a model repository for Triton Inference Server: its folders and config.pbtxt.

Input: a finished ONNX file. The form follows Triton's documentation (model configuration, ONNX
Runtime backend); no server takes part here.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
CONFIG = "config.pbtxt"


def check_free(folder: Path, name: str, *, force: bool) -> None:
    """Refuse a repository that cannot take the model.

    Raises:
        UsageError: The folder is a file, or the model is there already.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--triton {folder}: it is a file", hint="name a folder")
    if (folder / name).exists() and not force:
        raise UsageError(
            f"--triton: {folder / name} exists already", hint="another name with -o, or --force"
        )


@contextmanager
def made(folder: Path, name: str, file: Path, provider: str) -> Iterator[Callable[[], None]]:
    """A model that is ready to be put into a repository: `FOLDER/NAME/1/model.onnx` and its config.

    Args:
        folder: The repository.
        name: Of the model.
        file: The ONNX file.
        provider: That it will be served on.

    Returns:
        A function that puts it in its place; without that nothing is left.

    Raises:
        MachineError: The machine said no.
    """
    place = folder / name
    session = Session(file, provider)
    text = config(name, session.inputs, session.outputs, gpu=provider != "cpu")
    near = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    temporary = near / f".{name}.{secrets.token_hex(6)}.tmp"

    def put() -> None:
        try:
            place.mkdir(parents=True, exist_ok=True)
            for part in ("1", CONFIG):  # other versions and files are the user's
                if (place / part).exists():
                    (place / part).rename(temporary / f"old.{part}")
                (temporary / part).rename(place / part)
        except OSError as error:
            raise from_os_error(error, place, doing="write") from error

    try:
        try:
            version = temporary / "1"
            version.mkdir(parents=True)
            shutil.copyfile(file, version / "model.onnx")
            data = file.with_name(data_name(file.name))
            if data.exists():
                shutil.copyfile(data, version / data.name)
            (temporary / CONFIG).write_text(text, encoding="utf-8")
        except OSError as error:
            raise from_os_error(error, place, doing="write") from error
        yield put
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
