"""Owns the container cases: zip records, safetensors headers, sharded indexes, crash leftovers.

Its input is `forge` and the good snapshots of `cases`.
"""

from __future__ import annotations

import gzip
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from . import forge
from .cases import BAD, EITHER, Site, add, add_file, good, torch_file
from .forge import Edit, Record

# --- zip containers ----------------------------------------------------------------------------


def without(name: str) -> Edit:
    return lambda records: [r for r in records if not r.name.endswith(name)]


def plus(*extra: Record) -> Edit:
    return lambda records: [*records, *extra]


def flip_first(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


_EMPTY_END = b"PK\5\6" + b"\0" * 18
ZIPS: dict[str, tuple[Edit, dict[str, object]]] = {
    "deflated-pickle": (forge.change("data.pkl", method=8), {}),
    "deflated-tensor": (forge.change("data/0", method=8), {}),
    "deflated-bomb": (forge.change("data/0", method=8, data=lambda _: b"\0" * 60_000_000), {}),
    "unknown-method": (forge.change("data/0", method=99), {}),
    "record-twice": (plus(Record("archive/data/0", b"\0" * 192)), {}),
    "pickle-twice": (plus(Record("archive/data.pkl", forge.pickled({}))), {}),
    "pickle-in-two-folders": (plus(Record("other/data.pkl", forge.pickled({}))), {}),
    "overlap-same-offset": (forge.change("data/1", offset=0), {}),
    "overlap-next-record": (forge.change("data/0", size=400, stored_size=400), {}),
    "gap": (forge.change("data/1", before=b"EVIL" * 16), {}),
    "gap-hidden-record": (forge.change("serialization_id", listed=False), {}),
    "gap-before-directory": ((list), {"gap": b"EVIL" * 16}),
    "prefix": (forge.change("data.pkl", before=b"#!/bin/sh\nexit\n"), {}),
    "crc-of-pickle": (forge.change("data.pkl", crc=1), {}),
    "crc-of-tensor": (forge.change("data/0", crc=1), {}),
    "encrypted": (forge.change("data/0", flags=0x809), {}),
    "local-name": (forge.change("data/0", local_name="archive/data/9"), {}),
    "offset-past-end": (forge.change("data/0", offset=1 << 30), {}),
    "size-past-end": (forge.change("data/0", size=1 << 30, stored_size=1 << 30), {}),
    "zip64-extra": (
        forge.change(
            "data/0",
            size=2**32 - 1,
            stored_size=2**32 - 1,
            extra=struct.pack("<2H2Q", 1, 16, 1 << 62, 1 << 62),
        ),
        {},
    ),
    "zip64-extra-missing": (forge.change("data/0", offset=2**32 - 1), {}),
    "no-pickle": (without("data.pkl"), {}),
    "no-storage": (without("data/0"), {}),
    "storage-short": (forge.change("data/0", data=lambda d: d[:-4]), {}),
    "storage-long": (forge.change("data/0", data=lambda d: d + b"\0" * 4), {}),
    "storage-empty": (forge.change("data/0", data=b""), {}),
    "byteorder-big": (forge.change("byteorder", data=b"big"), {}),
    "byteorder-unknown": (forge.change("byteorder", data=b"middle"), {}),
    "count-high": ((list), {"count": 99}),
    "count-low": ((list), {"count": 2}),
    "directory-size": ((list), {"directory_size": 7}),
    "directory-offset": ((list), {"directory_offset": 3}),
    "directory-past-end": ((list), {"directory_offset": 1 << 31}),
    "zip64-count": ((list), {"zip64_count": 1 << 63}),
    "zip64-offset": ((list), {"count": 0xFFFF, "zip64_offset": 1 << 63}),
    "zip64-locator": ((list), {"count": 0xFFFF, "locator_offset": 1 << 62}),
    "after-the-end": ((list), {"comment": b"garbage" * 9, "comment_size": 0}),
    "second-end": ((list), {"comment": _EMPTY_END}),
}
ZIP_KEYS = {"crc-of-tensor", "no-storage", "storage-short", "storage-long", "storage-empty"}
for name, (edit, fields) in ZIPS.items():
    add_file(
        "zip",
        name,
        lambda _, e=edit, f=fields: torch_file(3, edit=e, zipped=f),
        *(("conv.weight|data/0",) if name in ZIP_KEYS else ()),
    )
add_file("zip", "comment", lambda _: torch_file(3, zipped={"comment": b"hello"}), exits=EITHER)
add_file(
    "zip",
    "path-in-name",
    lambda _: torch_file(3, edit=plus(Record("../../etc/passwd", b"x"))),
    exits=EITHER,
)


# --- what a crash leaves behind -----------------------------------------------------------------

_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 99\n"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "three-bytes": lambda b: b[:3],
    "tenth": lambda b: b[: len(b) // 10],
    "half": lambda b: b[: len(b) // 2],
    "nine-tenths": lambda b: b[: len(b) * 9 // 10],
    "last-byte": lambda b: b[:-1],
    "zeros": lambda b: b"\0" * len(b),
    "zeros-at-end": lambda b: b[: len(b) // 2] + b"\0" * (len(b) - len(b) // 2),
    "zeros-at-start": lambda b: b"\0" * 512 + b[512:],
    "twice": lambda b: b + b,
    "half-then-whole": lambda b: b[: len(b) // 2] + b,
    "gzip": lambda b: gzip.compress(b, mtime=0),
    "git-lfs-pointer": lambda _: _LFS,
    "error-page": lambda _: b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
}
for suffix in (".pt", ".safetensors"):
    for name, damage in DAMAGE.items():
        add_file(
            "damage",
            f"{name}{suffix}",
            lambda _, d=damage, s=suffix: d(good(s, 3)),
            suffix=suffix,
        )


def flipped(data: bytes, start: int, stop: int, seed: int) -> bytes:
    """`data` with one bit of [start, stop) inverted."""
    at = random.Random(seed).randrange(start * 8, stop * 8)
    raw = bytearray(data)
    raw[at // 8] ^= 1 << at % 8
    return bytes(raw)


def region(name: str) -> tuple[int, int]:
    """Where a part of the third good snapshot lies."""
    if name == "header":
        return 0, 8 + struct.unpack_from("<Q", good(".safetensors", 3))[0]
    data = good(".pt", 3)
    pickle = 30 + sum(struct.unpack_from("<2H", data, 26))
    tensor = data.index(forge.good_arrays(3)["conv.weight"].tobytes())
    directory, trailer = data.index(b"PK\1\2"), data.index(b"PK\6\6")
    return {
        "local-header": (0, 30),
        "pickle": (pickle, pickle + 600),
        "tensor": (tensor, tensor + 192),
        "directory": (directory, trailer),
        "trailer": (trailer, len(data)),
    }[name]


SURE = {"pickle", "tensor"}  # covered by a CRC; elsewhere some bits mean nothing
for name in ("local-header", "pickle", "tensor", "directory", "trailer", "header"):
    suffix = ".safetensors" if name == "header" else ".pt"
    for seed in range(3):
        add_file(
            "flip",
            f"{name}-{seed}",
            lambda _, n=name, s=suffix, i=seed: flipped(good(s, 3), *region(n), i),
            suffix=suffix,
            exits=BAD if name in SURE else EITHER,
        )


# --- safetensors headers -----------------------------------------------------------------------

KEY = "conv.weight"  # the first tensor: 4 x 3 x 2 x 2 float32, bytes 0 to 192
Header = dict[str, object]


def entry(**changes: object) -> Callable[[Header, bytes], bytes]:
    """Overrides fields of `KEY`'s header entry."""

    def rewrite(header: Header, body: bytes) -> bytes:
        fields = {**header[KEY], **changes}  # type: ignore[dict-item]
        return forge.safetensors_bytes({**header, KEY: fields}, body)

    return rewrite


def raw(text: bytes, **fields: int) -> Callable[[Header, bytes], bytes]:
    """Replaces the whole header."""
    return lambda _, body: forge.safetensors_bytes(text, body, **fields)


def length(value: int) -> Callable[[Header, bytes], bytes]:
    """Replaces the stated header length."""
    return lambda header, body: forge.safetensors_bytes(header, body, length=value)


def spliced(find: str, replacement: str) -> Callable[[Header, bytes], bytes]:
    """Replaces text in the header's JSON."""

    def rewrite(header: Header, body: bytes) -> bytes:
        text = json.dumps(header)
        assert find in text, find
        return forge.safetensors_bytes(text.replace(find, replacement, 1).encode(), body)

    return rewrite


ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS: dict[str, Callable[[Header, bytes], bytes]] = {
    "length-zero": length(0),
    "length-past-end": length(1 << 20),
    "length-2^63": length(1 << 63),
    "length-max": length((1 << 64) - 1),
    "length-short": length(16),
    "not-json": raw(b"{not json at all"),
    "not-an-object": raw(b"[1, 2, 3]"),
    "string": raw(b'"conv.weight"'),
    "null": raw(b"null"),
    "empty-object-with-body": raw(b"{}"),
    "blank": raw(b" " * 64),
    "not-utf8": raw(b'{"conv\xff": ' + ONE.encode() + b"}"),
    "utf16": raw("{}".encode("utf-16")),
    "deep": raw(b'{"a":' * 200_000 + b"1" + b"}" * 200_000),
    "deep-lists": raw(b"[" * 500_000),
    "nan": raw(b'{"conv.weight": NaN}'),
    "digits": raw(b'{"conv.weight": {"dtype": "F32", "shape": [' + b"9" * 50_000 + b"]}}"),
    "two-objects": lambda h, b: forge.safetensors_bytes(json.dumps(h).encode() + b"{}", b),
    "metadata-list": lambda h, b: forge.safetensors_bytes({"__metadata__": [1], **h}, b),
    "trailing-bytes": lambda h, b: forge.safetensors_bytes(h, b + b"\0" * 8),
    "body-short": lambda h, b: forge.safetensors_bytes(h, b[:-1]),
    "no-body": lambda h, _: forge.safetensors_bytes(h, b""),
}
ENTRIES: dict[str, Callable[[Header, bytes], bytes]] = {
    "key-twice": spliced("{", f'{{"{KEY}": {ONE}, '),
    "overlap": entry(data_offsets=[8, 200]),
    "hole": entry(shape=[47], data_offsets=[4, 192]),
    "offsets-past-end": entry(data_offsets=[1 << 20, (1 << 20) + 192]),
    "offsets-reversed": entry(data_offsets=[192, 0]),
    "offsets-negative": entry(data_offsets=[-192, 0]),
    "offsets-float": entry(data_offsets=[0.0, 192.0]),
    "offsets-bool": entry(data_offsets=[False, 192]),
    "offsets-text": entry(data_offsets=["0", "192"]),
    "offsets-three": entry(data_offsets=[0, 96, 192]),
    "offsets-2^64": entry(data_offsets=[1 << 64, (1 << 64) + 192]),
    "dtype-unknown": entry(dtype="F31"),
    "dtype-number": entry(dtype=32),
    "dtype-list": entry(dtype=["F32"]),
    "dtype-wider": entry(dtype="F64"),
    "shape-too-large": entry(shape=[4, 3, 2, 3]),
    "shape-negative": entry(shape=[-4, -3, 2, 2]),
    "shape-overflow": entry(shape=[1 << 63, 4, 3, 2, 2, 1 << 63]),
    "shape-wraps-to-zero": entry(shape=[1 << 32, 1 << 32, 48]),
    "shape-zero-times-huge": entry(shape=[0, 1 << 63], data_offsets=[0, 0]),
    "shape-float": entry(shape=[4.0, 3, 2, 2]),
    "shape-bool": entry(shape=[48, True]),
    "shape-text": entry(shape="48"),
    "shape-null": entry(shape=None),
    "shape-many": entry(shape=[48] + [1] * 2000),
    "entry-list": spliced('"conv.weight": {', '"conv.weight": [], "x": {'),
    "entry-without-shape": spliced('"shape": [4, 3, 2, 2], ', ""),
    "infinity": spliced('"shape": [4,', '"shape": [Infinity,'),
}
for group, table, mention in (("header", HEADERS, ()), ("entry", ENTRIES, (KEY,))):
    for name, rewrite in table.items():
        add_file(
            group,
            name,
            lambda _, r=rewrite: r(*forge.header_and_body(forge.good_arrays(3))),
            *mention,
            suffix=".safetensors",
        )


def many_tensors(_: Site) -> bytes:
    """A hundred thousand tensors, of which the last overlaps the first."""
    offsets = [[4 * i, 4 * i + 4] for i in range(99_999)] + [[0, 4]]
    fields = {"dtype": "F32", "shape": [1]}
    header = {f"t{i}": {**fields, "data_offsets": at} for i, at in enumerate(offsets)}
    return forge.safetensors_bytes(header, b"\0" * 4 * 99_999)


add_file("header", "100k-tensors", many_tensors, "t99999|t0", suffix=".safetensors")


# --- sharded indexes ---------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_sharded(folder: Path, step: int) -> dict[str, str]:
    """A sharded checkpoint; returns its weight map."""
    folder.mkdir()
    arrays = forge.good_arrays(step)
    weight_map = {key: SHARDS[i % 2] for i, key in enumerate(arrays)}
    for shard in SHARDS:
        part = {key: a for key, a in arrays.items() if weight_map[key] == shard}
        (folder / shard).write_bytes(forge.safetensors_state(part))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def move_shard(folder: Path, weight_map: dict[str, str], name: str) -> None:
    """Puts the second shard at `name`, and says so in the index."""
    (folder / SHARDS[1]).rename(folder / name)
    write_index(folder, {k: name if v == SHARDS[1] else v for k, v in weight_map.items()})


def link_outside(folder: Path, _: dict[str, str]) -> None:
    (folder / SHARDS[1]).rename(folder.parent.parent / "outside.safetensors")
    (folder / SHARDS[1]).symlink_to("../../outside.safetensors")


def outside(folder: Path, weight_map: dict[str, str]) -> None:
    move_shard(folder, weight_map, "../../outside.safetensors")


def absolute(folder: Path, weight_map: dict[str, str]) -> None:
    move_shard(folder, weight_map, str(folder.parent.parent / "outside.safetensors"))


def shard_folder(folder: Path, _: dict[str, str]) -> None:
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).mkdir()


def drop_tensor(folder: Path, _: dict[str, str]) -> None:
    (folder / SHARDS[0]).write_bytes(
        forge.safetensors_state({"bn.bias": forge.good_arrays(3)["bn.bias"]})
    )


Damage = Callable[[Path, dict[str, str]], object]
INDEXES: dict[str, tuple[Damage, str]] = {
    "traversal": (outside, "outside.safetensors"),
    "absolute-path": (absolute, "outside.safetensors"),
    "sibling-checkpoint": (
        lambda f, _: write_index(f, {KEY: f"../checkpoint-1/{SHARDS[0]}"}),
        "checkpoint-1",
    ),
    "link-outside": (link_outside, SHARDS[1]),
    "shard-missing": (lambda f, _: (f / SHARDS[1]).unlink(), SHARDS[1]),
    "shard-empty": (lambda f, _: (f / SHARDS[1]).write_bytes(b""), SHARDS[1]),
    "shard-is-a-folder": (shard_folder, SHARDS[1]),
    "shard-truncated": (
        lambda f, _: (f / SHARDS[1]).write_bytes((f / SHARDS[1]).read_bytes()[:-9]),
        SHARDS[1],
    ),
    "tensor-not-in-shard": (drop_tensor, f"{KEY}|{SHARDS[0]}"),
    "tensor-not-in-index": (
        lambda f, m: write_index(f, {k: v for k, v in m.items() if k != KEY}),
        f"{KEY}|{SHARDS[0]}",
    ),
    "not-json": (lambda f, _: (f / INDEX).write_text('{"weight_map": {'), INDEX),
    "empty": (lambda f, _: (f / INDEX).write_text(""), INDEX),
    "not-an-object": (lambda f, _: (f / INDEX).write_text("[]"), INDEX),
    "no-weight-map": (lambda f, _: (f / INDEX).write_text("{}"), INDEX),
    "weight-map-empty": (lambda f, _: write_index(f, {}), INDEX),
    "weight-map-list": (lambda f, _: write_index(f, ["a"]), INDEX),
    "shard-name-number": (lambda f, _: write_index(f, {KEY: 1}), INDEX),
    "shard-name-empty": (lambda f, _: write_index(f, {KEY: ""}), INDEX),
    "shard-name-nul": (lambda f, _: write_index(f, {KEY: "a\0b"}), INDEX),
    "deep": (lambda f, _: (f / INDEX).write_text('{"weight_map":' + "[" * 200_000), INDEX),
    "names-itself": (lambda f, _: write_index(f, {KEY: INDEX}), INDEX),
}


def add_index(name: str, damage: Damage | None, *mention: str, exits: int = BAD) -> None:
    def build(site: Site) -> None:
        maps = [write_sharded(site.folder / f"checkpoint-{step}", step) for step in (1, 2, 3)]
        if damage:
            damage(site.folder / "checkpoint-3", maps[-1])

    add("index" if damage else "control", name, build, *mention, exits=exits)


add_index("sharded", None, exits=0)
for name, (damage_index, mention_) in INDEXES.items():
    add_index(name, damage_index, "checkpoint-3", mention_)
