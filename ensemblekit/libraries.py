"""Owns which libraries belong here, which versions of them are installed, and which are needed.

Input: the metadata that pip leaves behind. Nothing is imported.
"""

import re
import sys
from collections.abc import Iterable
from typing import NamedTuple


class Library(NamedTuple):
    """A package that ensemblekit uses, or that its users' checkpoints come from.

    Attributes:
        name: As pip knows it.
        module: As it is imported; None when a version is all that one wants to know of it.
        required: Whether ensemblekit depends on it.
        without: What there is not where it is not installed.
    """

    name: str
    module: str | None
    required: bool = False
    without: str | None = None


# What others import comes before them, so that it is named when it is broken.
LIBRARIES: tuple[Library, ...] = (
    Library("torch", "torch", required=True),
    Library("numpy", "numpy", required=True),
    Library("ml_dtypes", "ml_dtypes", required=True),
    Library("onnx", "onnx", required=True),
    Library("onnx-ir", "onnx_ir", required=True),
    Library("onnxscript", "onnxscript", required=True),
    Library("onnxruntime-gpu", "onnxruntime"),
    Library("onnxruntime", "onnxruntime"),
    Library("scipy", "scipy", required=True),
    Library("scikit-learn", "sklearn", required=True),
    Library("click", "click", required=True),
    Library("rich", "rich", required=True),
    Library("isal", "isal.isal_zlib", without="checksums take ten times as long"),
    Library("safetensors", None),
    Library("timm", "timm"),
    Library("torchvision", "torchvision"),
    Library("transformers", "transformers"),
    Library("lightning", None),
    Library("pytorch-lightning", None),
    Library("accelerate", None),
    Library("peft", None),
    Library("nvidia-ml-py", "pynvml"),
)
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
_VERSION = re.compile(r"^Version: *(\S+)", re.MULTILINE)
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*])?\s*>=\s*([\w.]+)")


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of `names` that are installed.

    Only the head of the metadata is looked at: `--version` is quick.
    """
    from importlib.metadata import distributions

    found = {}
    for name in names:
        for one in distributions(name=name):
            head = one.read_text("METADATA") or one.read_text("PKG-INFO") or ""
            stated = _VERSION.search(head.partition("\n\n")[0])
            if stated:
                found[name] = stated[1]
                break  # the first on the path is what is imported
    return found


def minimums() -> dict[str, str]:
    """The lowest versions that ensemblekit works with, extras included; what pip was told.

    Empty where ensemblekit itself is not installed, but run from its source.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("ensemblekit") or []
    except PackageNotFoundError:
        return {}
    found = [match for line in lines if (match := _REQUIREMENT.match(line))]
    lowest = {normal(match[1]): match[2] for match in found}
    return {one.name: lowest[key] for one in LIBRARIES if (key := normal(one.name)) in lowest}


def normal(name: str) -> str:
    """Packages of the same name are spelt in several ways.

    >>> normal("ML_dtypes")
    'ml-dtypes'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def older(version: str, than: str) -> bool:
    """Whether a version comes before another one; only their numbers count.

    >>> older("2.9.1+cu128", "2.10"), older("2.10.0", "2.10"), older("3.0rc1", "3.0")
    (True, False, False)
    """
    return _numbers(version) < _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def runtime_package() -> str:
    """The package of ONNX Runtime that pip chooses here: the same markers as in pyproject.toml."""
    from platform import machine

    gpu = {("linux", "x86_64"), ("win32", "AMD64")}
    return "onnxruntime-gpu" if (sys.platform, machine()) in gpu else "onnxruntime"
