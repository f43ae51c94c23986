"""`doctor`: facts of this machine are right, and each problem is found and has a remedy.

GPUs, drivers and broken environments that no test machine has are written down as a report; such
tests have `simulated` in their names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblekit import __version__, libraries, machine
from ensemblekit.commands import doctor
from ensemblekit.commands.doctor import Installed, Problem, Report, examine, problems

from ..helpers import ROOT

GPU = "NVIDIA H100, 570.1, 81559 MiB"
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DEVICE = {"name": "NVIDIA H100", "compute_capability": "9.0", "memory_bytes": 8 * 10**10}
TORCH = {
    "version": "2.13.0", "cuda_build": "13.0", "rocm_build": None, "threads": 4,
    "cuda_devices": [DEVICE], "cuda_error": None, "mps": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def real() -> Report:
    return examine()


def simulated(**changes: Any) -> Report:
    """A report of a sound Linux machine with a GPU, but for `changes`."""
    installed = {one.name: "99.0" for one in libraries.LIBRARIES if one.required}
    installed |= {"onnxruntime-gpu": "99.0", "isal": "1.9"} | changes.pop("installed", {})
    errors = changes.pop("errors", {})
    minimum = {"torch": "2.10", "timm": "1.0"}
    listed = [
        Installed(
            one.name, installed.get(one.name), one.required, minimum.get(one.name),
            errors.get(one.name),
        )
        for one in libraries.LIBRARIES
    ]  # fmt: skip
    told = TORCH | changes.pop("torch", {})
    runtime = {"version": "1.31", "providers": [CUDA, CPU], "cuda_error": None}
    base = Report(
        ensemblekit="0.1.0", python="3.13.0 (CPython)", platform="Linux", processor="CPU", cores=8,
        usable_cores=8, memory_bytes=10**10, free_disk_bytes=10**11, open_files=(1024, 4096),
        compiler="g++", gpus=[GPU], variables={}, libraries=listed, torch=told,
        onnxruntime=runtime | changes.pop("onnxruntime", {}),
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def test_this_machine(real: Report) -> None:
    assert real.ensemblekit == __version__
    assert real.python == f"{platform.python_version()} ({platform.python_implementation()})"
    found = {one.name: one for one in real.libraries}
    assert found["numpy"].version == np.__version__
    assert found["torch"].error is None
    assert real.torch["version"] == torch.__version__
    assert real.torch["cuda_build"] == torch.version.cuda
    assert len(real.torch["cuda_devices"]) == torch.cuda.device_count()
    assert CPU in real.onnxruntime["providers"]
    assert 1 <= real.usable_cores <= (os.cpu_count() or 1)
    assert real.memory_bytes is None or real.memory_bytes > 10**8
    assert all(problem.what and problem.fix for problem in real.problems)


def test_as_json(real: Report) -> None:
    body = json.loads(json.dumps(real.to_json()))
    assert body["schema_version"] == 1
    assert set(body) == {f.name for f in dataclasses.fields(Report)} | {"schema_version"}


def test_nothing_private(real: Report) -> None:
    text = json.dumps(real.to_json())
    for private in {str(Path.home()), sys.prefix, platform.node(), str(Path.cwd())} - {"/"}:
        assert f"{private}/" not in text
    assert platform.node() not in real.platform


def test_places_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr(sys, "prefix", "/home/somebody/env")
    text = "/home/somebody/env/lib/libx.so and /home/somebody/notes and /usr/lib"
    assert doctor.without_places(text) == "<environment>/lib/libx.so and ~/notes and /usr/lib"


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ours the values may be names of files."""
    found = doctor._variables(
        {"OMP_NUM_THREADS": "3", "ENSEMBLEKIT_OUTPUT": "/secret/x", "HF_TOKEN": "secret"}
    )
    assert found == {"OMP_NUM_THREADS": "3", "ENSEMBLEKIT_OUTPUT": "(set)"}


def test_simulated_sound_environment() -> None:
    assert list(problems(simulated())) == []


