"""Owns the globals of a pickle that mean something to us: what calling each of them yields.

Input: the arguments of a call, from `pickle_vm`. Everything that is not in `REBUILD` stays inert.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ensemblekit.containers import Extent, Inert, Unusable, checked_spec
from ensemblekit.dtypes import DTYPES, QUANTIZED_STORAGES, STORAGES, from_torch_name

DEQUANTIZE = "average the float checkpoints and quantise the result"

StorageLookup = Callable[[str, int, int], Extent | Unusable]
"""`lookup(key, numel, itemsize)`: where the bytes of a storage lie."""


class Global(NamedTuple):
    """A name that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Storage(NamedTuple):
    """A tensor storage: where its bytes lie, and the dtype of a typed one (None: untyped)."""

    extent: Extent
    dtype: str | None


def find_storage(identity: Any, lookup: StorageLookup) -> Storage | Unusable:
    """The storage that a persistent id means: ('storage', class, key, location, numel[, view])."""
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage"):
        return Unusable(f"has an unknown persistent id {brief(identity)}", damaged=True)
    kind, key, numel = identity[1], identity[2], identity[4]
    if not isinstance(kind, Global) or not isinstance(key, str) or type(numel) is not int:
        return Unusable(f"has an unknown storage {brief(identity)}", damaged=True)
    if kind.name in QUANTIZED_STORAGES:
        lookup(key, numel, QUANTIZED_STORAGES[kind.name])
        return Unusable("is quantised", DEQUANTIZE)
    known = from_torch_name(kind.name) if kind.module == "torch" else None
    name = known.name if known else STORAGES.get(kind.name)
    if name is None or not kind.module.startswith("torch"):
        return Unusable(f"has a storage of unknown type {kind}", damaged=True)
    if numel < 0:
        return Unusable(f"has a storage of {numel} elements", damaged=True)
    extent = lookup(key, numel, DTYPES[name].itemsize)
    if isinstance(extent, Unusable):
        return extent
    return Storage(extent, None if kind.name == "UntypedStorage" else name)


class Machine(Protocol):
    """What the functions here need of the machine that calls them."""

    nested: Callable[[bytes], Any] | None

    def spend(self, amount: int) -> None:
        """Count copied bytes against the limit."""

    def hashable(self, key: Any) -> Any:
        """The key, if it can be one."""

    def call(self, function: Any, args: Any) -> Any:
        """What a call of a global yields."""


def _tensor(_: Machine, args: tuple[Any, ...], dtype: str | None = None) -> Any:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)."""
    if len(args) < 4:
        return Unusable(f"was made with {len(args)} arguments", damaged=True)
    storage, offset, shape, stride = args[:4]
    if isinstance(storage, Unusable):
        return storage
    if not isinstance(storage, Storage):
        return Unusable(f"has a {type(storage).__name__} for a storage", damaged=True)
    dtype = dtype or storage.dtype
    if dtype is None:
        return Unusable("has no dtype", damaged=True)
    sizes, steps = _integers(shape), _integers(stride)
    if sizes is None or steps is None or type(offset) is not int:
        text = f"shape {brief(shape)}, stride {brief(stride)}, offset {brief(offset)}"
        return Unusable(f"has no sound geometry: {text}", damaged=True)
    lazily = args[6] if len(args) > 6 and isinstance(args[6], dict) else {}
    if lazily.get("conj") or lazily.get("neg"):
        return Unusable(
            "is conjugated or negated lazily: its bytes are not its values",
            "save tensor.resolve_conj().resolve_neg()",
        )
    return checked_spec(
        dtype=dtype, shape=sizes, stride=steps, offset=offset, extent=storage.extent
    )


def _tensor_v3(machine: Machine, args: tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_tensor_v3(storage, offset, size, stride, grad, hooks, dtype, ...)."""
    kind = args[6] if len(args) > 6 else None
    known = from_torch_name(kind.name) if isinstance(kind, Global) else None
    if known is None:
        return Unusable(f"has an unknown dtype {brief(kind)}", damaged=True)
    return _tensor(machine, args, known.name)


