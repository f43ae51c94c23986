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
        value, lost = _plain(root[name], name)
        found[name] = value
        left += lost
    return found, left


def _plain(value: Any, name: str) -> tuple[Any, list[str]]:
    """The plain part of a value: Lightning's own dict of attributes is one, underneath."""
    if isinstance(value, Inert) and value.cls.endswith("AttributeDict"):
        value = {**value.attributes(), **dict(value.mapping)}
    if not isinstance(value, dict):
        return (value, []) if is_plain(value) else (None, [name])
    found, left = {}, []
    for key, item in value.items():
        kept, lost = _plain(item, f"{name}.{key}")
        if not lost or isinstance(kept, dict):
            found[key] = kept
        left += lost
    return found, left
