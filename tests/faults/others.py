"""Owns the cases of the other containers: legacy torch files, plain pickles, tar, DCP, programs.

Its input is `archives` and `forge`.
"""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable

import numpy as np

from . import archives, forge
from .archives import Change, Plan, legacy_file, member, nested, old_file, raw_file, tar_bytes
from .cases import BAD, EITHER, Site, add, add_file, torch_file, write_good
from .forge import Code, call, push

KEY = "head.weight"
GOOD = {"legacy": legacy_file, "raw": raw_file, "old-tar": old_file}


def system(site: Site) -> Code:
    return call("os.system", site.touch)


def nemo(data: bytes, *more: bytes) -> bytes:
    return tar_bytes(member("model_config.yaml", b"a: 1\n"), *more, member("weights.ckpt", data))


# --- controls, and every region cut off -----------------------------------------------------------

for name, make in GOOD.items():
    add_file("control", name, lambda _, m=make: m(3), exits=0)
add_file("control", "nemo", lambda _: nemo(torch_file(3)), exits=0)
for name, make in {**GOOD, "nemo": lambda step: nemo(torch_file(step))}.items():
    for tenth in (1, 3, 5, 7, 9):
        add_file(
            "cut",
            f"{name}-{tenth}",
            lambda _, m=make, t=tenth: (d := m(3).rstrip(b"\0"))[: len(d) * t // 10],
        )
    if name in ("legacy", "raw"):
        add_file("cut", f"{name}-last-byte", lambda _, m=make: m(3)[:-1])
        add_file("cut", f"{name}-one-more", lambda _, m=make: m(3) + b"\0")
        add_file("cut", f"{name}-twice", lambda _, m=make: m(3) * 2)


# --- legacy ---------------------------------------------------------------------------------------

LEGACY: dict[str, Callable[[Site], bytes]] = {
    f"hostile-{part}": lambda s, p=part: legacy_file(3, **{p: system(s)})  # type: ignore[misc]
    for part in ("protocol", "sys_info", "keys", "root", "extra")
}
LEGACY["hostile-behind-the-magic"] = lambda s: legacy_file(
    3, magic=Code(push(archives.MAGIC) + system(s) + b"0")
)
for name, make in LEGACY.items():
    add_file("legacy", name, make, "hostile", "os.system|posix.system")

NUMELS = {
    "negative": -48,
    "huge": 1 << 60,
    "overlapping": 47,
    "next": 60,
    "zero": 0,
    "min": -(2**63),
}
for name, numel in NUMELS.items():
    add_file("legacy", f"numel-{name}", lambda _, n=numel: legacy_file(3, numels={"0": n}))
ALL = [str(i) for i in range(9)]
KEYS: dict[str, object] = {
    "missing": ALL[:-1],
    "unknown": [*ALL, "77"],
    "twice": [*ALL[:-1], "0"],
    "numbers": list(range(9)),
    "none": None,
    "text": "012345678",
    "empty": [],
    "lists": [[k] for k in ALL],
}
for name, keys in KEYS.items():
    add_file(
        "legacy",
        f"keys-{name}",
        lambda _, k=keys: legacy_file(3, keys=push(None) if k is None else k),
    )
FIELDS: dict[str, dict[str, object]] = {
    "big-endian": {"sys_info": {**archives.SYS_INFO, "little_endian": False}},
    "protocol": {"protocol": 1002},
    "root-missing": {"root": push(None)},
}
for name, fields in FIELDS.items():
    add_file("legacy", name, lambda _, f=fields: legacy_file(3, **f))
LEGACY_BOMBS: dict[str, Callable[[], Code]] = {
    "opcodes": lambda: Code(b"N0" * 3_000_000 + b"N"),
    "tuples": lambda: Code(b"N" + b"2\x86" * 64),
    "deep": lambda: Code(b"N" + b"\x85" * 100_000),
    "keys": lambda: Code(
        b"}(" + b"".join(push(i * (2**61 - 1)) + b"N" for i in range(40_000)) + b"u"
    ),
}
for name, bomb in LEGACY_BOMBS.items():
    add_file(
        "legacy-bomb", f"object-{name}", lambda _, b=bomb: legacy_file(3, extra=b()), exits=EITHER
    )
    add_file("legacy-bomb", f"keys-{name}", lambda _, b=bomb: legacy_file(3, keys=b()))


# --- plain pickles ----------------------------------------------------------------------------------

SHAPE, STRIDE = (3, 16), (16, 1)
WEIGHT = forge.good_arrays(3)[KEY]


def raw_tensor(data: bytes, shape: object = SHAPE) -> bytes:
    return raw_file(3, {KEY: forge.tensor(nested(data), shape, STRIDE)})


NESTED: dict[str, Callable[[Site], bytes]] = {
    part: lambda s, p=part: archives.nested_storage(WEIGHT, **{p: system(s)})  # type: ignore[misc]
    for part in ("magic", "protocol", "sys_info", "keys")
}
NESTED["object"] = lambda s: archives.legacy_bytes(system(s), {})
NESTED["twice"] = lambda s: archives.legacy_bytes(nested(forge.pickled(system(s))), {})
for name, make in NESTED.items():
    sure = name != "twice"  # nobody looks into a file in a file in a pickle: it is refused for that
    add_file(
        "raw",
        f"hostile-nested-{name}",
        lambda s, m=make: raw_tensor(m(s)),
        *(("hostile", "os.system|posix.system") if sure else (KEY,)),
    )
add_file("raw", "hostile", lambda s: raw_file(3, extra=system(s)), "hostile", "os.system")
RAW: dict[str, Callable[[], bytes]] = {
    "nested-cut": lambda: raw_tensor(archives.nested_storage(WEIGHT)[:-9]),
    "nested-empty": lambda: raw_tensor(b""),
    "nested-zip": lambda: raw_tensor(torch_file(3)),
    "nested-numel": lambda: raw_tensor(archives.nested_storage(WEIGHT, numels={"0": 1 << 40})),
    "nested-short": lambda: raw_tensor(archives.nested_storage(WEIGHT[:2])),
    "nested-no-storage": lambda: raw_tensor(archives.legacy_bytes(push(7), {})),
    "giant": lambda: raw_tensor(archives.nested_storage(WEIGHT), (1 << 40, 1)),
}
for name, make_raw in RAW.items():
    add_file("raw", name, lambda _, m=make_raw: m())


def nested_bomb() -> Code:
    """A megabyte of opcodes in a storage that is asked for a thousand times."""
    data = archives.legacy_bytes(Code(b"N0" * 500_000 + b"N"), {})
    head = forge.named("torch.storage._load_from_bytes") + b"q\0000" + push(data) + b"q\1000"
    return Code(
        head.replace(b"q\0000", b"q\x000").replace(b"q\1000", b"q\x010")
        + b"("
        + b"h\0h\1\x85R" * 1000
        + b"l"
    )


add_file("raw", "bomb-nested", lambda _: raw_file(3, extra=nested_bomb()), exits=EITHER)


# --- tar ------------------------------------------------------------------------------------------------

W = torch_file(3)
TARS: dict[str, tuple[Callable[[], bytes], int | tuple[int, ...]]] = {
    "none": (lambda: tar_bytes(member("readme.txt", b"hello")), BAD),
    "empty": (tar_bytes, BAD),
    "two-checkpoints": (lambda: nemo(W, member("other.pt", W)), BAD),
    "member-twice": (lambda: nemo(W, member("weights.ckpt", W)), BAD),
    "member-twice-by-dot": (lambda: nemo(W, member("./weights.ckpt", W)), BAD),
    "size-past-end": (lambda: tar_bytes(member("w.ckpt", W, size=1 << 30)), BAD),
    "size-negative": (lambda: tar_bytes(member("w.ckpt", W, size=b"\xff" * 12)), BAD),
    "size-no-number": (lambda: tar_bytes(member("w.ckpt", W, size=b"forty")), BAD),
    "size-zero": (lambda: tar_bytes(member("w.ckpt", b"")), BAD),
    "size-short": (lambda: tar_bytes(member("w.ckpt", W, size=len(W) - 1024)), BAD),
    "checksum": (lambda: nemo(W, member("x.txt", b"x", checksum=5)), BAD),
    "symbolic-link": (lambda: tar_bytes(member("w.ckpt", kind=b"2", link="/etc/passwd")), BAD),
    "hard-link": (lambda: tar_bytes(member("w.ckpt", kind=b"1", link="../../secret")), BAD),
    "device": (lambda: tar_bytes(member("w.ckpt", kind=b"3")), BAD),
    "fifo": (lambda: tar_bytes(member("w.ckpt", kind=b"6")), BAD),
    "absolute-name": (lambda: nemo(W, member("/etc/cron.d/evil", b"x")), 0),
    "name-leads-up": (lambda: nemo(W, member("../../../evil.txt", b"x")), 0),
    "checkpoint-leads-up": (lambda: tar_bytes(member("../../w.ckpt", W)), 0),
    "name-not-utf8": (lambda: nemo(W, member(b"\xff\xfe\x1b[2J", b"x")), 0),
    "sparse": (
        lambda: tar_bytes(archives.pax(GNU__sparse__size="99999999999"), member("w.ckpt", W)),
        BAD,
    ),
    "sparse-map": (
        lambda: tar_bytes(archives.pax(GNU__sparse__map="0,x,5"), member("w.ckpt", W)),
        BAD,
    ),
    "pax-size": (lambda: tar_bytes(archives.pax(size=str(1 << 60)), member("w.ckpt", W)), BAD),
    "pax-size-text": (lambda: tar_bytes(archives.pax(size="x"), member("w.ckpt", W)), BAD),
    "pax-huge": (
        lambda: tar_bytes(member("x", b"9" * (3 << 20), kind=b"x"), member("w.ckpt", W)),
        BAD,
    ),
    "pax-chain": (
        lambda: tar_bytes(*[member("x", b"y\0", kind=b"L")] * 3000, member("w.ckpt", W)),
        BAD,
    ),
    "many-members": (lambda: nemo(W, *[member("x", kind=b"5")] * 20_000), BAD),
    "folders-going-back": (
        lambda: tar_bytes(member("x", kind=b"5", size=b"\xff" * 11 + b"\0")),
        BAD,
    ),
    "tar-in-tar": (lambda: nemo(nemo(W)), BAD),
    "gzip": (lambda: gzip.compress(nemo(W), mtime=0), BAD),
    "pickled-text": (lambda: nemo(b"hello" * 300), BAD),
}
for name, (make_tar, exits) in TARS.items():
    mention = ("gunzip|tar -xzf",) if name == "gzip" else ()
    add_file("tar", name, lambda _, m=make_tar: m(), *mention, exits=exits)
for where in ("weights", "second"):
    add_file(
        "tar",
        f"hostile-{where}",
        lambda s, w=where: (
            nemo(torch_file(3, extra=system(s)))
            if w == "weights"
            else nemo(legacy_file(3, extra=system(s)))
        ),
        "hostile",
    )


def sparse_pax(site: Site) -> None:
    """A header of 40 GB, of which nothing takes room on disk."""
    write_good(site)
    path = site.folder / "snap_3.pt"
    path.write_bytes(member("x", kind=b"x", size=b"\x80" + (40 << 30).to_bytes(11, "big")))
    os.truncate(path, 50 << 30)


add("tar", "pax-of-a-sparse-giant", sparse_pax, "snap_3.pt")

for part in ("storages", "tensors", "pickle"):
    add_file(
        "old-tar",
        f"hostile-{part}",
        lambda s, p=part: old_file(3, **{p: forge.pickled(system(s))}),
        "hostile",
        "os.system|posix.system",
    )
    add_file("old-tar", f"no-{part}", lambda _, p=part: old_file(3, **{p: None}))
    add_file("old-tar", f"empty-{part}", lambda _, p=part: old_file(3, **{p: b""}))
    add_file(
        "old-tar",
        f"bomb-{part}",
        lambda _, p=part: old_file(3, **{p: forge.pickled(Code(b"N" + b"2\x86" * 64))}),
    )
ROWS: dict[str, bytes] = {
    "shape-negative": archives.tensor_row(108, 8, (-3, 16)),
    "shape-huge": archives.tensor_row(108, 8, (1 << 40, 1 << 22), (0, 0)),
    "offset-past-end": archives.tensor_row(108, 8, SHAPE, offset=1),
    "offset-negative": archives.tensor_row(108, 8, SHAPE, offset=-1),
    "stride": archives.tensor_row(108, 8, SHAPE, (1 << 61, 1)),
    "dimensions": archives.tensor_row(108, 8, SHAPE, dimensions=-1),
    "storage": archives.tensor_row(108, 99, SHAPE),
}
for name, row in ROWS.items():
    rows = [
        archives.tensor_row(101 + i, 1 + i, a.shape)
        for i, a in enumerate(forge.good_arrays(3).values())
    ]
    data = archives.table([*rows[:7], row, rows[8]])
    add_file("old-tar", f"tensor-{name}", lambda _, d=data: old_file(3, tensors=d))


# --- distributed checkpoints ----------------------------------------------------------------------------


def add_dcp(name: str, change: Change, *mention: str, exits: int | tuple[int, ...] = BAD) -> None:
    def build(site: Site) -> None:
        for step in (1, 2, 3):
            plan = Plan(step)
            if step == 3:
                change(plan)
            plan.write(site.folder / f"checkpoint-{step}")

    named = ("checkpoint-3", *mention) if exits == BAD else ()
    add("dcp" if exits == BAD else "control", name, build, *named, exits=exits)


FILE, BLOB = "__0_0.distcp", archives.blob_of(WEIGHT[:2])


def lies_in(path: object, offset: object = 0, length: object = len(BLOB)) -> Change:
    """The first piece of `head.weight` lies elsewhere."""
    return lambda plan: plan.set_info(KEY, (0, 0), archives.info(path, offset, length))


def pieces(*parts: tuple[tuple[int, ...], np.ndarray]) -> Change:
    """`head.weight` is made of these pieces."""

    def change(plan: Plan) -> None:
        name = f"model.{KEY}"
        for offset, array in parts:
            plan.piece(name, offset, archives.blob_of(array), FILE)
        chunks = [archives.chunk(offset, array.shape) for offset, array in parts]
        plan.entries[name] = archives.tensor_entry(SHAPE, chunks)

    return change


def entry(shape: object, chunks: object) -> Change:
    shape_ = shape if isinstance(shape, tuple) else (shape,)
    return lambda plan: plan.entries.update({f"model.{KEY}": archives.tensor_entry(shape_, chunks)})


def blob(data: Callable[[Site], bytes] | bytes) -> Change:
    """The first piece of `head.weight` is other bytes."""
    return lambda plan: plan.piece(f"model.{KEY}", (0, 0), data, FILE)  # type: ignore[arg-type]


def transformed(plan: Plan) -> None:
    info = archives.info(FILE, 0, len(BLOB), transform_descriptors=["zstd"])
    plan.set_info(KEY, (0, 0), info)


def truncated(plan: Plan) -> None:
    plan.files[FILE] = plan.files[FILE][:-40]


TUPLES = Code(b"N" + b"2\x86" * 64)
HALF = archives.chunk((0, 0), (2, 16))
CHANGES: dict[str, Change] = {
    "path-up": lies_in("../checkpoint-1/" + FILE),
    "path-absolute": lies_in("/etc/hostname"),
    "path-backslash": lies_in("..\\checkpoint-1\\" + FILE),
    "path-in-a-folder": lies_in("sub/" + FILE),
    "path-dots": lies_in(".."),
    "path-empty": lies_in(""),
    "path-nul": lies_in("a\0b"),
    "path-long": lies_in("x" * 300),
    "path-surrogate": lies_in("\ud800"),
    "path-number": lies_in(7),
    "path-bomb": lies_in(TUPLES),
    "path-missing": lies_in("__9_9.distcp"),
    "path-metadata": lies_in(".metadata", 0, 50),
    "offset-past-end": lies_in(FILE, 1 << 40),
    "offset-negative": lies_in(FILE, -1),
    "offset-text": lies_in(FILE, "0"),
    "length-past-end": lies_in(FILE, 0, 1 << 40),
    "length-negative": lies_in(FILE, 0, -1),
    "length-zero": lies_in(FILE, 0, 0),
    "length-text": lies_in(FILE, 0, "x"),
    "length-short": lies_in(FILE, 0, len(BLOB) - 10),
    "transformed": transformed,
    "truncated-file": truncated,
    "no-file": lambda plan: plan.files.pop(FILE),
    "empty-file": lambda plan: plan.files.update({FILE: b""}),
    "pieces-overlap": pieces(((0, 0), WEIGHT[:2]), ((1, 0), WEIGHT[1:])),
    "pieces-overlap-and-hole": pieces(((0, 0), WEIGHT[:2]), ((1, 0), WEIGHT[1:2])),
    "pieces-missing": pieces(((0, 0), WEIGHT[:2])),
    "pieces-none": pieces(),
    "pieces-outside": pieces(((0, 0), WEIGHT[:2]), ((7, 0), WEIGHT[2:])),
    "pieces-dtypes": pieces(((0, 0), WEIGHT[:2]), ((2, 0), WEIGHT[2:].astype(np.float64))),
    "pieces-sizes": pieces(((0, 0), WEIGHT[:2]), ((2, 0), WEIGHT[1:])),
    "pieces-unlisted": lambda plan: plan.infos.pop(archives.index(f"model.{KEY}", (0, 0))),
    "shape-negative": entry((-3, 16), [HALF]),
    "shape-huge": entry((1 << 62, 16), [HALF]),
    "shape-text": entry("x", [HALF]),
    "chunks-number": entry(SHAPE, 5),
    "chunks-of-text": entry(SHAPE, ["x"]),
    "chunks-flat": entry(SHAPE, [archives.chunk((0,), (48,))]),
    "blob-number": blob(forge.pickled(5)),
    "blob-text": blob(b"hello world"),
    "blob-tar": blob(nemo(BLOB)),
    "blob-two-tensors": blob(torch_file(3)),
    "entries-list": lambda plan: setattr(plan, "entries", {"model.x": 5}),
    "place-twice": lambda plan: plan.paths.update({f"model.{KEY}": ("model", "head.bias")}),
    "place-in-a-tensor": lambda plan: plan.paths.update(
        {f"model.{KEY}": ("model", "head.bias", "x")}
    ),
    "place-bomb": lambda plan: plan.paths.update({f"model.{KEY}": (TUPLES, 1)}),
    "index-bomb": lambda plan: plan.infos.update({archives.index(TUPLES): 5}),
    "index-offset": lambda plan: plan.infos.update({archives.index("x", 5): 5}),
    "info-number": lambda plan: plan.set_info(KEY, (0, 0), 5),
}
for name, change in CHANGES.items():
    add_dcp(name, change)
add_dcp("dcp", lambda _: None, exits=0)


def add_dcp_site(name: str, change: Callable[[Plan, Site], object], *mention: str) -> None:
    """Cases that need the site, or files beside what the plan writes."""

    def build(site: Site) -> None:
        for step in (1, 2, 3):
            plan = Plan(step)
            plan.write(site.folder / f"checkpoint-{step}")
        change(plan, site)

    add("dcp", name, build, "checkpoint-3", *mention)


def rewritten(change: Callable[[Plan, Site], object]) -> Callable[[Plan, Site], object]:
    def apply(plan: Plan, site: Site) -> None:
        change(plan, site)
        plan.write(site.folder / "checkpoint-3")

    return apply


def metadata(make: Callable[[Site, bytes], bytes]) -> Callable[[Plan, Site], object]:
    return lambda plan, site: (site.folder / "checkpoint-3" / ".metadata").write_bytes(
        make(site, plan.metadata())
    )


def link_out(_: Plan, site: Site) -> None:
    path = site.folder / "checkpoint-3" / FILE
    path.rename(site.root / "outside.distcp")
    path.symlink_to("../../outside.distcp")


def fifo(_: Plan, site: Site) -> None:
    path = site.folder / "checkpoint-3" / FILE
    path.unlink()
    os.mkfifo(path)


HOSTILE = ("hostile", "os.system|posix.system")
add_dcp_site("hostile-metadata", metadata(lambda s, _: forge.pickled(system(s))), *HOSTILE)
add_dcp_site(
    "hostile-entry", rewritten(lambda p, s: p.entries.update({"model.x": system(s)})), *HOSTILE
)
add_dcp_site("hostile-info", rewritten(lambda p, s: p.set_info(KEY, (0, 0), system(s))), *HOSTILE)
add_dcp_site(
    "hostile-blob",
    rewritten(lambda p, s: blob(forge.torch_bytes(forge.pickled(system(s)), {}))(p)),
    *HOSTILE,
)
add_dcp_site(
    "hostile-legacy-blob",
    rewritten(lambda p, s: blob(archives.legacy_bytes(system(s), {}))(p)),
    *HOSTILE,
)
add_dcp_site("link-out", link_out, FILE)
add_dcp_site("fifo", fifo, FILE)
METADATA: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda d: d[: len(d) // 2],
    "last-byte": lambda d: d[:-1],
    "zeros": lambda d: b"\0" * len(d),
    "number": lambda _: forge.pickled(5),
    "text": lambda _: b"not a pickle",
    "bomb": lambda _: forge.pickled(TUPLES),
    "deep": lambda _: forge.pickled(Code(b"N" + b"\x85" * 100_000)),
    "bytes": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62),
}
for name, rewrite in METADATA.items():
    add_dcp_site(f"metadata-{name}", metadata(lambda _, d, r=rewrite: r(d)))


# --- programs ------------------------------------------------------------------------------------------

PROGRAMS: dict[str, tuple[list[forge.Record], str]] = {
    "torchscript": (
        [
            forge.Record("m/data.pkl", forge.pickled({})),
            forge.Record("m/code/__torch__.py", b"class A: pass\n" * 20, method=8),
            forge.Record("m/constants.pkl", forge.pickled(())),
        ],
        "torch.jit.load",
    ),
    "torch.export": (
        [
            forge.Record("e/models/model.json", b"{}"),
            forge.Record("e/archive_format", b"pt2"),
            forge.Record("e/data/weights/weight_0", b"\0" * 16),
        ],
        "torch.export.load",
    ),
    "torch.export-of-2023": (
        [forge.Record("version", b"1"), forge.Record("serialized_exported_program.json", b"{}")],
        "torch.export.load",
    ),
}
for name, (records, hint) in PROGRAMS.items():
    add_file("program", name, lambda _, r=records: forge.zip_bytes(r), hint)
    add_file(
        "program", f"{name}-cut", lambda _, r=records: (d := forge.zip_bytes(r))[: len(d) * 2 // 3]
    )
