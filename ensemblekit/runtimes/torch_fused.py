"""Owns running members of one architecture as one: their weights stacked, one call for all.

Input: work. `torch.func.vmap` turns convolutions of K members into one grouped convolution and
linear layers into one batched product. What no rule of vmap covers cannot run this way.
"""

import warnings

import torch

from ensemblekit.ensemble_module import FusedEnsemble
from ensemblekit.errors import MachineError, UnsupportedError
from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes.torch_eager import device_clock, members_in, runner


def unavailable(_: torch.device) -> str | None:
    """It runs everywhere."""
    return None


def open_sessions(work: Work) -> list[Session]:
    """One call for all members; nothing for a single member.

    Raises:
        UnsupportedError: vmap has no rule for something in the members.
    """
    if len(work.members) == 1:
        return []
    module = FusedEnsemble(members_in(work), work.head, logits=work.logits).eval()
    prepare = runner(module, work)
    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # it is measured
    try:
        prepare(work.example.sized(2))()
    except (torch.OutOfMemoryError, MemoryError, MachineError):
        raise
    except Exception as error:
        raise UnsupportedError(f"these members cannot be fused: {error}") from error
    clock = device_clock(work.device)
    return [Session("torch-fused", "fused", work.device.type, prepare, clock, work.precision)]
