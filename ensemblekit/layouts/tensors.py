"""Owns what all layouts share: finding a network's tensors in a value, and its own keys.

Input: parts of a tree. DataParallel, DistributedDataParallel, torch.compile and AveragedModel
wrap a network and prefix its keys; the prefixes say how it was trained, not what it is.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ensemblekit.containers import Inert, TensorSpec, Unusable, read_array
from ensemblekit.layouts import Facts, Role, Weights

_WRAPPERS = ("module", "_orig_mod")
# These are never a user's own attribute names, so they go at any depth.
_ALWAYS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS = ("n_averaged", "steps")  # of AveragedModel, torch's and MMEngine's
_MAX_DEPTH = 200
_SHARDED = (
    "torch.distributed._shard.sharded_tensor.api.ShardedTensor",
    "torch.distributed.tensor.DTensor",
)
_GATHER = (
    "gather the full tensors on the ranks and save those: torch.distributed.checkpoint.state_dict."
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)); or save with "
    "torch.distributed.checkpoint, which is read as it is"
)

_STEP_KEYS = ("step", "global_step", "iteration", "iter", "iter_num", "num_updates", "n_iter")
_EPOCH_KEYS = ("epoch", "epochs", "current_epoch", "cycle")
_LR_KEYS = ("lr", "learning_rate")
_NOT_METRICS = {*_STEP_KEYS, *_EPOCH_KEYS, *_LR_KEYS, "seed", "swa_n", "n_averaged", "version"}


def tensors_in(value: Any, depth: int = 0) -> dict[str, Any] | None:
    """A network's leaves by key, if `value` is a state dict or a pickled module, else None.

    Wrappings such as `{"state_dict": {...}}` and `{"module": {...}, "decay": ...}` are opened.
    """
    if isinstance(value, Inert):
        return module_leaves(value) if is_module(value) else None
    if not isinstance(value, dict) or not value:
        return None
    if not all(isinstance(key, str) for key in value):
        return None
    leaves = {key: _leaf(item) for key, item in value.items()}
    if any(_is_weight(leaf) for leaf in leaves.values()):
        return leaves
    for name in ("state_dict", "model", "module", "shadow", "params") if depth < 4 else ():
        inner = tensors_in(value.get(name), depth + 1)
        if inner is not None:
            return inner
    return None


def has_weights(leaves: Mapping[str, Any]) -> bool:
    """Whether a dict is a state dict itself; it is not opened further."""
    named = all(isinstance(key, str) for key in leaves)
    return named and any(_is_weight(_leaf(leaf)) for leaf in leaves.values())


def is_module(value: Any) -> bool:
    """Whether an inert object was an `nn.Module`."""
    return isinstance(value, Inert) and {"_parameters", "_modules"} <= set(value.attributes())


def module_leaves(module: Inert) -> dict[str, Any]:
    """What `state_dict()` of a pickled module would hold."""
    found: dict[str, Any] = {}
    stack: list[tuple[str, Inert, int]] = [("", module, 0)]
    while stack:
        prefix, current, depth = stack.pop()
        parts = current.attributes()
        hidden = parts.get("_non_persistent_buffers_set")
        skipped = set(_members(hidden))
        for kind in ("_parameters", "_buffers"):
            for name, leaf in _items(parts.get(kind)):
                if leaf is not None and name not in skipped:
                    found[prefix + name] = leaf
        children = [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in _items(parts.get("_modules"))
            if isinstance(child, Inert) and depth < _MAX_DEPTH
        ]
        stack.extend(reversed(children))
    return found


def make_weights(leaves: Mapping[str, Any], role: Role, *, is_average: bool = False) -> Weights:
    """Weights out of a state dict's leaves: own keys, ties found, non-tensors named."""
    own = own_keys(list(leaves))
    tensors = {
        own[key]: leaf
        for key, leaf in leaves.items()
        if key in own and isinstance(leaf, TensorSpec | Unusable)
    }
    extras = tuple(key for key, leaf in leaves.items() if own.get(key) not in tensors)
    extras = tuple(key for key in extras if key in own)
    return Weights(tensors, role, ties_in(tensors), extras, is_average)


