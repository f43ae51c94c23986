"""Owns what holds for every test: settings of whoever runs them do not leak in."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ENSEMBLEKIT_")]:
        monkeypatch.delenv(name)
