"""Owns the cases about what is inside: tensors, values, mismatches, what to take, odd names.

Its input is `forge` and the good snapshots of `cases`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from . import forge
from .cases import (
    BAD,
    EITHER,
    Site,
    add,
    add_file,
    good,
    safetensors_file,
    torch_file,
    write_good,
)
from .forge import Code, Record, call, named

# --- tensors that do not fit their bytes -------------------------------------------------------

KEY = "head.weight"
SHAPE, STRIDE = (3, 16), (16, 1)
X = forge.storage("x", 48)
OTHER = forge.tensor(forge.storage("x", 48), (48,), (1,))


def of(shape: object = SHAPE, stride: object = STRIDE, offset: object = 0, held: Code = X) -> Code:
    return forge.tensor(held, shape, stride, offset=offset)


TENSORS: dict[str, Code] = {
    "uninitialised": call("torch.FloatTensor", 48),
    "uninitialised-by-inst": forge.inst("torch.FloatTensor", 48),
    "uninitialised-storage": of(held=call("torch.FloatStorage", 48)),
    "stride-0-giant": of((1 << 40,), (0,)),
    "overlapping-giant": of((1 << 20, 1 << 20), (0, 0)),
    "offset-past-end": of(offset=1),
    "offset-huge": of(offset=1 << 62),
    "offset-negative": of(offset=-1),
    "offset-float": of(offset=0.0),
    "stride-negative": of(stride=(-16, 1)),
    "stride-too-large": of(stride=(17, 1)),
    "stride-missing": of(stride=(1,)),
    "shape-negative": of((-3, 16)),
    "shape-overflow": of((1 << 62, 16)),
    "shape-zero-times-huge": of((0, 1 << 63)),
    "shape-bool": of((True, 48), (48, 1)),
    "shape-float": of((3.0, 16)),
    "shape-text": of("48"),
    "shape-a-tensor": of((OTHER, 16)),
    "shape-many": of((48,) + (1,) * 1000, (1,) * 1001),
    "numel-huge": of(held=forge.storage("x", 1 << 60)),
    "numel-negative": of(held=forge.storage("x", -48)),
    "numel-text": of(held=forge.storage("x", "48")),
    "numel-wrong": of(held=forge.storage("x", 47)),
    "storage-missing": of(held=forge.storage("nowhere", 48)),
    "storage-path": of(held=forge.storage("../../../../etc/passwd", 48)),
    "storage-key-number": of(held=forge.storage(7, 48)),
    "storage-kind-unknown": of(held=forge.storage("x", 48, kind="torch.FooStorage")),
    "storage-kind-text": of(held=forge.storage("x", 48, kind=forge.push("FloatStorage"))),
    "storage-kind-wider": of(held=forge.storage("x", 48, kind="torch.DoubleStorage")),
    "storage-not-one": of(held=forge.push("x")),
    "persistent-id-short": of(held=forge.persistent(("storage", "x"))),
    "persistent-id-tag": of(
        held=forge.persistent(("module", named("torch.FloatStorage"), "x", "cpu", 48))
    ),
    "rebuild-too-few": call("torch._utils._rebuild_tensor_v2", X),
    "rebuild-no-tensor": call("torch._utils._rebuild_parameter", 5, False, {}),
    "sparse": call(
        "torch._utils._rebuild_sparse_tensor",
        named("torch.sparse_coo"),
        (OTHER, OTHER, SHAPE, True),
    ),
    "sparse-bad-indices": call(
        "torch._utils._rebuild_sparse_tensor",
        named("torch.sparse_coo"),
        (of((2, 3), (3, 1), 0, forge.storage("1", 4)), OTHER, (1 << 40, 1 << 40), None),
    ),
    "quantised": call(
        "torch._utils._rebuild_qtensor",
        forge.storage("x", 48, kind="torch.QInt8Storage"),
        *(0, SHAPE, STRIDE, (named("torch.per_tensor_affine"), 0.1, 0), False),
        call("collections.OrderedDict"),
    ),
    "meta": call(
        "torch._utils._rebuild_meta_tensor_no_storage", named("torch.float32"), SHAPE, STRIDE, False
    ),
    "wrapper-subclass": call(
        "torch._utils._rebuild_wrapper_subclass",
        named("torch.distributed.tensor.DTensor"),
        *(named("torch.float32"), SHAPE, STRIDE, 0, named("torch.strided"), "cpu", False),
    ),
    "none": forge.push(None),
    "a-number": forge.push(1.5),
}
for name, code in TENSORS.items():
    data = b"\0" * 192
    add_file(
        "tensor",
        name,
        lambda _, c=code, d=data: torch_file(
            3, {KEY: c}, edit=lambda records: [*records, Record("archive/data/x", d)]
        ),
        KEY,
    )


# --- values that poison an average -------------------------------------------------------------


def with_value(key: str, value: float, dtype: str = "float32") -> Callable[[int], forge.Arrays]:
    """One element of `key` replaced, in the dtype given, for the step given."""

    def arrays(step: int) -> forge.Arrays:
        array = forge.good_arrays(step)[key].astype(dtype)
        if step == BAD_STEP:
            array.reshape(-1)[-1] = value
        return {key: array}

    return arrays


BAD_STEP = 3
VALUES: dict[str, tuple[str, float, str]] = {
    "nan": ("conv.weight", np.nan, "float32"),
    "inf": ("head.bias", np.inf, "float32"),
    "minus-inf": ("bn.running_mean", -np.inf, "float32"),
    "nan-half": ("conv.weight", np.nan, "float16"),
    "inf-double": ("head.weight", np.inf, "float64"),
    "nan-complex": ("head.bias", np.nan, "complex64"),
    "negative-variance": ("bn.running_var", -0.25, "float32"),
    "nan-variance": ("bn.running_var", np.nan, "float32"),
}
for name, (key, number, dtype) in VALUES.items():
    for suffix in (".pt", ".safetensors"):
        arrays_of = with_value(key, number, dtype)

        def build(
            site: Site, a: Callable[[int], forge.Arrays] = arrays_of, s: str = suffix
        ) -> None:
            for step in (1, 2, 3):
                write = torch_file if s == ".pt" else safetensors_file
                (site.folder / f"snap_{step}{s}").write_bytes(write(step, a(step)))

        add("value", f"{name}{suffix}", build, f"snap_3{suffix}", key)


# --- snapshots that do not belong together -----------------------------------------------------

CLASSIFIER = {f"layers.{i}.weight": np.ones((2, 2), np.float32) for i in range(4)}
MISMATCHES: dict[str, tuple[Mapping[str, object], str]] = {
    "key-more": ({"head.scale": np.ones(3, np.float32)}, "head.scale"),
    "key-missing": ({"head.bias": None}, "head.bias"),
    "shape": ({"head.weight": np.ones((5, 16), np.float32)}, "head.weight"),
    "shape-transposed": ({"head.weight": np.ones((16, 3), np.float32)}, "head.weight"),
    "shape-scalar": ({"bn.num_batches_tracked": np.array([3], np.int64)}, "bn.num_batches_tracked"),
    "dtype": ({"head.bias": np.ones(3, np.float64)}, "head.bias"),
    "dtype-integer": ({"head.bias": np.ones(3, np.int32)}, "head.bias"),
    "architecture": (
        dict.fromkeys(forge.good_arrays(0)) | CLASSIFIER,
        "layers.0.weight|conv.weight",
    ),
    "index-table": (
        {"attn.relative_position_index": np.arange(9)[::-1].reshape(3, 3).copy()},
        "attn.relative_position_index",
    ),
}
for name, (changes, mention) in MISMATCHES.items():
    add_file("mismatch", f"{name}.pt", lambda _, c=changes: torch_file(3, c), mention)
    add_file(
        "mismatch",
        f"{name}.safetensors",
        lambda _, c=changes: safetensors_file(3, c),
        mention,
        suffix=".safetensors",
    )


# --- nothing to take, or too much ---------------------------------------------------------------


def write_all(site: Site, make: Callable[[int], bytes], name: str = "snap_{}.pt") -> None:
    for step in (1, 2, 3):
        (site.folder / name.format(step)).write_bytes(make(step))


def whole(root: object) -> bytes:
    return forge.torch_bytes(forge.pickled(root), {})


def adam(step: int) -> bytes:
    """What `torch.save(optimizer.state_dict())` leaves."""
    average = forge.tensor(forge.storage("0", 3), (3,), (1,))
    group = {"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}
    root = {"state": {0: {"step": float(step), "exp_avg": average}}, "param_groups": [group]}
    return forge.torch_bytes(forge.pickled(root), {"0": b"\0" * 12})


def two_networks(step: int) -> bytes:
    code, storages = forge.state_dict(forge.good_arrays(step))
    return forge.torch_bytes(forge.pickled({"generator": code, "discriminator": code}), storages)


def two_runs(site: Site) -> None:
    for run, seed in (("run_a", 0), ("run_b", 7)):
        (site.folder / run).mkdir()
        for step in (1, 2):
            data = torch_file(step, dict(forge.good_arrays(step, seed=seed)))
            (site.folder / run / f"snap_{step}.pt").write_bytes(data)


def only_other_files(site: Site) -> None:
    for name in ("README.md", "train.log", "config.yaml", "events.out.tfevents.1"):
        (site.folder / name).write_text("step 1: loss 0.5\n")


add("select", "empty-folder", lambda _: None, "ckpts")
add("select", "other-files", only_other_files, "ckpts")
add(
    "select",
    "only-an-optimizer",
    lambda s: (s.folder / "optimizer.pt").write_bytes(adam(1)),
    "optimizer",
)
add(
    "select",
    "two-networks",
    lambda s: write_all(s, two_networks),
    *("--weights", "generator", "discriminator"),
)
add("select", "two-runs", two_runs, "run_a", "run_b")
ROOTS: dict[str, object] = {
    "none": None,
    "number": 7,
    "text": "weights",
    "list": [1, 2, 3],
    "empty-dict": {},
    "no-tensors": {"epoch": 3, "model": {"lr": 0.1}},
    "empty-state-dict": {"model": call("collections.OrderedDict"), "epoch": 3},
    "lone-tensor": of(held=forge.storage("nowhere", 48)),
}
for name, root in ROOTS.items():
    add_file("select", name, lambda _, r=root: whole(r))
add(
    "select",
    "unknown-weights",
    lambda s: write_good(s, steps=(1, 2, 3)),
    "nosuch",
    exits=(2, BAD),
    args=("{folder}", "-o", "{out}/averaged.safetensors", "--weights", "nosuch"),
)


# --- what lies in a folder besides regular files -------------------------------------------------


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def sparse(path: Path, head: bytes) -> None:
    path.write_bytes(head)
    os.truncate(path, 50 << 30)


NODES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "fifo.pt": ("snap_3.pt", os.mkfifo),
    "fifo.safetensors": ("snap_3.safetensors", os.mkfifo),
    "socket": ("snap_3.pt", bind_socket),
    "folder": ("snap_3.pt", os.mkdir),
    "dangling-link": ("snap_3.pt", lambda p: p.symlink_to("nowhere.pt")),
    "link-to-itself": ("snap_3.pt", lambda p: p.symlink_to("snap_3.pt")),
    "link-to-zeros": ("snap_3.pt", lambda p: p.symlink_to("/dev/zero")),
    "link-to-terminal": ("snap_3.safetensors", lambda p: p.symlink_to("/dev/tty")),
    "sparse-zeros": ("snap_3.safetensors", lambda p: sparse(p, b"")),
    "sparse-header": ("snap_3.safetensors", lambda p: sparse(p, (40 << 30).to_bytes(8, "little"))),
    "sparse-body": ("snap_3.safetensors", lambda p: sparse(p, good(".safetensors", 3))),
    "sparse-zip": ("snap_3.pt", lambda p: sparse(p, good(".pt", 3))),
    "sparse-pickle": ("snap_3.pt", lambda p: sparse(p, b"\x80\x02")),
}
for name, (filename, make_node) in NODES.items():

    def build_node(site: Site, f: str = filename, m: Callable[[Path], object] = make_node) -> None:
        write_good(site, Path(f).suffix)
        m(site.folder / f)

    add("node", name, build_node, filename)


def unreadable(site: Site) -> None:
    write_good(site, steps=(1, 2, 3))
    (site.folder / "snap_3.pt").chmod(0)


add("node", "unreadable", unreadable, "snap_3.pt", exits=(BAD, 4), unless_root=True)


# --- names that hurt whoever prints them ----------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
KEYS: dict[str, tuple[str, str]] = {
    "escape-sequence": (f"head.{ESCAPE}", "head."),
    "lone-surrogate": ("head.\ud800", "head."),
    "newlines": ("head.\n\n\nerror: all is well\r", "head."),
    "markup": ("head.[/red][bold]", "head."),
    "percent": ("head.%s%(x)d{0}{oops}", "head."),
    "right-to-left": ("head.\u202egnp", "head."),
    "one-megabyte": ("head." + "x" * 1_000_000, "head."),
}
for name, (key, mention) in KEYS.items():
    extra = {key: np.ones(2, np.float32)}
    add_file("name", f"key-{name}.pt", lambda _, e=extra: torch_file(3, e), mention)
    add_file(
        "name",
        f"key-{name}.safetensors",
        lambda _, e=extra: safetensors_file(3, e),
        mention,
        suffix=".safetensors",
    )
add_file(
    "name",
    "hundred-thousand-keys",
    lambda _: safetensors_file(3, {f"k{i}": np.zeros(0, np.float32) for i in range(100_000)}),
    suffix=".safetensors",
)
FILES: dict[str, bytes] = {
    "escape-sequence": b"snap_3\x1b[2J.pt",
    "newline": b"snap_3\nerror.pt",
    "not-utf8": b"snap_3\xff\xfe.pt",
    "markup": b"snap_3[bold].pt",
    "dash": b"--force_snap_3.pt",
    "quote": b"snap_3'\"$(x)`.pt",
}
for name, raw_name in FILES.items():

    def build_name(site: Site, n: bytes = raw_name) -> None:
        write_good(site)
        Path(os.fsdecode(os.fsencode(site.folder) + b"/" + n)).write_bytes(good(".pt", 3)[:-9])

    add("name", f"file-{name}", build_name, "snap_3")
add_file(
    "name",
    "call-escape-sequence",
    lambda _: torch_file(3, extra=call(forge.stack_named(f"os:{ESCAPE}system"), "x")),
    exits=EITHER,
)
