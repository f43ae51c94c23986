"""Owns the stream of batches: from a Dataset, a pair of arrays or an iterable to `Batch`.

Input: what a data target returned, or what a Python caller hands over.
"""

import hashlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ensemblekit.errors import EnsembleKitError, InputError, MachineError, UsageError
from ensemblekit.targets import user_code

_STREAMS: Any = torch.utils.data.DataLoader | torch.utils.data.IterableDataset
LABEL_KEYS = ("labels", "label", "y", "target")


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        inputs: Positional arguments of the model, or keyword arguments when it is a dict.
        target: Labels, None where the data have none.
        size: Samples.
    """

    inputs: tuple[Any, ...] | dict[str, Any]
    target: torch.Tensor | None
    size: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        target = None if self.target is None else self.target.to(device)
        return replace(self.map(lambda tensor: tensor.to(device)), target=target)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """The batch with each tensor among its inputs changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, torch.Tensor) else value

        if isinstance(self.inputs, dict):
            return replace(self, inputs={k: changed(v) for k, v in self.inputs.items()})
        return replace(self, inputs=tuple(changed(value) for value in self.inputs))

    def only(self, mask_N: torch.Tensor) -> "Batch":
        """The samples where the mask is true."""
        if bool(mask_N.all()):
            return self
        return self._taken(lambda x: x[mask_N.to(x.device)], int(mask_N.sum()))

    def head(self, count: int) -> "Batch":
        """The first `count` samples."""
        return self if count >= self.size else self._taken(lambda x: x[:count], count)

    def sized(self, count: int) -> "Batch":
        """So many samples: the first ones, or all of them again and again."""
        if count <= self.size:
            return self.head(count)
        index_N = torch.arange(count) % self.size
        return self._taken(lambda x: x[index_N.to(x.device)], count)

    def _taken(self, take: Callable[[torch.Tensor], torch.Tensor], count: int) -> "Batch":
        """Some samples of everything that has one entry a sample."""

        def taken(value: torch.Tensor) -> torch.Tensor:
            return take(value) if value.ndim and len(value) == self.size else value

        target = None if self.target is None else taken(self.target)
        return replace(self.map(taken), target=target, size=count)


@dataclass(frozen=True)
class Plan:
    """How to walk through data.

    Attributes:
        batch_size: Samples in a batch of map-style data; iterables bring their own.
        shuffle_seed: Seed of a random order of map-style data, None for the stored order.
        limit: At most so many samples, a seeded random subset of map-style data.
        workers: Processes that load map-style data.
        seed: Of the subset that `limit` takes, where the order is the stored one.
        part: (rank, size): only the batches rank, rank + size, ... of that order.
    """

    batch_size: int = 128
    shuffle_seed: int | None = None
    limit: int | None = None
    workers: int = 0
    seed: int = 0
    part: tuple[int, int] = (0, 1)


def count(data: Any, plan: Plan) -> int | None:
    """Samples that `batches` will give, None where an iterable does not tell."""
    total = _length(data)
    if total is None or plan.limit is None:
        return total
    return min(total, plan.limit)


def batches(data: Any, plan: Plan) -> Iterator[Batch]:
    """Batches of `data`; the last one of map-style data is never a single sample.

    Raises:
        InputError: The data are empty, or a batch has no known form.
    """
    done = place = 0
    rank, size = plan.part
    indexed = _has_indices(data)  # then only our own part is loaded
    with user_code("the data"):
        stream = iter(_raw_batches(data, plan))
    while plan.limit is None or done < plan.limit:
        with user_code("the data"):
            raw = next(stream, None)
        if raw is None:
            break
        batch = as_batch(raw)
        if batch.size == 0:
            continue
        if plan.limit is not None:
            batch = batch.head(plan.limit - done)
        done += batch.size
        if indexed or place % size == rank:
            yield batch
        place += 1
    if done == 0 and size == 1:
        raise InputError(
            "the data are empty: no sample came out of them",
            hint="check what the data target returns for this split",
        )


def digest(batch: Batch) -> bytes:
    """16 bytes that stand for the inputs and labels of a batch."""
    state = hashlib.blake2b(digest_size=16)
    named = batch.inputs.items() if isinstance(batch.inputs, dict) else enumerate(batch.inputs)
    for name, value in (*named, ("target", batch.target)):
        _digest_value(state, str(name), value)
    return state.digest()


