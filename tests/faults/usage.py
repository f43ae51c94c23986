"""Owns the cases of wrong usage (exit 2) and of a machine that says no (exit 4).

Its input is good snapshots, asked for in a wrong way.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .cases import OUTPUT, Site, add, write_good

USAGE, MACHINE = 2, 4
Prepare = Callable[[Site], object]


def nothing(_: Site) -> None:
    """No preparation."""


def precious(name: str) -> Prepare:
    """Something in the output's place."""
    return lambda site: (site.out / name).write_text("precious")


def precious_folder(site: Site) -> None:
    (site.out / "model").mkdir()
    (site.out / "model" / "notes.txt").write_text("precious")


def link(kind: Callable[[str, str], None]) -> Prepare:
    """The output is another name of an input."""
    return lambda site: kind(str(site.folder / "snap_2.pt"), str(site.out / "averaged.pt"))


INPUT = "{folder}/snap_2.pt"
LINKED = ("{folder}", "-o", "{out}/averaged.pt", "--force")
ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Prepare]] = {
    "no-such-path": (("{folder}/nosuch", *OUTPUT[1:]), ("nosuch",), nothing),
    "no-glob-match": (("{folder}/*.ckpt", *OUTPUT[1:]), ("*.ckpt",), nothing),
    "no-checkpoints": (("-o", "{out}/averaged.safetensors"), (), nothing),
    "output-exists": (
        OUTPUT,
        ("averaged.safetensors", "--force"),
        precious("averaged.safetensors"),
    ),
    "output-folder-exists": (("{folder}", "-o", "{out}/model"), ("model",), precious_folder),
    "output-extension": (("{folder}", "-o", "{out}/averaged.xyz"), (".xyz",), nothing),
    "output-empty": (("{folder}", "-o", ""), (), nothing),
    "output-folder-missing": (("{folder}", "-o", "{out}/no/averaged.pt"), ("no",), nothing),
    "output-is-input": (("{folder}", "-o", INPUT), ("snap_2.pt",), nothing),
    "output-is-input-forced": (("{folder}", "-o", INPUT, "--force"), ("snap_2.pt",), nothing),
    "output-hard-link": (LINKED, ("averaged.pt",), link(os.link)),
    "output-soft-link": (LINKED, ("averaged.pt",), link(os.symlink)),
    "last-zero": ((*OUTPUT, "--last", "0"), ("--last",), nothing),
    "last-negative": ((*OUTPUT, "--last", "-1"), ("--last",), nothing),
    "last-word": ((*OUTPUT, "--last", "many"), ("--last", "many"), nothing),
    "every-zero": ((*OUTPUT, "--every", "0"), ("--every",), nothing),
    "best-without-by": ((*OUTPUT, "--best", "2"), ("--by",), nothing),
    "unknown-method": ((*OUTPUT, "--method", "unifrom"), ("unifrom", "uniform"), nothing),
    "unknown-bn": ((*OUTPUT, "--bn", "maybe"), ("maybe", "recompute"), nothing),
    "unknown-option": ((*OUTPUT, "--lst", "3"), ("--lst",), nothing),
    "config-missing": ((*OUTPUT, "--train-data", "nosuch.py:f", "--bn", "recompute"), (), nothing),
}
for name, (args, mention, prepare) in ROWS.items():

    def build(site: Site, p: Prepare = prepare) -> None:
        write_good(site, steps=(1, 2, 3))
        p(site)

    add("usage", name, build, *mention, exits=USAGE, args=args)

SELECTED_NONE = {"exclude-all": ("--exclude", "*"), "from-step": ("--from-step", "999999")}
for name, flags in SELECTED_NONE.items():
    add(
        "usage",
        name,
        lambda s: write_good(s, steps=(1, 2, 3)),
        flags[0],
        exits=(USAGE, 3),
        args=(*OUTPUT, *flags),
    )


def parent_is_a_file(site: Site) -> None:
    write_good(site)
    (site.out / "file").write_text("precious")


def full_disk(site: Site) -> None:
    write_good(site, ".safetensors")


add(
    "machine",
    "parent-is-a-file",
    parent_is_a_file,
    "file",
    exits=(USAGE, MACHINE),
    args=("{folder}", "-o", "{out}/file/averaged.safetensors"),
)
add(
    "machine",
    "read-only-system",
    write_good,
    "/sys/averaged.safetensors",
    exits=MACHINE,
    args=("{folder}", "-o", "/sys/averaged.safetensors"),
)
add(
    "machine",
    "name-too-long",
    write_good,
    exits=(USAGE, MACHINE),
    args=("{folder}", "-o", "{out}/" + "x" * 300 + ".safetensors"),
)
for limit in (1, 512, 1024):
    add(
        "machine",
        f"no-room-beyond-{limit}",
        full_disk,
        "averaged.safetensors",
        exits=MACHINE,
        args=("{folder}", "-o", "{out}/averaged.safetensors"),
        file_size_limit=limit,
    )


def read_only_folder(site: Site) -> None:
    write_good(site)
    site.out.chmod(0o555)


add("machine", "read-only-folder", read_only_folder, "out", exits=MACHINE, unless_root=True)
