"""Owns running members under torch.compile, in a loop and fused.

Input: work. Each batch size is compiled by itself, in the warm-up.
"""

import shutil
from typing import Any

import torch

from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes.torch_eager import device_clock, executions, runner


def unavailable(device: torch.device) -> str | None:
    """It needs a compiler: C++ on the CPU, Triton on a GPU."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile on the CPU needs a C++ compiler (g++), and there is none"
    return None


def open_sessions(work: Work) -> list[Session]:
    """The compiled loop and, of several members, the compiled fused module."""
    found = []
    for execution, module in executions(work).items():
        compiled: Any = torch.compile(module, dynamic=False)
        prepare, clock = runner(compiled, work), device_clock(work.device)
        found.append(Session("torch-compile", execution, work.device.type, prepare, clock))
    return found
