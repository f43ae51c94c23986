"""Owns the report on an environment: what is here, what is wrong with it, what to type.

Input: this machine and this Python. Libraries are asked in another process, so a broken one is a
line of the report.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ensemblekit import __version__, libraries, machine
from ensemblekit.commands.probing import Answer, ask
from ensemblekit.libraries import LIBRARIES, RUNTIMES, Library

FEW_FILES, WANTED_FILES = 256, 4096
LITTLE_DISK_BYTES = 1_000_000_000
_TOLD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
_INSTALL_TORCH = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Problem:
    """What is wrong, and what to type or do."""

    what: str
    fix: str


@dataclass(frozen=True)
class Installed:
    """One library.

    Attributes:
        name: Of the package.
        version: None where it is not installed.
        required: Whether ensemblekit needs it.
        minimum: The lowest version that will do; None where any does.
        error: Why it cannot be imported; None where it can, or nobody tried.
    """

    name: str
    version: str | None
    required: bool
    minimum: str | None
    error: str | None


@dataclass(frozen=True)
class Report:
    """An environment.

    Attributes:
        ensemblekit: Its version.
        python: Version and implementation.
        platform: System, kernel and C library.
        processor: Model of the CPU.
        cores: Of the machine.
        usable_cores: Of this process.
        memory_bytes: What this process may use at most.
        free_disk_bytes: In the working directory.
        open_files: How many a process may have: now, and at most (-1: any number).
        compiler: The C++ compiler.
        gpus: NVIDIA GPUs that the driver knows.
        variables: Settings out of the environment; of our own ones only the names.
        libraries: What is installed.
        torch: What torch says of itself; empty where it does not import.
        onnxruntime: The same of ONNX Runtime.
        problems: What is wrong.
    """

    ensemblekit: str
    python: str
    platform: str
    processor: str
    cores: int | None
    usable_cores: int
    memory_bytes: int | None
    free_disk_bytes: int | None
    open_files: tuple[int, int] | None
    compiler: str | None
    gpus: list[str]
    variables: dict[str, str]
    libraries: list[Installed]
    torch: dict[str, Any]
    onnxruntime: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return {"schema_version": 1, **asdict(self)}


def examine(
    *,
    timeout_s: float = 120.0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Report:
    """Look at this machine and at the libraries of this Python.

    Args:
        timeout_s: For the import of one library; one that takes longer is reported as broken.
        progress: Called before each import.
    """
    versions = libraries.versions(one.name for one in LIBRARIES)
    wanted = [one for one in LIBRARIES if one.module and (one.required or one.name in versions)]
    modules = list(dict.fromkeys(one.module for one in wanted if one.module))
    answers = ask(modules, timeout_s=timeout_s, progress=progress)
    lowest = libraries.minimums()
    compiler = machine.compiler()
    report = Report(
        ensemblekit=__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        platform=platform.platform(),
        processor=machine.processor(),
        cores=os.cpu_count(),
        usable_cores=machine.usable_cores(),
        memory_bytes=machine.memory_bytes(),
        free_disk_bytes=_free_disk(),
        open_files=machine.open_files(),
        compiler=None if compiler is None else machine.compiler_version(compiler),
        gpus=machine.nvidia_gpus(),
        variables=_variables(os.environ),
        libraries=[_installed(one, versions, lowest, answers) for one in LIBRARIES],
        torch=_facts(answers, "torch"),
        onnxruntime=_facts(answers, "onnxruntime"),
    )
    report.problems.extend(problems(report))
    return report


def problems(report: Report) -> Iterator[Problem]:
    """What is wrong with an environment, and how to mend it."""
    yield from _library_problems(report)
    yield from _torch_problems(report)
    yield from _runtime_problems(report)
    yield from _machine_problems(report)


def without_places(text: str) -> str:
    """A message of a library without where the user's files and this Python are."""
    places = {sys.prefix: "<environment>", sys.base_prefix: "<python>"}
    homes = {str(Path.home()), os.path.realpath(Path.home())} - {"/"}
    places |= dict.fromkeys(homes, "~")
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(f"{place}/", f"{places[place]}/")
    return text


def _installed(
    library: Library,
    versions: Mapping[str, str],
    lowest: Mapping[str, str],
    answers: Mapping[str, Answer],
) -> Installed:
    version = versions.get(library.name)
    answer = answers.get(library.module or "")
    if version is None and library.required and answer is not None and answer.error is None:
        version = answer.facts.get("version") or "unknown"  # installed by something that is not pip
    error = None if answer is None or version is None else answer.error
    return Installed(
        library.name,
        version,
        library.required,
        lowest.get(library.name),
        None if error is None else without_places(error),
    )


def _facts(answers: Mapping[str, Answer], module: str) -> dict[str, Any]:
    found = answers.get(module, Answer()).facts
    return {k: without_places(v) if isinstance(v, str) else v for k, v in found.items()}


