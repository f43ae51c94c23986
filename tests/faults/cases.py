"""Owns the registry: what a fault case is, and the good snapshots it starts from.

The modules `hostile`, `damaged`, `others`, `content` and `usage` fill it. A case is usually two good
snapshots and one bad, so that the error can be seen to name the bad one. `|` in a string that
must be mentioned separates alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from . import forge
from .forge import Code, Edit, push

BAD = 3  # a checkpoint that is damaged, hostile, incompatible or does not fit
EITHER = (0, BAD)  # harmless if left unread; it may be refused, and must not be obeyed
OUTPUT = ("{folder}", "-o", "{out}/averaged.safetensors")


@dataclass(frozen=True)
class Site:
    """Where a case lives: the given folder, the output's folder, and what must stay as it is."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "ckpts"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def cwd(self) -> Path:
        return self.root / "cwd"

    @property
    def marker(self) -> Path:
        """What a payload would create."""
        return self.root / "executed"

    @property
    def victim(self) -> Path:
        """What a payload would delete."""
        return self.root / "victim"

    @property
    def touch(self) -> str:
        return f"touch {self.marker}"

    @property
    def python(self) -> str:
        return f"open({str(self.marker)!r}, 'w').close()"

    def script(self) -> str:
        """A Python file that would leave the marker."""
        path = self.root / "script.py"
        path.write_text(self.python)
        return str(path)


# both are called with the Site alone; other parameters are defaults that bind a loop's variables
Build = Callable[..., object]
Make = Callable[..., bytes]


@dataclass(frozen=True)
class Case:
    """One row of the table; `armed`: plain `pickle.load` of it does leave the marker."""

    group: str
    name: str
    build: Build
    mention: tuple[str, ...] = ()
    exits: tuple[int, ...] = (BAD,)
    args: tuple[str, ...] = OUTPUT
    armed: bool = False
    file_size_limit: int | None = None
    unless_root: bool = False

    def __str__(self) -> str:
        return f"{self.group}-{self.name}"


CASES: list[Case] = []


def snapshot(
    step: int, changes: Mapping[str, object] | None = None, **entries: object
) -> tuple[Code, dict[str, bytes]]:
    """A checkpoint dict as a training script writes it; a change to None drops the key."""
    arrays: dict[str, object] = {**forge.good_arrays(step), **(changes or {})}
    state, storages = forge.state_dict({k: v for k, v in arrays.items() if v is not None})
    return push({"model": state, "epoch": step, **entries}), storages


def torch_file(
    step: int,
    changes: Mapping[str, object] | None = None,
    *,
    edit: Edit = list,
    protocol: int = 2,
    zipped: Mapping[str, object] | None = None,
    **entries: object,
) -> bytes:
    code, storages = snapshot(step, changes, **entries)
    return forge.torch_bytes(
        forge.pickled(code, protocol=protocol), storages, edit=edit, **(zipped or {})
    )


def safetensors_file(step: int, changes: Mapping[str, object] | None = None) -> bytes:
    arrays = {**forge.good_arrays(step), **(changes or {})}
    return forge.safetensors_state({k: v for k, v in arrays.items() if isinstance(v, np.ndarray)})


@cache
def good(suffix: str, step: int) -> bytes:
    return (torch_file if suffix == ".pt" else safetensors_file)(step)


def write_good(site: Site, suffix: str = ".pt", steps: tuple[int, ...] = (1, 2)) -> None:
    for step in steps:
        (site.folder / f"snap_{step}{suffix}").write_bytes(good(suffix, step))


def add(group: str, name: str, build: Build, *mention: str, **fields: object) -> None:
    exits = fields.pop("exits", BAD)
    exits = exits if isinstance(exits, tuple) else (exits,)
    CASES.append(Case(group, name, build, mention, exits, **fields))  # type: ignore[arg-type]


def add_file(
    group: str, name: str, make: Make, *mention: str, suffix: str = ".pt", **fields: object
) -> None:
    """Two good snapshots, and `make`'s bytes as the third, which the error has to name."""

    def build(site: Site) -> None:
        write_good(site, suffix)
        (site.folder / f"snap_3{suffix}").write_bytes(make(site))

    add(group, name, build, f"snap_3{suffix}", *mention, **fields)
