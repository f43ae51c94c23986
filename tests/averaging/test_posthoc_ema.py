"""`posthoc-ema` against numeric integrals, and against averages that were tracked directly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from ensemblekit import average
from ensemblekit.averaging.posthoc_ema import exponent, posthoc_ema
from ensemblekit.candidates import Row
from ensemblekit.discovery import discover
from ensemblekit.errors import IncompatibleError, UsageError
from ensemblekit.selection import Selection

from ..helpers import Array, write_safetensors, write_torch
from .series import at_steps, mixed


def profile(g: float, end: float, time: float) -> float:
    """How much the weights of a time count in a power-function average at `end`."""
    return (g + 1) * time**g / end ** (g + 1) if time <= end else 0.0


def product(g: float, end: float, h: float, other: float) -> float:
    value, _ = quad(lambda t: profile(g, end, t) * profile(h, other, t), 0, min(end, other))
    return float(value)


def by_quadrature(width: float, stored: list[float], times: list[float]) -> Array:
    """Least squares in the space of profiles, integrals by adaptive quadrature."""
    newest = max(times)
    ends = [t / newest for t in times]
    powers = [exponent(w) for w in stored]
    pairs = list(zip(powers, ends, strict=True))
    gram = [[product(g, t, h, u) for h, u in pairs] for g, t in pairs]
    wanted = exponent(width)
    right = [product(g, t, wanted, 1.0) for g, t in pairs]
    solution = np.linalg.lstsq(np.array(gram), np.array(right), rcond=None)[0]
    return np.asarray(solution / solution.sum())


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.28, 1 / math.sqrt(12)])
def test_exponent_has_that_width(width: float) -> None:
    g = exponent(width)
    mean, _ = quad(lambda t: t * profile(g, 1, t), 0, 1)
    spread, _ = quad(lambda t: (t - mean) ** 2 * profile(g, 1, t), 0, 1)
    assert math.sqrt(spread) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize(
    "width, stored, steps",
    [
        (0.1, [0.05] * 4, [1000, 2000, 3000, 4000]),
        (0.15, [0.1] * 3, [100, 110, 500]),
        (0.075, [0.05, 0.1, 0.05, 0.1], [10, 11, 30, 31]),
        (0.05, [0.05, 0.05], [1, 2]),
        (0.28, [0.05], [7]),
    ],
)
def test_coefficients(tmp_path: Path, width: float, stored: list[float], steps: list[int]) -> None:
    snapshots = at_steps(tmp_path, [*steps]) if len(steps) > 1 else None
    if snapshots is None:  # a number in a single name is no order: a file that says its step
        write_torch(tmp_path / "one.pt", {"model": {"w": torch.ones(3)}, "step": steps[0]})
        snapshots = discover(tmp_path)
    row = posthoc_ema(snapshots, width=width, stored_widths=tuple(stored))
    expected = by_quadrature(width, stored, [float(s) for s in steps])
    np.testing.assert_allclose(row.weights, expected, rtol=1e-5, atol=1e-7)


def test_a_stored_width_at_the_newest_time_is_that_average(tmp_path: Path) -> None:
    row = posthoc_ema(at_steps(tmp_path, [10, 20, 30]), width=0.05, stored_widths=(0.05,))
    np.testing.assert_allclose(row.weights, [0, 0, 1], atol=1e-9)


def tracked(walk: Array, widths: list[float]) -> dict[float, list[Array]]:
    """Power-function averages of a walk at every step: the update of Karras 2024, equation 127."""
    found: dict[float, list[Array]] = {}
    for width in widths:
        g, held = exponent(width), np.zeros(walk.shape[1])
        found[width] = []
        for step, weights in enumerate(walk, 1):
            decay = (1 - 1 / step) ** (g + 1)
            held = decay * held + (1 - decay) * weights
            found[width].append(held)
    return found


@pytest.mark.parametrize("width", [0.06, 0.08, 0.1, 0.15])
def test_near_the_average_that_was_tracked(tmp_path: Path, width: float) -> None:
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(4000, 30)), axis=0) + 5
    stored = [0.05, 0.1]
    averages = tracked(walk, [*stored, width])
    steps = [k for k in range(250, 4001, 250) for _ in stored]
    kept = [
        averages[w][step - 1] for step, w in zip(steps, stored * (len(steps) // 2), strict=True)
    ]
    for step, w, values in zip(steps, stored * (len(steps) // 2), kept, strict=True):
        arrays = {"w": values.astype(np.float32)}
        state = {"ema": {"w": torch.from_numpy(arrays["w"])}, "step": step}
        write_torch(tmp_path / f"ema-{w:.3f}-{step:07}.pt", state)
    snapshots = discover(tmp_path, selection=Selection(weights="ema"))
    assert len(snapshots) == len(steps)
    row = posthoc_ema(snapshots, width=width)
    by_name = {
        f"ema-{w:.3f}-{s:07}.pt": v for s, w, v in zip(steps, stored * 16, kept, strict=True)
    }
    found = mixed(row, [by_name[s.path.name] for s in snapshots.snapshots])
    exact = averages[width][-1]
    error = np.linalg.norm(found - exact)
    nearest = min(np.linalg.norm(averages[w][-1] - exact) for w in stored)
    assert error < 0.02 * np.linalg.norm(exact - walk[-1])
    if width not in stored:
        assert error < 0.1 * nearest, "much nearer than any of the stored ones"


RAW = {"width": 0.1}


def saved(folder: Path, *states: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, state in enumerate(states, 1):
        write_torch(folder / f"snap_{k}.pt", {**state, "step": 100 * k})
    return folder


def weights(k: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(k))}


def test_raw_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, *({"model": weights(k), "ema": weights(k + 0.5)} for k in (1, 2)))
    for widths in (None, (0.05,)):
        chosen = discover(folder, selection=Selection(weights="model"))
        with pytest.raises(IncompatibleError, match="raw weights") as raised:
            posthoc_ema(chosen, width=0.1, stored_widths=widths)
        assert "--weights ema" in (raised.value.hint or "")
    chosen = discover(folder, selection=Selection(weights="ema"))
    posthoc_ema(chosen, width=0.1, stored_widths=(0.05,))


def test_a_plain_file_is_what_its_owner_says(tmp_path: Path) -> None:
    snapshots = at_steps(tmp_path, [10, 20])
    posthoc_ema(snapshots, width=0.1, stored_widths=(0.05,))
    with pytest.raises(IncompatibleError, match="raw weights"):
        posthoc_ema(snapshots, width=0.1)


@pytest.mark.parametrize("name", ["sigma_rel", "ema_std", "std"])
def test_widths_that_the_files_say(tmp_path: Path, name: str) -> None:
    widths = (0.05, 0.1)
    states = ({"ema": weights(k), name: widths[k]} for k in range(2))
    snapshots = discover(saved(tmp_path, *states), selection=Selection(weights="ema"))
    found = posthoc_ema(snapshots, width=0.08)
    assert found == posthoc_ema(snapshots, width=0.08, stored_widths=widths)


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "needs a width"),
        ({"width": 0.0}, "width 0:"),
        ({"width": -0.1}, "width -0.1:"),
        ({"width": 0.3}, "width 0.3:"),
        ({"width": math.nan}, "width nan:"),
        ({"width": 0.1, "stored_widths": (0.5,)}, "width 0.5:"),
        ({"width": 0.1, "stored_widths": (0.1, 0.1)}, "2 widths for 3"),
        ({"width": 0.1, "stored_widths": (0.1, math.inf, 0.1)}, "width inf:"),
    ],
)
def test_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    given = {"stored_widths": (0.05,), **options}
    with pytest.raises(UsageError, match=words):
        posthoc_ema(at_steps(tmp_path, [1, 2, 3]), **given)


def test_no_width_is_known(tmp_path: Path) -> None:
    folder = saved(tmp_path, {"ema": weights(1)}, {"ema": weights(2)})
    with pytest.raises(UsageError, match=r"no width is known of snap_1.pt, snap_2.pt") as raised:
        posthoc_ema(discover(folder, selection=Selection(weights="ema")), width=0.1)
    assert "--stored-widths" in (raised.value.hint or "")


def test_time_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the step of every snapshot"):
        posthoc_ema(at_steps(tmp_path / "zero", [0, 1]), width=0.1, stored_widths=(0.05,))
    for letter in "pq":
        arrays = {"w": np.full(3, ord(letter), np.float32)}
        write_safetensors(tmp_path / f"{letter}.safetensors", arrays)
    with pytest.raises(UsageError, match="needs the step of every snapshot"):
        posthoc_ema(
            discover(*sorted(tmp_path.glob("*.safetensors"))), width=0.1, stored_widths=(0.05,)
        )


def test_negative_coefficients_through_average(tmp_path: Path) -> None:
    """A narrower average than the stored ones extrapolates; weights come out as the row says."""
    values = list(np.random.default_rng(2).normal(size=(3, 50)))
    snapshots = at_steps(tmp_path, [100, 200, 300], [v.astype(np.float32) for v in values])
    options: dict[str, Any] = {"width": 0.06, "stored_widths": (0.1,)}
    row = posthoc_ema(snapshots, **options)
    assert min(row.weights) < 0
    made = average(tmp_path, method="posthoc-ema", rule_options=options).state
    assert made is not None
    expected = mixed(Row(row.coefficients, row.divisor), [v.astype(np.float32) for v in values])
    np.testing.assert_allclose(made["w"], expected, rtol=1e-6)


def several_widths(folder: Path, names: str) -> None:
    """Averages of two widths at each of three steps."""
    for step in (1000, 2000, 3000):
        for width in (0.05, 0.1):
            path = folder / names.format(width=width, step=step)
            write_safetensors(path, {"w": np.array([step, width], np.float32)})


def test_two_widths_at_each_step_draw_no_warning(tmp_path: Path) -> None:
    several_widths(tmp_path, "ema-{width:.3f}-{step:07}.safetensors")
    result = average(tmp_path, method="posthoc-ema", rule_options={"width": 0.08})
    assert not [text for text in result.warnings if "same" in text]


def test_widths_are_not_guessed_where_times_repeat(tmp_path: Path) -> None:
    several_widths(tmp_path, "ema-{step:07}-of-{width:.3f}.safetensors")
    widths = {"width": 0.08, "stored_widths": (0.05, 0.1) * 3}
    with pytest.raises(UsageError, match="several averages were stored at one time"):
        average(tmp_path, method="posthoc-ema", rule_options=widths)
