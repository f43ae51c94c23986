"""Owns asking libraries in another process, where one that crashes or hangs harms nobody.

Input: names of modules. This file is also the program of that process, so it imports the standard
library alone.
"""

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LONGEST = 300


@dataclass(frozen=True)
class Answer:
    """What a library said.

    Attributes:
        error: Why it cannot be used, None if it can.
        facts: What it knows of itself.
    """

    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def ask(
    modules: Sequence[str],
    *,
    timeout_s: float = 120.0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> dict[str, Answer]:
    """Import modules one after the other, in one process as long as that lives.

    Args:
        modules: What to import, in this order.
        timeout_s: For each of them. One that takes longer is given up.
        progress: Called before each one.

    Returns:
        An answer for every module.
    """
    answers: dict[str, Answer] = {}
    while left := [name for name in modules if name not in answers]:
        with _process(left) as process:
            for name in left:
                if progress is not None:
                    progress(f"importing {name}", 0, None)
                answer = _answer(process, timeout_s)
                answers[name] = answer or Answer(_end(process, timeout_s))
                if answer is None:
                    break  # the others get a process of their own
    return answers


@contextlib.contextmanager
def _process(modules: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
    """The other process; it and whatever it started are gone afterwards."""
    root = str(Path(__file__).resolve().parents[2])
    # -P: a file of the working directory named as a library is not that library.
    line = [sys.executable, "-P", __file__, root, *modules]
    with subprocess.Popen(  # noqa: S603  # ourselves
        line,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _answer(process: "subprocess.Popen[bytes]", timeout_s: float) -> Answer | None:
    """The next line that the process writes; None when it ends first, or takes too long."""
    assert process.stdout is not None
    source, line, until = process.stdout.fileno(), b"", time.monotonic() + timeout_s
    with selectors.DefaultSelector() as waiting:
        waiting.register(source, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            left_s = until - time.monotonic()
            if left_s <= 0 or not waiting.select(left_s):
                return None
            part = os.read(source, 1)  # the next answer may be there already
            if not part:
                return None
            line += part
    return Answer(**json.loads(line))


def _end(process: "subprocess.Popen[bytes]", timeout_s: float) -> str:
    """Why there was no answer."""
    try:
        code = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return f"its import did not end within {timeout_s:g} s"
    if code < 0:
        return f"its import ends the process ({signal.strsignal(-code)})"
    return f"its import ends the process (exit {code})"


def main(argv: Sequence[str]) -> None:
    """What the other process does: one line of JSON for each module."""
    root, *modules = argv
    sys.path.append(root)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in modules:
        error, facts = None, {}
        try:
            module = importlib.import_module(name)
            facts = {"version": str(getattr(module, "__version__", "")) or None}
            facts |= _FACTS[name](module) if name in _FACTS else {}
        except BaseException as raised:  # noqa: BLE001  # a broken library may raise anything
            error = _first_line(raised)
        out.write(json.dumps({"error": error, "facts": facts}) + "\n")
        out.flush()
    os._exit(0)  # some libraries hang on their way out


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _torch(torch: Any) -> dict[str, Any]:
    """Its build, its threads, and the accelerators that it sees."""
    devices, error = [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            available = torch.cuda.is_available()  # it warns where the driver is too old
            for index in range(torch.cuda.device_count() if available else 0):
                found = torch.cuda.get_device_properties(index)
                devices.append(
                    {
                        "name": found.name,
                        "compute_capability": f"{found.major}.{found.minor}",
                        "memory_bytes": found.total_memory,
                    }
                )
        except Exception as raised:  # noqa: BLE001  # a broken driver may raise anything
            error = _first_line(raised)
    if not devices and error is None and caught and isinstance(caught[0].message, Warning):
        error = _first_line(caught[0].message)
    return {
        "cuda_build": torch.version.cuda,
        "rocm_build": getattr(torch.version, "hip", None),
        "threads": torch.get_num_threads(),
        "cuda_devices": devices,
        "cuda_error": error,
        "mps": torch.backends.mps.is_available(),
    }


def _onnxruntime(onnxruntime: Any) -> dict[str, Any]:
    """Its providers, and whether the one for NVIDIA GPUs runs where torch sees such a GPU."""
    providers = onnxruntime.get_available_providers()
    torch, error = sys.modules.get("torch"), None
    try:
        if "CUDAExecutionProvider" in providers and torch is not None and torch.cuda.is_available():
            from ensemblekit.runtimes.onnx_runtime import check_provider

            check_provider("cuda")
    except Exception as raised:  # noqa: BLE001  # whatever it is, it is what the user has to see
        error = _first_line(raised)
    return {"providers": providers, "cuda_error": error}


_FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {"torch": _torch, "onnxruntime": _onnxruntime}

if __name__ == "__main__":
    main(sys.argv[1:])
