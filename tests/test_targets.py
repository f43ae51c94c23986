"""Targets: what a text names, how it is called, and whose fault a failure is."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ensemblekit import targets
from ensemblekit.errors import EnsembleKitError, UsageError, UserCodeError
from ensemblekit.targets import Target, fingerprint, load_data, load_model, parse

CODE = """
import helper
from torch import nn

def net(width=2, bias=True):
    return nn.Linear(width, helper.CLASSES, bias=bias)

class Nets:
    @staticmethod
    def small():
        return nn.Linear(1, 1)

ready = nn.Linear(4, 4)
number = 3

def late():
    import second_helper
    return nn.Linear(second_helper.WIDTH, 2)

def explode():
    return helper.explode()

def no_module():
    return {"a": 1}

def by_split(split, scale=1):
    return ("by_split", split, scale)

def without_split(scale=1):
    return ("without_split", scale)

def lazy(split="unset", **options):
    return (split, options)
"""
HELPER = """
CLASSES = 3
def explode():
    raise RuntimeError("the dog ate it")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "second_helper.py").write_text("WIDTH = 5")
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name.startswith(("helper", "second_helper", "net", "pkg", "ensemblekit_target_")):
            del sys.modules[name]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("net.py:make", Target("net.py:make", "net.py", "make")),
        ("pkg.mod:A.b", Target("pkg.mod:A.b", "pkg.mod", "A.b")),
        ("timm:resnet18", Target("timm:resnet18", "timm", "resnet18")),
        ("C:/my dir/net.py:make", Target("C:/my dir/net.py:make", "C:/my dir/net.py", "make")),
        ("a.npz", Target("a.npz", "a.npz", "")),
        ("a.npz?x=u&y=v", Target("a.npz?x=u&y=v", "a.npz", "", {"x": "u", "y": "v"})),
        (
            "d.py:f?n=3&r=1e-3&on=true&off=None&s=a%20b&l=[1,2]&e=",
            Target(
                "d.py:f?n=3&r=1e-3&on=true&off=None&s=a%20b&l=[1,2]&e=",
                "d.py",
                "f",
                {"n": 3, "r": 1e-3, "on": True, "off": None, "s": "a b", "l": [1, 2], "e": ""},
            ),
        ),
    ],
)
def test_parsing(text: str, wanted: Target) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize("text", ["", "net.py", ":make", "net.py:", "?x=1"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError, match=r"FILE\.py:NAME"):
        parse(text)


@pytest.mark.parametrize(
    "text, arguments, shape",
    [
        ("net.py:net", {}, (3, 2)),
        ("./net.py:net", {"width": 4}, (3, 4)),
        ("net.py:net?width=5", {}, (3, 5)),
        ("net.py:net?width=5", {"width": 6}, (3, 6)),
        ("net:net", {"width": 7}, (3, 7)),
        ("net.py:Nets.small", {}, (1, 1)),
        ("net.py:ready", {}, (4, 4)),
        ("net.py:late", {}, (2, 5)),
        ("torch.nn:Linear?in_features=8&out_features=9", {}, (9, 8)),
    ],
)
def test_models(folder: Path, text: str, arguments: dict[str, Any], shape: tuple[int, int]) -> None:
    model = load_model(text, arguments)
    assert isinstance(model, nn.Linear)
    assert tuple(model.weight.shape) == shape


def test_a_file_by_its_full_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert isinstance(load_model(f"{folder}/net.py:net", {}), nn.Linear)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("net.py:by_split", ("by_split", "val", 1)),
        ("net.py:by_split?scale=2", ("by_split", "val", 2)),
        ("net.py:by_split?split=train", ("by_split", "train", 1)),
        ("net.py:without_split", ("without_split", 1)),
        ("net.py:lazy?a=1", ("val", {"a": 1})),
    ],
)
def test_data(folder: Path, text: str, wanted: Any) -> None:
    assert load_data(text, "val") == wanted


def test_arrays(folder: Path) -> None:
    np.savez(folder / "a.npz", x=np.ones((3, 2)), y=np.arange(3), x_bn=np.zeros((3, 2)))
    x, y = load_data("a.npz", "val")
    assert x.sum() == 6
    assert y.tolist() == [0, 1, 2]
    assert load_data("a.npz?x=x_bn", "val")[0].sum() == 0
    assert load_data("a.npz?y=x&x=y", "val")[0].tolist() == [0, 1, 2]


MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "file": ("nosuch.py:net", ("no file nosuch.py",)),
    "module": ("no.such.module:net", ("no module 'no.such.module'", "FILE.py:NAME")),
    "attribute": ("net.py:nte", ("has no 'nte'", "net")),
    "nested": ("net.py:Nets.big", ("has no 'Nets.big'",)),
    "not-callable": ("net.py:number", ("builtins.int", "not callable")),
    "not-a-module": ("net.py:no_module", ("builtins.dict", "torch.nn.Module")),
    "form": ("net.py", ("FILE.py:NAME",)),
    "timm": ("timm:resnet18", ("pip install 'ensemblekit[timm]'",)),
    "torchvision": ("torchvision:resnet18", ("pip install 'ensemblekit[torchvision]'",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_target(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = MISTAKES[name]
    for library in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)  # absent, wherever this runs
        monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(UsageError) as caught:
        load_model(text, {})
    shown = f"{caught.value.message} {caught.value.hint}"
    assert not [word for word in words if word not in shown], shown


@pytest.mark.parametrize(
    "text, words",
    [
        ("none.npz", ("no file none.npz",)),
        ("a.npz", ("no array 'x'", "images", "?x=NAME&y=NAME")),
        ("a.npz?x=images&y=nope", ("no array 'nope'",)),
    ],
)
def test_mistakes_in_arrays(folder: Path, text: str, words: tuple[str, ...]) -> None:
    np.savez(folder / "a.npz", images=np.ones(3), y=np.ones(3))
    with pytest.raises(UsageError) as caught:
        load_data(text, "train")
    shown = f"{caught.value.message} {caught.value.hint}"
    assert not [word for word in words if word not in shown], shown


def test_pickles_in_arrays_stay_closed(folder: Path) -> None:
    np.savez(folder / "a.npz", x=np.array([{}, {}]), y=np.arange(2))
    with pytest.raises(EnsembleKitError) as caught:
        load_data("a.npz", "train")
    assert caught.value.exit_code == 3


USER_ERRORS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "called": ("net.py:explode", "", ("RuntimeError: the dog ate it", "helper.py", "explode")),
    "arguments": ("net.py:net", "", ("TypeError", "depth")),
    "import": ("bad.py:f", "raise ValueError('at import')\n", ("ValueError: at import", "bad.py")),
    "syntax": ("bad.py:f", "def f(:\n", ("SyntaxError", "bad.py")),
    "missing": ("bad.py:f", "import no_such_thing\n", ("no_such_thing", "bad.py")),
    "exit": ("bad.py:f", "import sys\nsys.exit(0)\n", ("SystemExit", "bad.py")),
    "package": ("pkg.mod:f", "raise RuntimeError('in the package')", ("in the package",)),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_their_mistakes_are_shown_as_theirs(folder: Path, name: str) -> None:
    text, code, words = USER_ERRORS[name]
    (folder / "bad.py").write_text(code)
    (folder / "pkg").mkdir()
    (folder / "pkg" / "__init__.py").write_text(code)
    (folder / "pkg" / "mod.py").write_text("")
    with pytest.raises(UserCodeError) as caught:
        load_model(text, {"depth": 3} if name == "arguments" else {})
    assert caught.value.exit_code == 3
    assert not [word for word in words if word not in caught.value.message], caught.value.message
    assert targets.__file__ not in caught.value.message  # their frames only


def test_a_file_that_failed_can_be_mended_and_loaded(folder: Path) -> None:
    path = folder / "bad.py"
    path.write_text("raise ValueError")
    before = list(sys.path)
    with pytest.raises(UserCodeError):
        load_model("bad.py:f", {})
    assert sys.path == before
    path.write_text("from torch import nn\ndef f(): return nn.Linear(1, 1)  # mended")
    assert isinstance(load_model("bad.py:f", {}), nn.Linear)


def test_a_fingerprint_changes_with_the_file(folder: Path) -> None:
    for text, file in (("net.py:net", "net.py"), ("net:net", "net.py"), ("a.npz", "a.npz")):
        path = folder / file
        if not path.exists():
            path.write_text("first")
        before = fingerprint(text)
        assert fingerprint(text) == before
        path.write_text(path.read_text() + "\n# changed")
        assert fingerprint(text) != before, text


def test_a_fingerprint_covers_text_and_files_among_the_arguments(folder: Path) -> None:
    assert fingerprint("net.py:net") != fingerprint("net.py:net?width=3")
    (folder / "list.txt").write_text("a")
    before = fingerprint("net.py:by_split?files=list.txt")
    (folder / "list.txt").write_text("b")
    assert fingerprint("net.py:by_split?files=list.txt") != before
    assert fingerprint("nosuch.py:f") == fingerprint("nosuch.py:f")
