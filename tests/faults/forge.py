"""Owns the building blocks of damaged and hostile files: pickle opcodes, zip records, headers.

Its input is numpy arrays and hand-set fields; it uses neither torch, zipfile, pickle nor
safetensors, so that every byte can be made wrong on purpose.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

# --- pickle: each function returns opcodes that leave exactly one value on the stack ----------


class Code(bytes):
    """Opcodes, as against a bytes value that is to be pickled."""


def push(value: object) -> Code:
    """Opcodes for a plain value; `Code` inside containers is taken as it is."""
    if isinstance(value, Code):
        return value
    if value is None or isinstance(value, bool):
        return Code({None: b"N", True: b"\x88", False: b"\x89"}[value])
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return Code(b"\x8a" + bytes([len(raw)]) + raw)
    if isinstance(value, float):
        return Code(b"G" + struct.pack(">d", value))
    if isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        return Code(b"X" + struct.pack("<I", len(raw)) + raw)
    if isinstance(value, bytes):
        return Code(b"B" + struct.pack("<I", len(value)) + value)
    if isinstance(value, tuple):
        return Code(b"(" + b"".join(map(push, value)) + b"t")
    if isinstance(value, list):
        return Code(b"](" + b"".join(map(push, value)) + b"e")
    if isinstance(value, Mapping):
        return Code(b"}(" + b"".join(push(k) + push(v) for k, v in value.items()) + b"u")
    raise TypeError(type(value))


def named(dotted: str) -> Code:
    """GLOBAL; `dotted` is `module.attribute`, or `module:attribute.path`."""
    module, _, name = dotted.partition(":") if ":" in dotted else dotted.rpartition(".")
    return Code(f"c{module}\n{name}\n".encode())


def stack_named(dotted: str) -> Code:
    """STACK_GLOBAL."""
    module, _, name = dotted.partition(":") if ":" in dotted else dotted.rpartition(".")
    return Code(push(module) + push(name) + b"\x93")


def call(function: str | Code, *args: object) -> Code:
    """REDUCE."""
    code = function if isinstance(function, Code) else named(function)
    return Code(code + push(args) + b"R")


def inst(dotted: str, *args: object) -> Code:
    """INST."""
    module, _, name = dotted.rpartition(".")
    return Code(b"(" + b"".join(map(push, args)) + f"i{module}\n{name}\n".encode())


def obj(dotted: str, *args: object) -> Code:
    """OBJ."""
    return Code(b"(" + named(dotted) + b"".join(map(push, args)) + b"o")


def newobj(dotted: str, *args: object) -> Code:
    """NEWOBJ."""
    return Code(named(dotted) + push(args) + b"\x81")


def newobj_ex(dotted: str, *args: object, **kwargs: object) -> Code:
    """NEWOBJ_EX."""
    return Code(named(dotted) + push(args) + push(kwargs) + b"\x92")


def build(target: Code, state: object) -> Code:
    """BUILD."""
    return Code(target + push(state) + b"b")


def persistent(pid: object) -> Code:
    """BINPERSID."""
    return Code(push(pid) + b"Q")


def pickled(value: object, *, protocol: int = 2) -> bytes:
    """A whole pickle."""
    return b"\x80" + bytes([protocol]) + push(value) + b"."


# --- state dicts ------------------------------------------------------------------------------

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}
_SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
Arrays = dict[str, np.ndarray]


def good_arrays(step: int, *, seed: int = 0) -> Arrays:
    """Snapshot number `step` of a small network with BatchNorm: near its siblings, all equal in
    their integer table."""
    base, noise = np.random.default_rng(seed), np.random.default_rng(1000 + step)

    def draw(*shape: int) -> np.ndarray:
        values = base.standard_normal(shape) + 0.05 * noise.standard_normal(shape)
        return values.astype(np.float32)

    return {
        "conv.weight": draw(4, 3, 2, 2),
        "bn.weight": 1 + 0.1 * draw(4),
        "bn.bias": draw(4),
        "bn.running_mean": draw(4),
        "bn.running_var": 1 + np.abs(draw(4)),
        "bn.num_batches_tracked": np.array(100 * step, np.int64),
        "attn.relative_position_index": np.arange(9, dtype=np.int64).reshape(3, 3),
        "head.weight": draw(3, 16),
        "head.bias": draw(3),
    }


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Contiguous strides, counted in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def storage(key: object, numel: object, *, kind: str | Code = "torch.FloatStorage") -> Code:
    """The persistent id that stands for a storage."""
    kind_code = kind if isinstance(kind, Code) else named(kind)
    return persistent(("storage", kind_code, key, "cpu", numel))


def tensor(
    held: Code, shape: object, stride: object, *, offset: object = 0, hooks: object = None
) -> Code:
    """A call of torch's tensor rebuilder."""
    hooks = call("collections.OrderedDict") if hooks is None else hooks
    rebuild = "torch._utils._rebuild_tensor_v2"
    return call(rebuild, held, offset, shape, stride, False, hooks)


def state_dict(arrays: Mapping[str, object]) -> tuple[Code, dict[str, bytes]]:
    """The pickle code and the storages of an OrderedDict; `Code` values are taken as they are."""
    items = b""
    held: dict[str, bytes] = {}
    for key, value in arrays.items():
        if isinstance(value, np.ndarray):
            name = str(len(held))
            held[name] = value.tobytes()
            kind = f"torch.{_STORAGES[value.dtype.name]}"
            code = storage(name, value.size, kind=kind)
            items += push(key) + tensor(code, value.shape, strides(value.shape))
        else:
            items += push(key) + push(value)
    return Code(call("collections.OrderedDict") + b"(" + items + b"u"), held


