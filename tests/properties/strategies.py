"""Owns the drawing of snapshots: every dtype, awkward values, every way a tensor can lie in memory.

Its input is seeds and choices from hypothesis; numpy draws the values, which is faster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from ensemblekit.candidates import Row
from ensemblekit.snapshots import SnapshotSet

from ..helpers import read_set

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (4, 3), (2, 3, 4, 5), (1300,), (30, 30), (3, 1, 5, 40)]


def awkward(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal values of several magnitudes among zeros of both signs and subnormal numbers."""
    rng = np.random.default_rng(seed)
    real = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
    full = (*shape, 2) if real is not dtype else shape
    tiny = torch.finfo(real).tiny
    values = rng.normal(size=full) * rng.choice([0.01, 1.0, 30.0], size=full)
    choice = rng.integers(0, 12, size=full)
    for number, special in enumerate((0.0, -0.0, tiny, -tiny / 2)):
        values = np.where(choice == number, special, values)
    drawn = torch.from_numpy(np.asarray(values)).to(real)
    return torch.complex(drawn[..., 0], drawn[..., 1]) if real is not dtype else drawn


FORMS = ("plain", "transposed", "strided", "inside", "channels_last", "expanded")


def laid_out(tensor: torch.Tensor, form: str) -> torch.Tensor:
    """The same values, lying otherwise in memory."""
    if tensor.dim() == 0 or form == "plain":
        return tensor
    if form == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if form == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if form == "inside":
        return torch.cat([tensor, tensor])[: tensor.shape[0]]
    if form == "expanded" and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    if form == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


@dataclass(frozen=True)
class Network:
    """K snapshots as torch tensors, and their description in case a test fails."""

    states: list[dict[str, torch.Tensor]]

    @property
    def first(self) -> dict[str, torch.Tensor]:
        return self.states[0]


@st.composite
def networks(draw: st.DrawFn, *, least: int = 2, most: int = 5, forms: bool = True) -> Network:
    """Two or three tensors of any dtype and shape in `least` to `most` snapshots."""
    count = draw(st.integers(least, most))
    keys = draw(st.integers(1, 3))
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for n in range(keys):
        dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS)))]
        shape = draw(st.sampled_from(SHAPES))
        common = draw(st.sampled_from(FORMS)) if forms else "plain"
        mixed = forms and draw(st.booleans())
        seed = draw(st.integers(0, 2**20))
        for k, state in enumerate(states):
            form = draw(st.sampled_from(FORMS)) if mixed else common
            state[f"layer{n}.weight"] = laid_out(awkward(seed + k, shape, dtype), form)
    for state in states:
        state["anchor"] = torch.ones(2)  # a state dict of empty tensors alone is none
    return Network(states)


@contextmanager
def on_disk(states: Sequence[dict[str, torch.Tensor]]) -> Iterator[SnapshotSet]:
    """The states as files that `torch.save` wrote, read in the order given."""
    with tempfile.TemporaryDirectory(prefix="net-") as folder:
        paths = [Path(folder) / f"snap_{k}.pt" for k in range(len(states))]
        for state, path in zip(states, paths, strict=True):
            torch.save(state, path)
        yield read_set(*paths)


def rows(count: int, *, signed: bool = True) -> st.SearchStrategy[Row]:
    """Mixed rows of eighths."""
    low = -8 if signed else 0
    whole = st.lists(st.integers(low, 16), min_size=count, max_size=count)
    usable = whole.filter(lambda c: sum(c) > 0)
    return usable.map(lambda c: Row(tuple(n / 8 for n in c), sum(c) / 8))


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements in C order."""
    if not tensor.numel():
        return b""
    dense = tensor.clone(
        memory_format=torch.contiguous_format
    )  # also where a size of 1 hides a stride
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def widened(tensor: torch.Tensor) -> np.ndarray:
    """Real values as float64, complex ones as pairs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.double().numpy()