SIMULATED: dict[str, tuple[dict[str, Any], str, str]] = {
    "cpu-build": (
        {"torch": {"cuda_build": None, "cuda_devices": []}},
        "built for the CPU alone",
        "pip install --force-reinstall torch",
    ),
    "old-driver": (
        {"torch": {"cuda_devices": [], "cuda_error": "UserWarning: driver is too old"}},
        "driver is too old",
        "update the NVIDIA driver",
    ),
    "hidden": (
        {"torch": {"cuda_devices": []}, "variables": {"CUDA_VISIBLE_DEVICES": ""}},
        "hides the GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "threads": ({"torch": {"threads": 64}}, "64 threads", "export OMP_NUM_THREADS=8"),
    "both-runtimes": (
        {"installed": {"onnxruntime": "1.31"}},
        "both installed",
        "pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime",
    ),
    "no-cuda-provider": (
        {"onnxruntime": {"providers": [CPU]}},
        "no provider for it",
        "pip install onnxruntime-gpu",
    ),
    "provider-fails": (
        {"onnxruntime": {"cuda_error": "libcublasLt.so.12: cannot open"}},
        "libcublasLt.so.12",
        "(13.0)",
    ),
    "missing": ({"installed": {"onnxscript": None}}, "onnxscript is not", "pip install onnxscript"),
    "isal": ({"installed": {"isal": None}}, "checksums", "pip install isal"),
    "old": ({"installed": {"torch": "2.9.1+cu128"}}, "older than 2.10", '"torch>=2.10"'),
    "old-extra": ({"installed": {"timm": "0.9"}}, "timm 0.9 is older", '"timm>=1.0"'),
    "broken": (
        {"errors": {"scipy": "ImportError: undefined symbol"}},
        "does not import: ImportError: undefined symbol",
        "pip install --force-reinstall scipy==99.0",
    ),
    "compiler": ({"compiler": None}, "no torch.compile", ""),
    "files": ({"open_files": (128, -1)}, "128 files", "ulimit -n 4096"),
    "files-some": ({"open_files": (128, 512)}, "128 files", "ulimit -n 512"),
    "files-fixed": ({"open_files": (128, 128)}, "128 files", "the hard limit is no higher"),
    "disk": ({"free_disk_bytes": 5 * 10**6}, "5 MB are free", "-o"),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_problem(name: str) -> None:
    changes, what, fix = SIMULATED[name]
    [found] = list(problems(simulated(**changes)))
    assert what in found.what
    assert fix in found.fix


def test_simulated_without_onnxruntime() -> None:
    report = dataclasses.replace(simulated(installed={"onnxruntime-gpu": None}), onnxruntime={})
    [found] = list(problems(report))
    assert "ONNX Runtime is not installed" in found.what
    assert found.fix == f"pip install {libraries.runtime_package()}"


def test_simulated_one_cause_is_told_once() -> None:
    """What breaks torch breaks all that import it."""
    error = "OSError: libtorch_cpu.so: cannot open shared object file"
    report = dataclasses.replace(simulated(errors={"torch": error, "onnxscript": error}), torch={})
    [found] = list(problems(report))
    assert isinstance(found, Problem)
    assert found.what.startswith("torch ")


def test_simulated_apple_and_amd() -> None:
    """No NVIDIA GPU: no word on CUDA."""
    for told in ({"cuda_build": None, "mps": True}, {"cuda_build": None, "rocm_build": "7.0"}):
        report = simulated(
            torch={"cuda_devices": [], **told}, gpus=[], onnxruntime={"providers": [CPU]}
        )
        assert list(problems(report)) == []


def test_a_library_that_breaks_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real: installed by pip, and something on the path makes its import fail."""
    (tmp_path / "scipy.py").write_text("raise ImportError('undefined symbol: x')")
    (tmp_path / "rich.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {problem.what.partition(" ")[0]: problem for problem in examine().problems}
    assert "ImportError: undefined symbol: x" in found["scipy"].what
    assert "ends the process" in found["rich"].what
    assert {"torch", "numpy"}.isdisjoint(found)


def test_every_dependency_is_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["gpu"], *extras["timm"], *extras["torchvision"]]
    names = {libraries.normal(re.match(r"[\w.-]+", line)[0]) for line in [*asked, *extras["hf"]]}  # type: ignore[index]
    listed = {libraries.normal(one.name): one for one in libraries.LIBRARIES}
    assert names <= set(listed)
    needed = {libraries.normal(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]
    always = {name for name, one in listed.items() if one.required}
    assert always == needed - set(libraries.RUNTIMES) - {"isal"}


def test_minimums_are_those_of_pip() -> None:
    lowest = libraries.minimums()
    if not lowest:
        pytest.skip("ensemblekit is not installed here")
    assert lowest["numpy"] == "2.0"
    assert not libraries.older(np.__version__, lowest["numpy"])


def test_versions_of_what_is_not_there() -> None:
    assert libraries.versions(["surely-no-such-package"]) == {}


@pytest.mark.parametrize(
    "text, expected", [("200000 100000", 2), ("150000 100000", 2), ("max 100000", 64), ("", 64)]
)
def test_simulated_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int
) -> None:
    """Cores of a container are a share of time, which counting cores does not show."""
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(machine, "_CPU_LIMIT", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert machine.usable_cores() == expected


def test_simulated_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("500000000\n")
    monkeypatch.setattr(machine, "_MEMORY_LIMITS", (str(tmp_path / "memory.max"),))
    assert machine.memory_bytes() == 500_000_000


@pytest.mark.parametrize(
    "script, expected",
    [
        (f"echo '{GPU}'; echo '{GPU}'", [GPU, GPU]),
        ("echo 'No devices were found'", []),
        ("echo 'NVIDIA-SMI has failed, because, it could not'; exit 9", []),
    ],
)
def test_simulated_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[str]
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.nvidia_gpus() == expected
