"""Owns the building blocks of the other containers: legacy torch files, plain pickles, tar, DCP.

Its input is numpy arrays and hand-set fields, as in `forge`; no library writes anything here.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from . import forge
from .forge import Arrays, Code, call, named, push

# --- legacy torch files: five pickles, then each storage behind its length ---------------------

MAGIC = 0x1950A86A20F9469CFC6C
SYS_INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def legacy_bytes(
    root: object,
    storages: Mapping[str, bytes],
    itemsizes: Mapping[str, int] | None = None,
    *,
    magic: object = MAGIC,
    protocol: object = 1001,
    sys_info: object = SYS_INFO,
    keys: object = None,
    numels: Mapping[str, int] | None = None,
) -> bytes:
    """A torch file of before zip; keyword arguments replace its pickles or stated lengths."""
    listed = list(storages) if keys is None else keys
    parts = [forge.pickled(part) for part in (magic, protocol, sys_info, root, listed)]
    for key, data in storages.items():
        numel = len(data) // (itemsizes or {}).get(key, 4)
        parts += [struct.pack("<q", (numels or {}).get(key, numel)), data]
    return b"".join(parts)


def legacy_file(step: int, changes: Arrays | None = None, **fields: object) -> bytes:
    """A right legacy file of one good snapshot; `extra` in `fields` is one more entry."""
    arrays = {**forge.good_arrays(step), **(changes or {})}
    code, storages = forge.state_dict(arrays)
    entries = {"model": code, "epoch": step}
    entries |= {"extra": fields.pop("extra")} if "extra" in fields else {}
    sizes = {str(i): array.itemsize for i, array in enumerate(arrays.values())}
    root = fields.pop("root", push(entries))
    return legacy_bytes(root, storages, sizes, **fields)  # type: ignore[arg-type]


# --- plain pickles: each storage is a legacy file in bytes ---------------------------------------


def nested(data: bytes) -> Code:
    """How a plain pickle holds a storage."""
    return call("torch.storage._load_from_bytes", data)


def nested_storage(array: np.ndarray, **fields: object) -> bytes:
    """A legacy file that holds one bare storage."""
    kind = f"torch.{forge._STORAGES[array.dtype.name]}"
    held = forge.storage("0", array.size, kind=kind)
    sizes = {"0": array.itemsize}
    return legacy_bytes(held, {"0": array.tobytes()}, sizes, **fields)  # type: ignore[arg-type]


def raw_file(step: int, changes: Mapping[str, Code] | None = None, **extra: object) -> bytes:
    """`pickle.dump` of a good snapshot; `changes` replace tensors."""
    state = {
        key: forge.tensor(nested(nested_storage(array)), array.shape, forge.strides(array.shape))
        for key, array in forge.good_arrays(step).items()
    }
    return forge.pickled(
        {"model": {**state, **(changes or {})}, "epoch": step, **extra}, protocol=4
    )


# --- tar -------------------------------------------------------------------------------------------


def octal(value: int, width: int) -> bytes:
    return f"{value:0{width - 1}o}".encode() + b"\0"


def member(
    name: str | bytes,
    data: bytes = b"",
    *,
    kind: bytes = b"0",
    link: str = "",
    size: int | bytes | None = None,
    checksum: int | None = None,
) -> bytes:
    """One header and its data, padded; a size in bytes is written as it is."""
    raw_name = name if isinstance(name, bytes) else name.encode()
    count = len(data) if size is None else size
    raw_size = count if isinstance(count, bytes) else octal(count, 12)
    head = raw_name.ljust(100, b"\0") + octal(0o644, 8) + octal(0, 8) + octal(0, 8)
    head += raw_size.ljust(12, b"\0") + octal(0, 12) + b" " * 8 + kind
    head += link.encode().ljust(100, b"\0") + b"ustar\x0000" + b"\0" * 247
    total = sum(head) if checksum is None else checksum
    head = head[:148] + octal(total, 7) + b" " + head[156:]
    return head + data + b"\0" * (-len(data) % 512)


def tar_bytes(*members: bytes, end: bytes = b"\0" * 1024) -> bytes:
    return b"".join(members) + end


def pax(**fields: str) -> bytes:
    """An extended header for the member behind it."""
    body = b""
    for key, value in fields.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line)
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        body += str(length).encode() + line
    return member("PaxHeaders/x", body, kind=b"x")


# --- torch's tar of 2016: a table of storages, a table of tensors, the object --------------------


def storage_row(key: object, kind: object, numel: int, data: bytes) -> bytes:
    return forge.pickled((key, "cpu", kind)) + struct.pack("<q", numel) + data


def tensor_row(
    key: object,
    storage: object,
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
    *,
    offset: int = 0,
    dimensions: int | None = None,
) -> bytes:
    steps = forge.strides(shape) if stride is None else stride
    head = forge.pickled((key, storage, named("torch.FloatTensor")))
    head += struct.pack("<ii", len(shape) if dimensions is None else dimensions, 0)
    return head + struct.pack(f"<{2 * len(shape) + 1}q", *shape, *steps, offset)


def old_members(arrays: Arrays, **entries: object) -> dict[str, bytes]:
    """The four members for a dict of arrays under `model`; storages 1, 2.., tensors 101, 102.."""
    storages, tensors, state = [], [], {}
    for i, (key, array) in enumerate(arrays.items(), 1):
        kind = named(f"torch.{forge._STORAGES[array.dtype.name]}")
        storages.append(storage_row(i, kind, array.size, array.tobytes()))
        tensors.append(tensor_row(100 + i, i, array.shape))
        state[key] = forge.persistent(str(100 + i))
    return {
        "sys_info": forge.pickled(SYS_INFO),
        "pickle": forge.pickled({"model": state, **entries}),
        "storages": table(storages, []),
        "tensors": table(tensors),
    }


def table(rows: Sequence[bytes], *behind: object, count: object = None) -> bytes:
    """Its length, its rows, and what comes behind them (the views, for storages)."""
    length = len(rows) if count is None else count
    return forge.pickled(length) + b"".join(rows) + b"".join(map(forge.pickled, behind))


def old_file(step: int, **changes: bytes | None) -> bytes:
    """A right file of 2016; `changes` replace members, None drops one."""
    members = {**old_members(forge.good_arrays(step), epoch=step), **changes}
    return tar_bytes(*(member(k, v) for k, v in members.items() if v is not None))


# --- distributed checkpoints -------------------------------------------------------------------------

_DCP = "torch.distributed.checkpoint.metadata"
Blobs = dict[str, bytes]


def instance(dotted: str, **fields: object) -> Code:
    return forge.build(forge.newobj(dotted), fields)


def size(*numbers: object) -> Code:
    return call("torch.Size", numbers)


def chunk(offsets: Sequence[object], sizes: Sequence[object]) -> Code:
    name = f"{_DCP}.ChunkStorageMetadata"
    return instance(name, offsets=size(*offsets), sizes=size(*sizes))


def tensor_entry(shape: Sequence[object], chunks: object) -> Code:
    properties = instance(f"{_DCP}.TensorProperties")
    name = f"{_DCP}.TensorStorageMetadata"
    return instance(name, properties=properties, size=size(*shape), chunks=chunks)


def index(fqn: object, offset: object = None) -> Code:
    place = size(*offset) if isinstance(offset, tuple) else offset
    return instance(f"{_DCP}.MetadataIndex", fqn=fqn, offset=place, index=0)


def info(path: object, offset: object, length: object, **fields: object) -> Code:
    name = "torch.distributed.checkpoint.filesystem._StorageInfo"
    return instance(name, relative_path=path, offset=offset, length=length, **fields)


def blob_of(array: np.ndarray) -> bytes:
    """A piece as it lies in a `.distcp` file: a torch file of a bare tensor."""
    kind = f"torch.{forge._STORAGES[array.dtype.name]}"
    held = forge.storage("0", array.size, kind=kind)
    root = forge.tensor(held, array.shape, forge.strides(array.shape))
    return forge.torch_bytes(forge.pickled(root), {"0": array.tobytes()})


class Plan:
    """A distributed checkpoint in the making: every table can be made wrong before it is written.

    `head.weight` is cut into the rows 0-1 and 2, which lie in two files; the rest is whole.
    """

    def __init__(self, step: int) -> None:
        self.entries: dict[object, object] = {}
        self.paths: dict[object, object] = {}
        self.infos: dict[Code, object] = {}
        self.files: Blobs = {"__0_0.distcp": b"", "__1_0.distcp": b""}
        for key, array in forge.good_arrays(step).items():
            cuts = (
                [(0, 2), (2, 3)]
                if key == "head.weight"
                else [(0, len(array))]
                if array.ndim
                else []
            )
            self.tensor(f"model.{key}", ("model", key), array, cuts)

    def tensor(
        self, name: str, path: tuple[str, ...], array: np.ndarray, cuts: list[tuple[int, int]]
    ) -> None:
        chunks = []
        for rank, (start, stop) in enumerate(cuts or [(0, 0)]):
            part = array[start:stop] if cuts else array
            offset = (start, *[0] * (array.ndim - 1)) if cuts else ()
            self.piece(name, offset, blob_of(part), f"__{rank}_0.distcp")
            chunks.append(chunk(offset, part.shape))
        self.entries[name] = tensor_entry(array.shape, chunks)
        self.paths[name] = path

    def piece(self, name: str, offset: tuple[int, ...], data: bytes, file: str) -> None:
        start = len(self.files.setdefault(file, b""))
        self.infos[index(name, offset)] = info(file, start, len(data))
        self.files[file] += data

    def set_info(self, key: str, offset: tuple[int, ...], value: object) -> None:
        self.infos[index(f"model.{key}", offset)] = value

    def metadata(self) -> bytes:
        fields = {"state_dict_metadata": self.entries, "planner_data": self.paths}
        return forge.pickled(
            instance(f"{_DCP}.Metadata", **fields, storage_data=self.infos), protocol=4
        )

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / ".metadata").write_bytes(self.metadata())
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


Change = Callable[[Plan], object]
