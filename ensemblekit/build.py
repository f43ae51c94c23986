"""Owns the way from weights to a ready module: arrays become torch tensors under the model's keys.

Input: arrays from `state`, a module from `targets`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensemblekit.errors import IncompatibleError, MachineError, UsageError, listing

_OPTIONAL = ("num_batches_tracked",)  # counters that nothing reads at inference


def to_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """The array as a tensor over the same memory; bfloat16 and float8 cross as integers.

    >>> to_torch(np.array([1.0, 2.0], np.float32))
    tensor([1., 2.])
    """
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    name = "complex32" if array.dtype.names else array.dtype.name
    carrier = array.view({1: np.uint8, 2: np.int16, 4: np.int32}[array.dtype.itemsize])
    return torch.from_numpy(carrier).view(getattr(torch, name))


@contextmanager
def plain_attention() -> Iterator[None]:
    """torch's transformer layers as plain operators, not as one fused operator without a formula."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=before)


def device_from_name(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` means; `auto` takes a GPU where there is one.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        local_rank: Which of the GPUs `auto` and `cuda` mean, where several processes share a machine.

    Raises:
        MachineError: This machine does not have it.
        UsageError: Not a device name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device '{name}'; valid: auto, cpu, cuda, cuda:N, mps") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise MachineError(f"device '{name}' is not available here", hint="--device cpu")
    return device


def key_map(model: nn.Module, keys: list[str]) -> dict[str, str]:
    """The model's key for each key of the weights.

    Where all keys differ by one prefix (`model.`, `net.`, `module.`), it is added or taken off.

    Raises:
        IncompatibleError: Keys of either side have no partner.
    """
    wanted = list(_tensors(model))
    for mapping in _mappings(keys, wanted):
        missing = set(wanted) - set(mapping.values())
        extra = [key for key, own in mapping.items() if own not in set(wanted)]
        if not extra and not _needed(model, missing, set(mapping.values())):
            return mapping
    missing = set(_needed(model, set(wanted) - set(keys), set(keys)))
    extra = [key for key in keys if key not in wanted]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys of the model are not in it ({listing(sorted(missing))})")
    if extra:
        parts.append(f"{len(extra)} of its keys are not in the model ({listing(extra)})")
    raise IncompatibleError(
        f"the checkpoints do not fit the model: {'; '.join(parts)}",
        hint="check --model and --model-arg against what was trained",
    )


def load_weights(model: nn.Module, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """Copy weights into a module and put it into eval mode.

    Args:
        model: Changed in place; its dtypes stay.
        arrays: By the snapshots' keys.

    Returns:
        The model's key for each key of the weights.

    Raises:
        IncompatibleError: Keys or shapes do not fit.
    """
    mapping = key_map(model, list(arrays))
    own = _tensors(model)
    with torch.no_grad():
        for key, array in arrays.items():
            target = own[mapping[key]]
            if tuple(target.shape) != array.shape:
                raise IncompatibleError(
                    f"the checkpoints do not fit the model: '{key}' has shape {array.shape}, "
                    f"the model's has {tuple(target.shape)}",
                    hint="check --model-arg against what was trained",
                )
            target.copy_(to_torch(array))
    model.eval()
    return mapping


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers by key, without extra state."""
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _mappings(keys: list[str], wanted: list[str]) -> list[dict[str, str]]:
    """The keys as they are, and with one prefix taken off or added."""
    found = [{key: key for key in keys}]
    for long, short, strip in ((keys, wanted, True), (wanted, keys, False)):
        tails = set(short)
        prefix = next((_prefix(key, tails) for key in long if _prefix(key, tails)), None)
        if prefix and strip:
            found.append({key: key.removeprefix(prefix) for key in keys})
        elif prefix:
            found.append({key: prefix + key for key in keys})
    return found


def _prefix(key: str, tails: set[str]) -> str | None:
    parts = key.split(".")
    return next(
        (key[: -len(tail)] for n in range(1, len(parts)) if (tail := ".".join(parts[n:])) in tails),
        None,
    )


def _needed(model: nn.Module, missing: set[str], present: set[str]) -> list[str]:
    """Missing keys that matter: neither counters nor tied to a key that is there."""
    tensors = _tensors(model)
    there = {tensors[key].data_ptr() for key in present if key in tensors}
    return [
        key
        for key in missing
        if not key.endswith(_OPTIONAL) and tensors[key].data_ptr() not in there
    ]
