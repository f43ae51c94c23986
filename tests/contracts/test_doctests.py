"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import ensemblekit

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(ensemblekit.__path__, "ensemblekit.")
    if "demo_files" not in module.name and not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), verbose=False)
    assert failed == 0
