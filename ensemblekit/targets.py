"""Owns targets: what `--model` and `--*-data` name, brought to a module and to data.

Input: texts such as `train.py:Net`, `pkg.mod:make`, `timm:resnet18`, `arrays.npz?x=images`. A
target is the user's code; when it raises, the traceback shown is theirs.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ensemblekit.errors import EnsembleKitError, UsageError, UserCodeError, listing

_LIBRARIES = {"timm": "timm", "torchvision": "torchvision.models"}
_MOST_NEIGHBOURS = 2000
_FORMS = "FILE.py:NAME or package.module:NAME"


@dataclass(frozen=True)
class Target:
    """A target taken apart.

    Attributes:
        text: As typed.
        where: File, module or library.
        name: Attribute in it; empty for arrays.
        arguments: What stands behind `?`, values as Python literals where they are ones.
    """

    text: str
    where: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def parse(text: str) -> Target:
    """Take a target apart.

    Raises:
        UsageError: It has none of the known forms.

    >>> parse("data.py:load?size=32&split=train")
    Target(text='data.py:load?size=32&split=train', where='data.py', name='load', \
arguments={'size': 32, 'split': 'train'})
    """
    head, _, query = text.partition("?")
    arguments = {key: literal(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    if head.endswith(".npz"):
        return Target(text, head, "", arguments)
    where, colon, name = head.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"target '{text}' is not of the form {_FORMS}")
    return Target(text, where, name, arguments)


def literal(text: str) -> Any:
    """The Python value that the text spells, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def load_model(text: str, arguments: Mapping[str, Any]) -> Any:
    """Call the model target and return its `nn.Module`.

    Raises:
        UsageError: The target does not exist.
        UserCodeError: The user's code raised.
    """
    from torch import nn

    target = parse(text)
    arguments = {**target.arguments, **arguments}
    if target.where in _LIBRARIES:
        make = _library_model(target)
    else:
        make = _callable(target, "model")
    if isinstance(make, nn.Module):
        return make
    with user_code(f"model target '{text}'"):
        model = make(**arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model target '{text}' returned {_kind(model)}, expected a torch.nn.Module"
        )
    return model


def load_function(text: str, *, what: str) -> Callable[..., Any]:
    """The function that a target names.

    Raises:
        UsageError: The target does not exist.
        UserCodeError: The user's code raised.
    """
    target = parse(text)
    if not target.name:
        raise UsageError(f"{what} target '{text}' is not of the form {_FORMS}")
    return _callable(target, what)


def load_data(text: str, split: str) -> Any:
    """Call the data target: a Dataset, a pair of arrays, or an iterable of batches.

    Args:
        text: The target.
        split: `train`, `val` or `test`; handed to a callable that has a parameter `split` which
            the target does not set itself.

    Raises:
        UsageError: The target does not exist.
        UserCodeError: The user's code raised.
    """
    target = parse(text)
    if not target.name:
        return _arrays(target)
    make = _callable(target, "data")
    arguments = dict(target.arguments)
    if "split" not in arguments and _takes(make, "split"):
        arguments["split"] = split
    with user_code(f"data target '{text}'"):
        return make(**arguments)


def fingerprint(text: str) -> str:
    """A digest of the target's text and of the code and arrays behind it.

    All Python files of the target's folder count, since it may import its neighbours.
    """
    target = parse(text)
    digest = hashlib.sha256(text.encode())
    path = Path(target.where)
    if target.name and not target.where.endswith(".py"):
        path = Path(_module_file(target) or target.where)
    files = [path, *(Path(str(v)) for v in target.arguments.values() if isinstance(v, str))]
    if target.name and path.is_file():
        neighbours = path.resolve().parent.rglob("*.py")
        files += sorted(itertools.islice(neighbours, _MOST_NEIGHBOURS))
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _callable(target: Target, what: str) -> Callable[..., Any]:
    module = _file(target) if target.where.endswith(".py") else _module(target)
    found: Any = module
    for part in target.name.split("."):
        found = getattr(found, part, None)
        if found is None:
            names = [n for n in vars(module) if not n.startswith("_")]
            raise UsageError(
                f"{what} target '{target.text}': '{target.where}' has no '{target.name}'",
                hint=f"it has {listing(names, limit=8)}",
            )
    if not callable(found):
        raise UsageError(f"{what} target '{target.text}' is {_kind(found)}, not callable")
    call: Callable[..., Any] = found
    return call


def _file(target: Target) -> Any:
    path = Path(target.where)
    if not path.is_file():
        raise UsageError(f"target '{target.text}': there is no file {path}")
    seen = str(path.resolve()).encode() + b"\0" + path.read_bytes()  # an edited file is loaded anew
    name = "ensemblekit_target_" + hashlib.sha256(seen).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data-loader workers and dataclasses look it up
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # the file may import its neighbours, now or when called
    try:
        with user_code(f"target '{target.text}'"):
            spec.loader.exec_module(module)
    except UserCodeError:
        del sys.modules[name]
        sys.path.remove(folder)
        raise
    return module


def _module(target: Target) -> Any:
    if _module_file(target) is None:
        raise UsageError(
            f"target '{target.text}': there is no module '{target.where}'",
            hint=f"write {_FORMS}",
        )
    with user_code(f"target '{target.text}'"):
        return importlib.import_module(target.where)


def _module_file(target: Target) -> str | None:
    """Where the module lies, None where there is none; the working directory counts."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with user_code(f"target '{target.text}'"):  # finding a submodule imports its package
        try:
            found = importlib.util.find_spec(target.where)
        except (ModuleNotFoundError, ValueError):
            return None
    return None if found is None else found.origin or ""


def _library_model(target: Target) -> Callable[..., Any]:
    name = _LIBRARIES[target.where]
    try:
        library = importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"model target '{target.text}': {target.where} cannot be imported ({error})",
            hint=f"pip install 'ensemblekit[{target.where}]'",
        ) from error

    def make(**arguments: Any) -> Any:
        # never a download: the weights come from the checkpoints
        if target.where == "timm":
            return library.create_model(target.name, pretrained=False, **arguments)
        return library.get_model(target.name, weights=None, **arguments)

    return make


def _arrays(target: Target) -> tuple[Any, Any]:
    import numpy as np

    path = Path(target.where)
    if not path.is_file():
        raise UsageError(f"target '{target.text}': there is no file {path}")
    with user_code(f"data target '{target.text}'"), np.load(path, allow_pickle=False) as arrays:
        names = [str(target.arguments.get(key, key)) for key in ("x", "y")]
        missing = [name for name in names if name not in arrays]
        if missing:
            raise UsageError(
                f"data target '{target.text}': {path} has no array '{missing[0]}'",
                hint=f"it has {listing(arrays, limit=8)}; choose with '{path}?x=NAME&y=NAME'",
            )
        return arrays[names[0]], arrays[names[1]]


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Whatever is raised inside is the user's: exit 3, with their traceback.

    Raises:
        UserCodeError: In the place of every exception but ours, memory running out, and Ctrl-C.
    """
    try:
        yield
    except (EnsembleKitError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # their code may raise anything
        said, frames = str(error), _their_traceback(error)
        text = f"{what} raised {type(error).__name__}" + (f": {said}" if said else "")
        text += ". The traceback is of your code:" if frames else ""
        raise UserCodeError(text, traceback=frames) from error


def _their_traceback(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(__file__).parent) + os.sep
    skipped = (package, "<frozen importlib")
    own = [f for f in frames if not f.filename.startswith(skipped)]
    return "".join(traceback.format_list(own))


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _kind(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"