def _library_problems(report: Report) -> Iterator[Problem]:
    absences = {one.name: one.without for one in LIBRARIES}
    broken: set[str] = set()
    for one in report.libraries:
        name = one.name
        wanted = f'pip install "{name}>={one.minimum}"' if one.minimum else f"pip install {name}"
        if one.version is None:
            if one.required:
                yield Problem(f"{name} is not installed, and ensemblekit needs it", wanted)
            elif absences[name] is not None:
                yield Problem(f"{name} is not installed: {absences[name]}", wanted)
        elif one.minimum and libraries.older(one.version, one.minimum):
            yield Problem(f"{name} {one.version} is older than {one.minimum}", wanted)
        elif one.error is not None and one.error not in broken:
            broken.add(one.error)  # what one breaks fails in all that import it
            yield Problem(
                f"{name} {one.version} is installed, but does not import: {one.error}",
                f"pip install --force-reinstall {name}=={one.version.partition('+')[0]}",
            )


def _torch_problems(report: Report) -> Iterator[Problem]:
    told = report.torch
    if told and told["threads"] > report.usable_cores:
        yield Problem(
            f"torch runs {told['threads']} threads, and this process may use "
            f"{report.usable_cores} of {report.cores} cores: they wait for each other",
            f"export OMP_NUM_THREADS={report.usable_cores}",
        )
    if not told or told["cuda_devices"] or not report.gpus:
        return
    if told["rocm_build"] is None and told["cuda_build"] is None:
        yield Problem(
            f"there is an NVIDIA GPU ({report.gpus[0]}), and torch {told['version']} is built "
            "for the CPU alone",
            f"pip install --force-reinstall torch (on Linux that is a CUDA build; else see "
            f"{_INSTALL_TORCH})",
        )
    elif report.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Problem(
            "CUDA_VISIBLE_DEVICES hides the GPU from every library", "unset CUDA_VISIBLE_DEVICES"
        )
    else:
        said = told["cuda_error"] or "it does not say why"
        yield Problem(
            f"there is an NVIDIA GPU ({report.gpus[0]}), and torch {told['version']} (CUDA "
            f"{told['cuda_build']}) cannot use it: {said}",
            f"update the NVIDIA driver, or install a torch built for an older CUDA: "
            f"{_INSTALL_TORCH}",
        )


def _runtime_problems(report: Report) -> Iterator[Problem]:
    present = [one for one in report.libraries if one.name in RUNTIMES and one.version is not None]
    best = libraries.runtime_package()
    if not present:
        if not report.onnxruntime:
            yield Problem(
                "ONNX Runtime is not installed: no export and no verify", f"pip install {best}"
            )
        return
    if len(present) > 1:
        yield Problem(
            "onnxruntime-gpu and onnxruntime are both installed, and one overwrites files of the "
            "other",
            f"pip uninstall -y onnxruntime-gpu onnxruntime && pip install {best}",
        )
        return
    told, devices = report.onnxruntime, report.torch.get("cuda_devices") or report.gpus
    if not told or not devices:
        return
    if "CUDAExecutionProvider" not in told["providers"]:
        yield Problem(
            "there is an NVIDIA GPU, and this ONNX Runtime has no provider for it "
            "(CUDAExecutionProvider)",
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        )
    elif told["cuda_error"] is not None:
        yield Problem(
            f"ONNX Runtime cannot use the GPU: {told['cuda_error']}",
            "install an onnxruntime-gpu for the CUDA of torch "
            f"({report.torch.get('cuda_build') or 'none'}): "
            "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html",
        )


def _machine_problems(report: Report) -> Iterator[Problem]:
    if report.compiler is None:
        yield Problem(
            "there is no C++ compiler, so no torch.compile on the CPU",
            "xcode-select --install"
            if sys.platform == "darwin"
            else "apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)",
        )
    now, most = report.open_files or (-1, -1)
    if 0 <= now < FEW_FILES:
        wanted = WANTED_FILES if most < 0 else min(WANTED_FILES, most)
        yield Problem(
            f"a process may have {now} files open, which many checkpoints and --workers exceed",
            f"ulimit -n {wanted}"
            if wanted > now
            else "the hard limit is no higher: raise it in /etc/security/limits.conf, or where the "
            "container is started (docker run --ulimit nofile=4096)",
        )
    free = report.free_disk_bytes
    if free is not None and free < LITTLE_DISK_BYTES:
        yield Problem(
            f"{free / 1e6:,.0f} MB are free in the working directory",
            "write elsewhere (-o), or make room",
        )


def _free_disk() -> int | None:
    try:
        return shutil.disk_usage(Path()).free
    except OSError:
        return None


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What changes figures. Our own variables may hold names of files: it is only said that they are set."""
    found = {name: environment[name] for name in _TOLD if name in environment}
    ours = sorted(name for name in environment if name.startswith("ENSEMBLEKIT_"))
    return found | dict.fromkeys(ours, "(set)")
