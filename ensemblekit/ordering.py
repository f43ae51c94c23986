"""Owns the order of snapshots: what files say comes first, then the numbers in their names.

Input: snapshots as they were found. The order depends neither on how files were named on the command
line, nor on their text, nor on their modification times.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ensemblekit import duplicates
from ensemblekit.errors import listing
from ensemblekit.layouts.torch_dict import words_in
from ensemblekit.snapshots import Snapshot, position

_LAST = {"last", "latest", "final"}
_COUNTING = "epoch|ep|step|steps|iter|iteration|checkpoint|ckpt|snapshot|cycle|round"
_NUMBER = r"(\d+)([kKmM](?![a-zA-Z0-9]))?"
_SUFFIXES = {"": 1, "k": 1000, "m": 1_000_000}

_ORDER_KEYS: list[tuple[str, Callable[[Snapshot], Any]]] = [
    ("step", lambda s: s.facts.step),
    ("epoch", lambda s: s.facts.epoch),
    ("number", lambda s: s.numbers or None),
]


def in_order(snapshots: Iterable[Snapshot]) -> tuple[list[Snapshot], str]:
    """Canonical order: by step, else epoch, else number in the name; ties and the rest by content.

    The order does not depend on how the files were named on the command line, by their text or
    by their modification time.
    """
    items = list(snapshots)
    steps_mislead = _epochs_contradict_steps(items)  # they count within an epoch
    keys = [(name, key) for name, key in _ORDER_KEYS if name != "step" or not steps_mislead]
    for most in (len(items), len(items) // 2 + 1):  # what all state, else what most do
        for name, key in keys:
            stated = [s for s in items if key(s) is not None]
            silent = [s for s in items if key(s) is None]
            tells = len({key(s) for s in stated}) > 1 or len(items) == 1
            if tells and len(stated) >= most:
                early = [s for s in silent if not _is_last(s)]
                late = [s for s in silent if _is_last(s)]
                return _by_content(early) + _sorted(stated, key) + _by_content(late), name
    return _by_content(items), "content"


def with_numbers(snapshots: list[Snapshot]) -> list[Snapshot]:
    """Each with the numbers of its name, or of its folder's where no neighbour has any.

    Numbers that all share at the front (`vgg16_epoch_3`) say nothing about the order.
    """
    own = [numbers_in(s.path.name if s.path.is_dir() else _stem(s.path.name)) for s in snapshots]
    if len(snapshots) > 1 and len({s.path.name for s in snapshots}) == 1:
        own = [() for _ in snapshots]  # the same name in every folder counts nothing
    numbered = {s.path.parent for s, numbers in zip(snapshots, own, strict=True) if numbers}
    folders = {(s.found_in, s.path.parent) for s in snapshots}
    for i, snapshot in enumerate(snapshots):
        folder = snapshot.path.parent
        deeper = any(top == folder and place != folder for top, place in folders)
        if folder not in numbered and not deeper:
            own[i] = numbers_in(folder.absolute().name)
    while len(own) > 1 and all(len(n) > 1 for n in own) and len({n[0] for n in own}) == 1:
        own = [numbers[1:] for numbers in own]
    finest = _finest({numbers for numbers in own if numbers})
    own = [numbers if finest is None else numbers[finest : finest + 1] for numbers in own]
    return [replace(s, numbers=numbers) for s, numbers in zip(snapshots, own, strict=True)]


def _finest(numbers: set[tuple[int, ...]]) -> int | None:
    """Which number of each name tells the order alone: the step where several are of one epoch."""
    lengths = {len(n) for n in numbers}
    if len(lengths) != 1 or lengths == {1}:
        return None
    columns = zip(*sorted(numbers), strict=True)
    telling = [at for at, column in enumerate(columns) if all(a < b for a, b in pairwise(column))]
    return telling[0] if telling else None


def numbers_in(text: str) -> tuple[int, ...]:
    """The numbers in a name that count something: those behind a word for it, else all whole ones.

    Ranks of a distributed run and scores count nothing.

    >>> numbers_in("val_loss_0.52_epoch_3"), numbers_in("step-5k"), numbers_in("net-10")
    ((3,), (5000,), (10,))
    """
    text = re.sub(r"\d+\.\d+|rank[-_]?\d+", " ", text)
    found = re.findall(rf"(?:{_COUNTING})[-_=.]?{_NUMBER}", text, re.IGNORECASE)
    found = found or re.findall(_NUMBER, text)
    return tuple(int(digits) * _SUFFIXES[unit.lower()] for digits, unit in found[:8])


def made_after(average: Snapshot, members: list[Snapshot]) -> bool:
    """Whether an average may have been made of the members: not if it was saved between them."""
    for _, key in _ORDER_KEYS:
        own, places = key(average), [key(member) for member in members]
        if own is not None and None not in places:
            return not bool(min(places) < own < max(places))
    return True


def order_warnings(snapshots: list[Snapshot], ordered_by: str) -> list[str]:
    """Snapshots that do not say where they stand, or say the same of different weights."""
    if ordered_by == "content":
        return []
    found = []
    silent = [s.name for s in snapshots if position(s, ordered_by) is None]
    if silent:
        found.append(
            f"no {ordered_by} is known of {listing(silent)}; sorted by name: last ones last, "
            "others first"
        )
    averages = all(s.role == "ema" for s in snapshots)  # of several widths, perhaps
    places = Counter(_place(s, ordered_by) for s in snapshots)
    twice = [s.name for s in snapshots if places[_place(s, ordered_by)] > 1]
    if twice and not silent and not averages:
        found.append(f"different weights state the same {ordered_by}: {listing(twice)}")
    return found


def _place(snapshot: Snapshot, ordered_by: str) -> Any:
    return snapshot.numbers if ordered_by == "number" else position(snapshot, ordered_by)


def _epochs_contradict_steps(snapshots: list[Snapshot]) -> bool:
    """Whether a later epoch has an earlier step."""
    known = [(s.facts.epoch, s.facts.step) for s in snapshots]
    pairs = sorted((epoch, step) for epoch, step in known if epoch is not None and step is not None)
    return len(pairs) == len(known) and any(
        one[0] < other[0] and one[1] >= other[1] for one, other in pairwise(pairs)
    )


def _is_last(snapshot: Snapshot) -> bool:
    return not _LAST.isdisjoint(words_in(snapshot.path.name))


def _by_content(items: list[Snapshot]) -> list[Snapshot]:
    return _sorted(items, lambda _: 0)


def _sorted(items: list[Snapshot], key: Callable[[Snapshot], Any]) -> list[Snapshot]:
    """Sort by `key`; only where it repeats, read contents to break the tie."""
    groups: defaultdict[Any, list[Snapshot]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    ordered: list[Snapshot] = []
    for value in sorted(groups):
        group = groups[value]
        ordered.extend(sorted(group, key=duplicates.content_digest) if len(group) > 1 else group)
    return ordered


def _stem(name: str) -> str:
    for ending in (".pth.tar", ".tar.gz", ".ckpt.pt"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name.rpartition(".")[0] or name