def _digest_value(state: Any, name: str, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OSUMm":
        value = _tensor(value)
    if isinstance(value, torch.Tensor):
        state.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            state.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping | list | tuple):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        state.update(f"{name}\0{type(value).__name__} of {len(value)}\0".encode())
        for key, part in parts:
            _digest_value(state, str(key), part)
    else:
        state.update(f"{name}\0{value!r}\0".encode())


def check_repeatable(data: Any, again: Callable[[], Any], plan: Plan, *, what: str) -> Batch:
    """The first batch of data that give the same samples in the same order each time.

    Args:
        data: Anything that `batches` takes.
        again: Gives the same data anew, at their beginning.
        plan: How to walk.
        what: The data's name in errors.

    Raises:
        InputError: They are shuffled, drop their last batch, or change from walk to walk.
    """
    if isinstance(data, torch.utils.data.DataLoader):
        sampler: Any = data.sampler
        if isinstance(sampler, torch.utils.data.RandomSampler):
            raise InputError(
                f"the {what} data are a DataLoader that shuffles: members would not see the same "
                "samples in the same order",
                hint="DataLoader(..., shuffle=False), or return the Dataset itself",
            )
        dataset = data.dataset
        if data.drop_last and isinstance(dataset, Sized) and data.batch_size:
            left = len(dataset) % data.batch_size
            if left:
                raise InputError(
                    f"the {what} data are a DataLoader with drop_last=True: {left} of "
                    f"{len(dataset)} samples would never be predicted",
                    hint="DataLoader(..., drop_last=False), or return the Dataset itself",
                )
    plan = replace(plan, part=(0, 1))
    first = next(batches(data, plan))
    second = next(batches(again(), plan))
    if digest(first) != digest(second):
        raise InputError(
            f"the {what} data are not the same when they are read twice: they are shuffled or "
            "randomly augmented, and predictions of different members would not belong together",
            hint="no shuffling and no random augmentation for validation and test data",
        )
    return first


def forward(model: torch.nn.Module, batch: Batch) -> Any:
    """The model's outputs for a batch.

    Raises:
        InputError: The model raised; the message says where, and what it was given.
        MachineError: Memory ran out.
    """
    try:
        if isinstance(batch.inputs, dict):
            return model(**batch.inputs)
        return model(*batch.inputs)
    except (EnsembleKitError, MemoryError):
        raise
    except torch.OutOfMemoryError as error:
        raise MachineError(f"out of memory: {error}", hint="try --batch-size 32") from error
    except Exception as error:  # their model may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        hint = "check the shapes and types that the data target returns against the model"
        if "unexpected keyword argument" in str(error):
            hint = "the batches are dicts; leave out the entries that the model does not take"
        raise InputError(
            f"the model cannot take the data: {error} "
            f"({type(error).__name__} at {frame.filename}:{frame.lineno}); "
            f"inputs are {_shapes(batch)}",
            hint=hint,
        ) from error


def _shapes(batch: Batch) -> str:
    named = batch.inputs.items() if isinstance(batch.inputs, dict) else enumerate(batch.inputs)
    return ", ".join(
        f"{name}: {tuple(value.shape)} {value.dtype}"
        for name, value in named
        if isinstance(value, torch.Tensor)
    )


def as_batch(raw: Any) -> Batch:
    """A user's batch in the one form we use.

    Raises:
        InputError: It is neither a tensor, a tuple nor a dict.
    """
    if isinstance(raw, Batch):
        return raw
    if isinstance(raw, Mapping):
        label = next((key for key in LABEL_KEYS if key in raw), None)
        inputs: Any = {str(k): _tensor(v) for k, v in raw.items() if k != label}
        target = None if label is None else _labels(raw[label])
        values = list(inputs.values())
    elif isinstance(raw, tuple | list) and raw:
        parts = [_tensor(part) for part in raw]
        inputs, target = (parts[0],), None
        if len(parts) > 1:
            inputs, target = tuple(parts[:-1]), _labels(parts[-1])
        values = list(inputs)
    elif isinstance(raw, torch.Tensor | np.ndarray):
        inputs, target = (_tensor(raw),), None
        values = list(inputs)
    else:
        raise InputError(
            f"a batch is a {type(raw).__name__}; expected (x, y), (x1, ..., xn, y), or a dict "
            f"with the label under {', '.join(LABEL_KEYS)}"
        )
    sizes = [len(v) for v in values if isinstance(v, torch.Tensor) and v.ndim]
    if not sizes:
        raise InputError("a batch holds no tensor to count samples in")
    return Batch(inputs, target, sizes[0])


