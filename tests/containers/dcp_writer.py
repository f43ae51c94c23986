"""Writes distributed checkpoints with two processes, as a training script under torchrun would.

Started by `test_dcp` as a script: the folder to write into. Rank 0 also leaves `full.pt`, the tensors
as they are on one machine.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

RANKS = 2
PLACED = {"rows": Shard(0), "one-row": Shard(0), "columns": Shard(1), "copied": Replicate()}
SHAPES = {"rows": (7, 3), "one-row": (1, 4), "columns": (4, 5, 2), "copied": (3,)}


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {key: torch.randn(*shape, generator=generator) for key, shape in SHAPES.items()}


def network(step: int) -> nn.Module:
    torch.manual_seed(step)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))


def work(rank: int, folder: str) -> None:
    root = Path(folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root / 'store'}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for step in (1, 2, 3):
        full, model = tensors(step), network(step)
        if rank == 0:
            whole = {"placed": full, "model": model.state_dict()}
            torch.save(whole, root / f"full_{step}.pt")
        fully_shard(model, mesh=mesh)
        placed = {k: distribute_tensor(t, mesh, [PLACED[k]]) for k, t in full.items()}
        state = {"model": model.state_dict(), "placed": placed, "step": step}
        dcp.save(state, checkpoint_id=root / "run" / f"checkpoint-{step}")
    for name, joined in (("apart", False), ("joined", True)):
        writer = HuggingFaceStorageWriter(
            path=str(root / name), save_distributed=True, enable_consolidation=joined
        )
        dcp.save(placed, storage_writer=writer)
    dist.barrier()
    os._exit(0)  # torch's threads of saving now and then abort a process that ends in good order


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=RANKS)
