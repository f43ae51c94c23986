"""Owns ONNX Runtime sessions: on the provider that was named, or not at all.

Input: an ONNX file. A session that fell back to another provider would be measured, verified and
shipped for something it is not, so a fallback is an error here.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensemblekit.errors import InputError, MachineError, one_of

PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_SILENT = 4  # ONNX Runtime's severity: fatal errors only


class SessionError(InputError):
    """ONNX Runtime refuses the file, or fails while it runs it."""

    kind = "session"


@dataclass(frozen=True)
class Slot:
    """An input or output of a session, as the file says.

    Attributes:
        name: In the graph.
        dtype: As ONNX Runtime names it, such as `tensor(float)`.
        dims: Sizes; a string or None where they are open.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]


def check_provider(provider: str) -> None:
    """Refuse a provider that this machine cannot have.

    Raises:
        UsageError: No such provider.
        MachineError: This ONNX Runtime was built without it.
    """
    import onnxruntime

    one_of(provider, PROVIDERS, what="provider")
    onnxruntime.set_default_logger_severity(_SILENT)  # what fails is told once, by us
    present = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in present:
        raise MachineError(
            f"this ONNX Runtime has no provider '{provider}'; it has "
            f"{', '.join(name for name, full in PROVIDERS.items() if full in present)}",
            hint="pip uninstall onnxruntime && pip install onnxruntime-gpu"
            if provider != "cpu"
            else None,
        )
    if provider != "cpu":
        _try(provider)


def _try(provider: str) -> None:
    """Open the smallest graph there is: a provider may be built in, and its libraries missing."""
    import onnxruntime
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "smallest", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # noqa: PTH123  # they print
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[PROVIDERS[provider]]
        )
    got = session.get_providers()[0]
    if got != PROVIDERS[provider]:
        raise MachineError(
            f"provider '{provider}' was asked for, and ONNX Runtime fell back to {got}",
            hint="its libraries (CUDA, cuDNN, TensorRT) or the GPU are missing; see "
            "https://onnxruntime.ai/docs/execution-providers",
        )


class Session:
    """An ONNX file, ready to run.

    Args:
        path: The file; external data stand beside it.
        provider: One of `PROVIDERS`.
        threads: Of one operator; all cores when None.
        spinning: Whether idle threads wait actively: faster for one service, slower for whatever
            else runs on the machine.
        tf32: Whether a GPU may use it.

    Raises:
        MachineError: The provider is missing, or ONNX Runtime fell back to another one.
        SessionError: ONNX Runtime refuses the file.
    """

    def __init__(
        self,
        path: Path,
        provider: str = "cpu",
        *,
        threads: int | None = None,
        spinning: bool = False,
        tf32: bool = False,
    ) -> None:
        import onnxruntime

        check_provider(provider)
        self.path = path
        self.provider = provider
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.intra_op_num_threads = threads or _cores()
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        wanted = PROVIDERS[provider]
        settings: dict[str, Any] = {"use_tf32": int(tf32)} if provider == "cuda" else {}
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[(wanted, settings)]
            )
        except Exception as error:  # their exceptions have no common base
            if provider != "cpu" and "fallback" in str(error):
                raise MachineError(
                    f"provider '{provider}' cannot run all of {path.name}, and falling back to the "
                    f"CPU is not allowed: {_words(error)}"
                ) from error
            raise SessionError(f"ONNX Runtime refuses {path.name}: {_words(error)}") from error
        got = self._session.get_providers()
        if got[0] != wanted:
            raise MachineError(
                f"provider '{provider}' was asked for, and ONNX Runtime fell back to {got[0]}",
                hint="not all of the graph can run there",
            )

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """What goes in."""
        return tuple(_slot(value) for value in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """What comes out."""
        return tuple(_slot(value) for value in self._session.get_outputs())

    @property
    def metadata(self) -> Mapping[str, str]:
        """Facts in the file."""
        found: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def bound(self, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        """A function that runs with inputs in place; it returns the binding that holds the outputs."""
        import onnxruntime

        binding = self._session.io_binding()
        device = "cpu" if self.provider == "cpu" else "cuda"
        kept = []  # a value borrows the array's memory
        for name, value in inputs.items():
            array = value.detach().cpu().contiguous().numpy()
            placed = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
            binding.bind_ortvalue_input(name, placed)
            kept.append((array, placed))
        for slot in self.outputs:
            binding.bind_output(slot.name, device)

        def run() -> Any:
            assert kept is not None
            self._session.run_with_iobinding(binding)
            if device != "cpu":
                binding.synchronize_outputs()
            return binding

        return run

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[npt.NDArray[Any]]:
        """All outputs for inputs by name.

        Raises:
            SessionError: ONNX Runtime fails.
        """
        feed = {name: value.detach().cpu().numpy() for name, value in inputs.items()}
        try:
            return [np.asarray(value) for value in self._session.run(None, feed)]
        except Exception as error:
            raise SessionError(
                f"ONNX Runtime fails on {self.path.name} with inputs of shapes "
                f"{', '.join(str(list(v.shape)) for v in feed.values())}: {_words(error)}"
            ) from error


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _slot(value: Any) -> Slot:
    return Slot(value.name, value.type, tuple(value.shape))


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
