"""Owns the writing of Lightning checkpoints: the weights, and what `load_from_checkpoint` asks for.

Input: a content whose document holds the plain values of the newest snapshot's file.
"""

from pathlib import Path
from typing import Any

from ensemblekit import containers
from ensemblekit.containers import Inert
from ensemblekit.files import Source
from ensemblekit.snapshots import Snapshot
from ensemblekit.writers import Content, Layout
from ensemblekit.writers.pickling import Ordered, is_plain
from ensemblekit.writers.torch_zip import archive, stored

_KEPT = (
    *("epoch", "global_step", "pytorch-lightning_version"),
    *("hparams_name", "hyper_parameters", "datamodule_hparams_name", "datamodule_hyper_parameters"),
)
_VERSION = "2.0.0"  # of the container; newer Lightnings read it as it is


def layout(content: Content) -> Layout:
    """The container and its weights."""
    root = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": _VERSION,
        **content.document,
        "state_dict": Ordered(stored(content)),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    return archive(content, root)


def document(snapshot: Snapshot) -> tuple[dict[str, Any], list[str]]:
    """Hyper-parameters and position out of a snapshot's own file, and names of what was left.

    Values of classes that are not plain cannot be written again, since they were not loaded.
    """
    if not snapshot.format.endswith("/lightning") or Path(snapshot.path).is_dir():
        return {}, []
    root = containers.read(Source(snapshot.path)).root
    found: dict[str, Any] = {}
    left: list[str] = []
    for name in _KEPT if isinstance(root, dict) else ():
        if name not in root:
            continue
        value = root[name]
        if isinstance(value, Inert) and value.cls.endswith("AttributeDict"):
            value = {**value.attributes(), **dict(value.mapping)}  # Lightning's own dict
        kept = _plain_part(value, name, left)
        if kept is not _NOTHING:
            found[name] = kept
    return found, left


_NOTHING: Any = object()
_DEEPEST = 4  # levels of dicts whose entries are looked at one by one


def _plain_part(value: Any, name: str, left: list[str], depth: int = 0) -> Any:
    """The plain value, or what is plain of a dict; names of the rest are added to `left`."""
    if is_plain(value):
        return value
    if type(value) is not dict or depth == _DEEPEST:
        left.append(name)
        return _NOTHING
    parts = {
        key: _plain_part(item, f"{name}.{key}", left, depth + 1)
        for key, item in value.items()
        if is_plain(key)
    }
    return {key: part for key, part in parts.items() if part is not _NOTHING}