# --- zip --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One zip record; whatever is not None overrides the right value."""

    name: str
    data: bytes
    before: bytes = b""  # raw bytes in front of the local header
    method: int = 0
    flags: int = 0x808
    crc: int | None = None
    size: int | None = None  # uncompressed size, as stated in the directory
    stored_size: int | None = None
    offset: int | None = None
    local_name: str | None = None
    version: int = 0
    extra: bytes = b""
    listed: bool = True  # in the central directory

    def body(self) -> bytes:
        if self.method != 8:
            return self.data
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return deflate.compress(self.data) + deflate.flush()


def zip_bytes(
    records: Iterable[Record],
    *,
    count: int | None = None,
    directory_size: int | None = None,
    directory_offset: int | None = None,
    zip64_count: int | None = None,
    zip64_offset: int | None = None,
    locator_offset: int | None = None,
    gap: bytes = b"",
    comment: bytes = b"",
    comment_size: int | None = None,
) -> bytes:
    """An archive as torch writes it: data descriptors, 64-byte alignment, zip64 trailer."""
    out, directory, listed = bytearray(), bytearray(), 0
    for record in records:
        out += record.before
        at, body = len(out), record.body()
        name = record.name.encode()
        local = (record.local_name or record.name).encode()
        pad = -(at + 30 + len(local) + 4) % 64
        out += struct.pack(
            "<4s5H3I", b"PK\3\4", record.version, record.flags, record.method, *[0] * 5
        )
        out += struct.pack("<2H", len(local), pad + 4) + local
        out += b"FB" + struct.pack("<H", pad) + b"Z" * pad + body
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        size = len(record.data) if record.size is None else record.size
        stored = len(body) if record.stored_size is None else record.stored_size
        out += b"PK\7\x08" + struct.pack("<3I", crc, stored, size)
        if record.listed:
            listed += 1
            directory += struct.pack(
                "<4s6H3I5H2I",
                *(b"PK\1\2", 0, record.version, record.flags, record.method, 0, 0),
                *(crc, stored, size, len(name), len(record.extra), 0, 0, 0, 0),
                at if record.offset is None else record.offset,
            )
            directory += name + record.extra
    out += gap
    start = len(out) if directory_offset is None else directory_offset
    length = len(directory) if directory_size is None else directory_size
    number = listed if count is None else count
    number64 = number if zip64_count is None else zip64_count
    out += directory
    at64 = len(out) if locator_offset is None else locator_offset
    out += b"PK\6\6" + struct.pack(
        "<Q2H2I4Q",
        44,
        798,
        45,
        0,
        0,
        number64,
        number64,
        length,
        start if zip64_offset is None else zip64_offset,
    )
    out += b"PK\6\7" + struct.pack("<IQI", 0, at64, 1)
    end = min(start, 0xFFFFFFFF), len(comment) if comment_size is None else comment_size
    out += b"PK\5\6" + struct.pack("<4H2IH", 0, 0, number, number, min(length, 0xFFFFFFFF), *end)
    return bytes(out + comment)


Edit = Callable[[list[Record]], list[Record]]


def torch_records(pickle: bytes, storages: Mapping[str, bytes]) -> list[Record]:
    """The records of a torch file."""
    parts = {
        "data.pkl": pickle,
        "byteorder": b"little",
        **{f"data/{key}": data for key, data in storages.items()},
        "version": b"3\n",
        ".data/serialization_id": b"0" * 40,
    }
    return [Record(f"archive/{name}", data) for name, data in parts.items()]


def torch_bytes(
    pickle: bytes, storages: Mapping[str, bytes], *, edit: Edit = list, **fields: object
) -> bytes:
    """A torch file; `edit` changes its records, `fields` go to `zip_bytes`."""
    return zip_bytes(edit(torch_records(pickle, storages)), **fields)  # type: ignore[arg-type]


def torch_state(arrays: Mapping[str, object], *, edit: Edit = list, **fields: object) -> bytes:
    """A torch file that holds a bare state dict."""
    code, storages = state_dict(arrays)
    return torch_bytes(pickled(code), storages, edit=edit, **fields)


def change(name: str, **fields: object) -> Edit:
    """Overrides fields of the record whose name ends in `name`; a callable gets the old value."""

    def edit(records: list[Record]) -> list[Record]:
        return [
            replace(r, **{k: v(getattr(r, k)) if callable(v) else v for k, v in fields.items()})  # type: ignore[arg-type]
            if r.name.endswith(name)
            else r
            for r in records
        ]

    return edit


# --- safetensors ------------------------------------------------------------------------------


def header_and_body(arrays: Arrays) -> tuple[dict[str, object], bytes]:
    """The header as a dict, and the bytes behind it."""
    header: dict[str, object] = {}
    body = b""
    for key, array in arrays.items():
        end = len(body) + array.nbytes
        dtype = _SAFETENSORS[array.dtype.name]
        header[key] = {"dtype": dtype, "shape": [*array.shape], "data_offsets": [len(body), end]}
        body += array.tobytes()
    return header, body


def safetensors_bytes(header: object, body: bytes, *, length: int | None = None) -> bytes:
    """A safetensors file from a header (bytes, or anything JSON takes) and a body."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def safetensors_state(arrays: Arrays) -> bytes:
    """A right safetensors file."""
    return safetensors_bytes(*header_and_body(arrays))
