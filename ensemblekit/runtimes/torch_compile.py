"""Owns running members under torch.compile, in a loop and fused.

Input: work. Each batch size is compiled by itself, in the warm-up.
"""

from typing import Any

import torch

from ensemblekit.machine import compiler
from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes.torch_eager import device_clock, executions, runner

_RECOMPILE_LIMIT = 1024


def unavailable(device: torch.device) -> str | None:
    """It needs a compiler: C++ on the CPU, Triton on a GPU."""
    if device.type == "cpu" and compiler() is None:
        return "torch.compile on the CPU needs a C++ compiler (g++), and there is none"
    return None


def open_sessions(work: Work) -> list[Session]:
    """The compiled loop and, of several members, the compiled fused module."""
    import torch._dynamo

    # One limit counts all candidates and batch sizes; beyond it, rows would silently run eagerly.
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 16 * _RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found = []
    for execution, module in executions(work).items():
        compiled: Any = torch.compile(module, dynamic=False)
        prepare, clock = runner(compiled, work), device_clock(work.device)
        found.append(
            Session("torch-compile", execution, work.device.type, prepare, clock, work.precision)
        )
    return found