def _raw_batches(data: Any, plan: Plan) -> Iterable[Any]:
    if isinstance(data, torch.Tensor | np.ndarray):
        data = (data,)
    if _is_arrays(data):
        return _array_batches(data, plan)
    if isinstance(data, torch.utils.data.IterableDataset):
        stream: Iterable[Any] = torch.utils.data.DataLoader(
            data, batch_size=plan.batch_size, num_workers=plan.workers
        )
        return stream
    if _is_map_style(data):
        loader: Any = torch.utils.data.DataLoader(
            data, batch_sampler=_index_batches(len(data), plan), num_workers=plan.workers
        )
        batches_of_indices: Iterable[Any] = loader
        return batches_of_indices
    if isinstance(data, Iterable):
        return data
    raise UsageError(
        f"the data are a {type(data).__name__}; expected a Dataset, a pair of equal-length arrays "
        "or an iterable of batches"
    )


def _has_indices(data: Any) -> bool:
    """Whether `_index_batches` chooses what is loaded."""
    if isinstance(data, torch.Tensor | np.ndarray) or _is_arrays(data):
        return True
    return not isinstance(data, torch.utils.data.IterableDataset) and _is_map_style(data)


def _array_batches(data: Sequence[Any], plan: Plan) -> Iterator[Any]:
    arrays = [_tensor(part) for part in data]
    for indices in _index_batches(len(arrays[0]), plan):
        yield tuple(part[indices] for part in arrays)


def _index_batches(total: int, plan: Plan) -> list[list[int]]:
    seed = plan.shuffle_seed
    indices = np.arange(total)
    if plan.limit is not None and plan.limit < total:
        chosen = np.random.default_rng(plan.seed if seed is None else seed).permutation(total)[
            : plan.limit
        ]
        indices = chosen if seed is not None else np.sort(chosen)
    elif seed is not None:
        indices = np.random.default_rng(seed).permutation(total)
    found: list[list[int]] = [
        indices[start : start + plan.batch_size].tolist()
        for start in range(0, len(indices), plan.batch_size)
    ]
    if len(found) > 1 and len(found[-1]) == 1:  # BatchNorm cannot see one sample's statistics
        found[-2:] = [found[-2] + found[-1]]
    rank, size = plan.part
    return found[rank::size]


def _length(data: Any) -> int | None:
    if isinstance(data, torch.Tensor | np.ndarray):
        return len(data)
    if _is_arrays(data):
        return len(data[0])
    if _is_map_style(data):
        return len(data)
    dataset = getattr(data, "dataset", None)  # a DataLoader: its length is in batches
    if not isinstance(dataset, Sized):
        return None
    sampler = getattr(data, "sampler", None)  # it may take some of the samples only
    return len(sampler) if isinstance(sampler, Sized) else len(dataset)


def _is_arrays(data: Any) -> bool:
    """A tuple of arrays of equal length, or a list of at least two: one could be a batch."""
    if not isinstance(data, tuple | list) or len(data) < 2 - isinstance(data, tuple):
        return False
    if not all(isinstance(part, torch.Tensor | np.ndarray) and part.ndim for part in data):
        return False
    lengths = {len(part) for part in data}
    if len(lengths) > 1:
        raise InputError(f"arrays of different lengths: {sorted(lengths)}")
    return True


def _is_map_style(data: Any) -> bool:
    if isinstance(data, _STREAMS | Mapping | list | tuple):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OSUMm":
            raise InputError(f"an array of type {value.dtype}: expected numbers")
        wanted = value.dtype.newbyteorder("=")
        if wanted == np.float64:
            wanted = np.dtype(np.float32)  # torch's default; models are rarely double
        return torch.from_numpy(np.require(value, wanted, ["C", "W"]))
    return value


def _labels(value: Any) -> Any:
    """Labels as a tensor; lists of numbers are common."""
    if isinstance(value, list | tuple):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"labels are not numbers: {error}") from error
    return _tensor(value)
