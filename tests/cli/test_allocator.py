"""Freed memory is kept where libc can, and whoever set their own wishes has them."""

from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ensemblekit.cli.allocator import keep_freed_memory


@pytest.fixture
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What `mallopt` is called with, on a Linux without settings of anyone."""
    found: list[tuple[int, int]] = []
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)

    def mallopt(what: int, value: int) -> int:
        found.append((what, value))
        return int(not (old and what == -3 and value > 1 << 25))

    old = getattr(request, "param", False)
    libc = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    return found


def test_the_real_one_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    keep_freed_memory()
    keep_freed_memory()
    assert capfd.readouterr() == ("", "")


def test_both_thresholds_are_set(calls: list[tuple[int, int]]) -> None:
    keep_freed_memory()
    assert dict(calls) == {-1: 1 << 30, -3: 1 << 29}
    assert all(value < 1 << 31 for _, value in calls), "mallopt takes an int"


@pytest.mark.parametrize("calls", [True], indirect=True)
def test_an_older_libc_gets_what_it_takes(calls: list[tuple[int, int]]) -> None:
    keep_freed_memory()
    assert dict(calls) == {-1: 1 << 30, -3: 1 << 25}


@pytest.mark.parametrize(
    "name",
    ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"],
)
def test_own_settings_are_left_alone(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    keep_freed_memory()
    assert calls == []


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    keep_freed_memory()
    assert calls == []


@pytest.mark.parametrize("raised", [AttributeError("mallopt"), OSError("no libc")])
def test_another_libc_is_no_error(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def library(name: Any) -> Any:
        raise raised

    monkeypatch.setattr(ctypes, "CDLL", library)
    keep_freed_memory()
    assert calls == []