def _from_type(machine: Machine, args: tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, args, state): a Tensor subclass."""
    function, _, inner = args[:3]
    return machine.call(function, inner)


def _nested(machine: Machine, args: tuple[Any, ...]) -> Any:
    """torch.storage._load_from_bytes(data): how plain pickles hold a storage."""
    if machine.nested is None or not isinstance(args[0], bytes):
        return Unusable("is a torch file inside a pickle, where none belongs", damaged=True)
    machine.spend(len(args[0]))
    return machine.nested(args[0])


def _encode(machine: Machine, args: tuple[Any, ...]) -> bytes:
    """_codecs.encode(text, 'latin1'): how protocol 2 writes bytes."""
    text = args[0]
    machine.spend(len(text))
    return bytes(text.encode("latin1"))


def _ordered_dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args else ()
    machine.spend(64 * len(pairs))
    if isinstance(pairs, dict):
        return dict(pairs)
    return {machine.hashable(key): value for key, value in pairs}


def _default_dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    return _ordered_dict(machine, args[1:])


def _members(machine: Machine, args: tuple[Any, ...]) -> list[Any]:
    """Sets and tuples of items; a list will do, since members may not be hashable here."""
    items = args[0] if args else ()
    machine.spend(16 * len(items))
    return list(items)


def _size(_: Machine, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0])


def _plain(kind: Callable[..., Any]) -> Callable[[Machine, tuple[Any, ...]], Any]:
    """A value of a built-in type, made from one short plain value."""

    def make(_: Machine, args: tuple[Any, ...]) -> Any:
        if len(args) > 2 or not all(
            isinstance(a, int | float | complex) or (isinstance(a, str | bytes) and len(a) < 400)
            for a in args
        ):
            return Inert(kind.__name__, args)
        return kind(*args)

    return make


def _device(_: Machine, args: tuple[Any, ...]) -> str:
    return ":".join(str(part) for part in args)


def _numpy_scalar(_: Machine, args: tuple[Any, ...]) -> Any:
    """numpy's scalar(dtype, bytes): a metric, mostly."""
    dtype, data = args[0], args[1] if len(args) > 1 else None
    formats = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}
    form = formats.get(str(dtype.args[0]).lstrip("<|=")) if isinstance(dtype, Inert) else None
    if form is None or not isinstance(data, bytes) or len(data) != struct.calcsize(form):
        return Inert("numpy.scalar", args)
    return struct.unpack(form, data)[0]


def _path(_: Machine, args: tuple[Any, ...]) -> Any:
    texts = [a for a in args if isinstance(a, str)]
    return "/".join(texts).replace("//", "/") if len(texts) == len(args) else Inert("Path", args)


def _reconstructor(_: Machine, args: tuple[Any, ...]) -> Any:
    """copyreg._reconstructor(cls, base, state): an instance, its __init__ not called."""
    cls, base, state = args[:3]
    if str(base) in ("builtins.dict", "__builtin__.dict"):
        return dict(state) if isinstance(state, dict) else {}
    return Inert(str(cls), (state,) if state is not None else ())


def _unusable(reason: str, hint: str | None = None) -> Callable[[Machine, tuple[Any, ...]], Any]:
    return lambda _machine, _args: Unusable(reason, hint)


REBUILD: dict[tuple[str, str], Callable[[Machine, tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda _, args: args[0],
    ("torch._utils", "_rebuild_parameter_with_state"): lambda _, args: args[0],
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch._tensor", "_rebuild_from_type"): _from_type,
    ("torch._utils", "_rebuild_qtensor"): _unusable("is quantised", DEQUANTIZE),
    ("torch._utils", "_rebuild_sparse_tensor"): _unusable(
        "is sparse", "save it dense: tensor.to_dense()"
    ),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unusable(
        "is a meta tensor: it has a shape, but no values"
    ),
    ("torch._utils", "_rebuild_nested_tensor"): _unusable("is a nested tensor"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unusable(
        "is a tensor subclass without values of its own (a DTensor shard, for instance)",
        "gather the full tensors before saving: torch.distributed.checkpoint.state_dict."
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))",
    ),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unusable("is stored as a numpy array"),
    ("torch.storage", "_load_from_bytes"): _nested,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("torch.serialization", "_get_layout"): lambda _, args: str(args[0]),
    ("torch.distributed.tensor", "DTensor"): _unusable("is a DTensor shard"),
    ("collections", "OrderedDict"): _ordered_dict,
    ("collections", "defaultdict"): _default_dict,
    ("collections", "Counter"): _ordered_dict,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    **{
        (module, "scalar"): _numpy_scalar
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    },
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    **{
        (module, kind.__name__): _plain(kind)
        for module in ("builtins", "__builtin__")
        for kind in (int, float, complex, bool, str, bytes, slice)
    },
    **{
        (module, name): _members
        for module in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "list", "tuple")
    },
    **{(module, "dict"): _ordered_dict for module in ("builtins", "__builtin__")},
}


def _integers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, tuple | list) or len(value) > 64:
        return None
    for n in value:
        if type(n) is not int or not -(2**63) < n < 2**63:
            return None
    return tuple(value)


def brief(value: Any) -> str:
    """A value on a few characters, for messages."""
    if isinstance(value, tuple | list):
        inner = ", ".join(brief(v) if not isinstance(v, tuple | list) else "..." for v in value[:6])
        return f"({inner})"
    if isinstance(value, str | int | float | bytes | bool | Global | type(None)):
        text = str(value) if isinstance(value, Global) else repr(value)
        return text if len(text) < 60 else text[:57] + "..."
    return type(value).__name__


def brief_args(args: tuple[Any, ...]) -> str:
    """Arguments as they stand in a call."""
    text = brief(args)
    return text if args else "()"
