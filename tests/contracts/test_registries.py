"""Every entry of a registry resolves and has the functions of its seam."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from ensemblekit import averaging, containers, layouts, writers
from ensemblekit.averaging import RULES
from ensemblekit.cli.main import COMMANDS
from ensemblekit.cli.main import run as run_command
from ensemblekit.containers import CONTAINERS, FOLDERS
from ensemblekit.errors import UsageError
from ensemblekit.layouts import LAYOUTS
from ensemblekit.writers import WRITERS

FOLDER = Path(averaging.__file__).parents[1]
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def signature(function: Any) -> tuple[list[str], str]:
    """Names of the parameters, and what the annotation says is returned."""
    found = inspect.signature(function)
    annotation = found.return_annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return list(found.parameters), re.sub(r"[\w.]+\.(\w+)", r"\1", text)


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(name: str) -> None:
    module = import_module(CONTAINERS[name])
    assert signature(module.sniff) == (["source"], "bool")
    assert signature(module.read) == (["source"], "Tree")


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name: str) -> None:
    module = import_module(FOLDERS[name])
    assert signature(module.is_ours) == (["folder"], "bool")
    assert signature(module.members) == (["folder"], "set[str]")
    assert signature(module.read_folder) == (["folder"], "Tree")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    module = import_module(LAYOUTS[name])
    assert signature(module.match) == (["tree", "path"], "bool")
    assert signature(module.weights) == (["tree", "path"], "dict[str, Weights]")
    assert signature(module.facts) == (["tree", "path"], "Facts")


def test_general_layouts_come_last() -> None:
    assert list(LAYOUTS)[-3:] == ["torch-dict", "torch-module", "state-dict"]


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    rule = averaging.rule(name)
    first, *options = inspect.signature(rule).parameters.values()
    assert (first.name, signature(rule)[1]) == ("snapshots", "Row")
    assert {option.kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(option.default is not inspect.Parameter.empty for option in options)
    assert "objective" in {option.name for option in options}


@pytest.mark.parametrize("ending", WRITERS)
def test_writer(ending: str) -> None:
    module = import_module(WRITERS[ending])
    assert ending.startswith(".")
    assert signature(module.layout) == (["content"], "Layout")


@pytest.mark.parametrize("name", COMMANDS)
def test_command(name: str) -> None:
    module, text = COMMANDS[name]
    command = import_module(module).command
    assert isinstance(command, click.Command)
    assert command.help
    assert len(text) < 80
    assert text.endswith(".")


REGISTRIES: dict[str, Mapping[str, Any]] = {
    "containers": CONTAINERS,
    "folders": FOLDERS,
    "layouts": LAYOUTS,
    "rules": RULES,
    "commands": COMMANDS,
}


@pytest.mark.parametrize("registry", REGISTRIES)
def test_names(registry: str) -> None:
    assert [name for name in REGISTRIES[registry] if not NAME.fullmatch(name)] == []


@pytest.mark.parametrize(
    "package, registry, others",
    [
        (
            containers,
            {**CONTAINERS, **FOLDERS},
            {"memory", "suspects", "pickle_vm", "pickle_globals"},
        ),
        (layouts, LAYOUTS, {"tensors", "dialect"}),
        (averaging, RULES, {"learned_soup"}),  # needs gradients, which compare has
        (writers, WRITERS, {"folder", "pickling", "saving"}),
    ],
    ids=["containers", "layouts", "averaging", "writers"],
)
def test_every_file_is_registered(
    package: Any, registry: Mapping[str, str], others: set[str]
) -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    registered = {entry.partition(":")[0].rpartition(".")[2] for entry in registry.values()}
    assert files - others == registered


@pytest.mark.parametrize("name, near", [("unifrom", "uniform"), ("weigthed", "weighted")])
def test_unknown_rule(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"unknown method '{name}'; valid: uniform, weighted") as e:
        averaging.rule(name)
    assert e.value.hint == f"did you mean '{near}'?"


@pytest.mark.parametrize("name, near", [("averge", "average"), ("inspct", "inspect")])
def test_unknown_command(
    name: str, near: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert run_command([name]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"unknown command '{name}'; valid: inspect, average" in shown.err
    assert f"did you mean '{near}'?" in shown.err


@pytest.mark.parametrize("name", ["out.safetensor", "out.npz"])
def test_unknown_ending(name: str) -> None:
    with pytest.raises(UsageError, match="unknown ending") as caught:
        writers.check_format(Path(name))
    assert all(ending in caught.value.message for ending in WRITERS)
    assert ".safetensors" in str(caught.value.hint)
