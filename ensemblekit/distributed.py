"""Owns torchrun: which batches belong to this process, and how the parts come together.

Input: the environment that `torchrun` sets. Without it there is one process and nothing happens.

All traffic is between CPUs (gloo): predictions are kept there, and the sums of BatchNorm layers
are a few kilobytes. The GPUs compute, one to a process.
"""

import atexit
import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ensemblekit.errors import MachineError, UsageError

T = TypeVar("T")

# How long a process waits for one that is alive and silent, such as process 0 while it hashes
# large files. One that has died is noticed at once: its connections close, and torchrun ends all.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The processes of a run; every method is called by all of them, in the same order.

    Attributes:
        rank: Of this process; 0 writes and prints.
        size: How many there are.
        local_rank: Of this process on its machine: the index of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the order of ranks, on every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _told():
            _dist().all_gather_object(found, value)
        return found

    def to_first(self, value: T) -> list[T]:
        """The values of all processes on process 0, nothing on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with _told():
            _dist().gather_object(value, found, dst=0)
        return found or []

    def from_first(self, value: T) -> T:
        """What process 0 has; the others' values are not looked at."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with _told():
            _dist().broadcast_object_list(box, src=0)
        first: T = box[0]
        return first

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sum over all processes, added in the order of ranks: the same bits everywhere."""
        total = np.zeros_like(values)
        for part in self.gather(values):
            total += part
        return total


def rank() -> int:
    """The rank of this process, 0 without torchrun; before anything is connected."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    return int(os.environ.get("RANK", "0")) if several else 0


@contextmanager
def world() -> Iterator[World]:
    """The processes that torchrun started, connected while the context lasts."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "MASTER_ADDR" not in os.environ:
        yield World()
        return
    if not _dist().is_initialized():  # it may be the caller's, and stays for the next call
        with _told():
            _dist().init_process_group("gloo", timeout=PATIENCE)
        atexit.register(_leave)
    yield World(
        _dist().get_rank(), _dist().get_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    )
    with _told():  # an error leaves at once: the others would wait in vain for a goodbye
        _dist().barrier()


def _leave() -> None:
    with contextlib.suppress(RuntimeError, ValueError, AssertionError):
        _dist().destroy_process_group()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch raises when a peer is gone, or is silent too long
        raise MachineError(
            f"another process of this run is gone: {str(error).splitlines()[0]}",
            hint="the first error above is the cause; start the same command again",
        ) from error


def _dist() -> Any:
    import torch.distributed

    return torch.distributed


def one_process(command: str) -> None:
    """Refuse to run under torchrun, where every process would write the same output.

    Raises:
        UsageError: There are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{command} works in one process", hint=f"run {command} without torchrun")