def own_keys(keys: list[str]) -> dict[str, str]:
    """Each key without wrapper prefixes; AveragedModel's counter is left out, where it has them.

    >>> own_keys(["module._orig_mod.fc.weight", "module._orig_mod.fc.bias"])
    {'module._orig_mod.fc.weight': 'fc.weight', 'module._orig_mod.fc.bias': 'fc.bias'}
    """
    return {**_own_keys(tuple(keys))}


@lru_cache(maxsize=1)  # the snapshots of a run have the same keys
def _own_keys(keys: tuple[str, ...]) -> dict[str, str]:
    parts = {key: key.split(".") for key in keys}
    while parts:
        counters = [key for key, p in parts.items() if len(p) == 1 and p[0] in _COUNTERS]
        rest = {key: p for key, p in parts.items() if key not in counters}
        if counters and not all(p[0] == "module" for p in rest.values()):
            break
        if not rest or not all(len(p) > 1 and p[0] in _WRAPPERS for p in rest.values()):
            break
        parts = {key: p[1:] for key, p in rest.items()}
    own = {key: ".".join(q for q in p if q not in _ALWAYS) for key, p in parts.items()}
    return own if len(set(own.values())) == len(own) else {key: key for key in parts}


def ties_in(tensors: Mapping[str, TensorSpec | Unusable]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys that name the same elements of the same storage."""
    starts = {spec.start for spec in tensors.values() if isinstance(spec, TensorSpec)}
    if len(starts) == len(tensors):
        return ()
    groups: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for key, spec in tensors.items():
        if isinstance(spec, TensorSpec) and spec.size and not spec.pieces:
            place = (spec.extent.source, spec.start, spec.dtype, spec.shape, spec.stride)
            groups[place].append(key)
    return tuple(tuple(sorted(keys)) for keys in groups.values() if len(keys) > 1)


def facts_in(values: Mapping[Any, Any]) -> Facts:
    """Step, epoch, learning rate and metrics out of a checkpoint's top level."""
    scalars = {key: number(value) for key, value in values.items() if isinstance(key, str)}
    found = {key: value for key, value in scalars.items() if value is not None}
    for group in ("metrics", "scores", "results"):
        for key, value in _items(values.get(group)):
            if (score := number(value)) is not None:
                found.setdefault(key, score)
    step = _first(found, _STEP_KEYS)
    lr = _first(found, _LR_KEYS)
    arch = values.get("arch")
    return Facts(
        step=int(step) if step is not None else None,
        epoch=_first(found, _EPOCH_KEYS),
        lr=lr if lr is not None else _optimizer_lr(values),
        metrics={key: value for key, value in found.items() if key not in _NOT_METRICS},
        model_hint=arch if isinstance(arch, str) else None,
    )


def number(value: Any) -> float | None:
    """A finite number, also out of a tensor of one element; None for anything else."""
    if isinstance(value, TensorSpec):
        if value.size != 1 or value.type.kind == "complex":
            return None
        value = read_array(value).astype("float64").item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _leaf(value: Any) -> Any:
    """A shard as what it is: the rank's part of a tensor, not one that can be left out."""
    if isinstance(value, Inert) and value.cls in _SHARDED:
        return Unusable("is the shard of one rank of a distributed run", _GATHER)
    return value


def _is_weight(leaf: Any) -> bool:
    """Random states and counters are integers, losses single numbers; weights are neither."""
    if isinstance(leaf, Unusable):
        return True
    return (
        isinstance(leaf, TensorSpec)
        and leaf.type.kind in ("float", "complex")
        and len(leaf.shape) > 0
    )


def _optimizer_lr(values: Mapping[Any, Any]) -> float | None:
    for value in values.values():
        holders = value if isinstance(value, list) else [value]
        for holder in holders:
            groups = holder.get("param_groups") if isinstance(holder, dict) else None
            if isinstance(groups, list) and groups and isinstance(groups[0], dict):
                return number(groups[0].get("lr"))
    return None


def _first(found: Mapping[str, float], keys: tuple[str, ...]) -> float | None:
    return next((found[key] for key in keys if key in found), None)


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Inert):
        value = {k: v for k, v in value.mapping if isinstance(k, str)}
    if not isinstance(value, dict):
        return []
    return [(key, item) for key, item in value.items() if isinstance(key, str)]


def _members(value: Any) -> list[str]:
    items = value.items if isinstance(value, Inert) else value
    return [item for item in items if isinstance(item, str)] if isinstance(items, list) else []
