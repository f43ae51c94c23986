"""Owns the pickle of a checkpoint: plain values, and tensors that name a record of the archive.

Input: values. `pickle` itself would import torch to name its functions; the opcodes are few. What
comes out opens with `torch.load(weights_only=True)`. Format: `pickletools`, protocol 2.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ensemblekit.dtypes import STORAGES
from ensemblekit.errors import UnsupportedError

_TYPED = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_ORDERED = b"ccollections\nOrderedDict\n)R"
_DEEPEST, _MOST = 50, 100_000
_MOST_BITS = 254 * 8  # of an integer
_PLAIN = (type(None), bool, int, float, str, list, tuple, dict)


@dataclass(frozen=True)
class Stored:
    """A tensor whose elements are a record of the archive.

    Attributes:
        record: Its name.
        shape: Sizes.
        dtype: Torch's name.
        itemsize: Bytes of an element.
    """

    record: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class Ordered:
    """A mapping that becomes an `OrderedDict`, as state dicts are."""

    items: Mapping[str, Any]


def pickled(value: Any) -> bytes:
    """The pickle of plain values, `Ordered` and `Stored`.

    Raises:
        UnsupportedError: Another kind of value.
    """
    return b"\x80\x02" + _value(value) + b"."


def is_plain(value: Any) -> bool:
    """Whether a value is made of None, booleans, numbers, texts, lists, tuples and dicts alone.

    And not of too many, or too deep: an untrusted file may hold a list that contains itself.
    """
    stack, seen = [(value, 0)], 0
    while stack:
        current, depth = stack.pop()
        seen += 1
        if type(current) not in _PLAIN or depth > _DEEPEST or seen > _MOST:
            return False
        if isinstance(current, int) and current.bit_length() > _MOST_BITS:
            return False
        if isinstance(current, dict):
            stack += [(part, depth + 1) for pair in current.items() for part in pair]
        elif isinstance(current, list | tuple):
            stack += [(part, depth + 1) for part in current]
    return True


def _value(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(_value, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_value, value)) + b"e"
        case dict():
            return b"}" + _pairs(value)
        case Ordered():
            return _ORDERED + _pairs(value.items)
        case Stored():
            return _tensor(value)
    raise UnsupportedError(f"a value of type {type(value).__name__} has no place in a checkpoint")


def _pairs(items: Mapping[Any, Any]) -> bytes:
    return b"(" + b"".join(_value(k) + _value(v) for k, v in items.items()) + b"u"


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    if size > 255:
        raise UnsupportedError(f"an integer of {size} bytes has no place in a checkpoint")
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _tensor(tensor: Stored) -> bytes:
    """A call of torch's `_rebuild_tensor_v2`; `_v3` where a dtype has no storage class."""
    count = prod(tensor.shape)
    strides, step = [], 1
    for n in reversed(tensor.shape):
        strides.append(step)
        step *= max(n, 1)
    typed = _TYPED.get(tensor.dtype)
    if typed is not None:
        kind, size, function, end = f"torch\n{typed}", count, "_rebuild_tensor_v2", b""
    else:
        kind, size = "torch.storage\nUntypedStorage", count * tensor.itemsize
        function, end = "_rebuild_tensor_v3", f"ctorch\n{tensor.dtype}\n".encode()
    storage = b"(" + _value("storage") + f"c{kind}\n".encode() + _value(tensor.record)
    storage += _value("cpu") + _integer(size) + b"tQ"
    place = _integer(0) + _value(tensor.shape) + _value(tuple(reversed(strides)))
    return (
        f"ctorch._utils\n{function}\n(".encode()
        + storage
        + place
        + b"\x89"  # requires no gradient
        + _ORDERED  # has no hooks
        + end
        + b"tR"
    )
