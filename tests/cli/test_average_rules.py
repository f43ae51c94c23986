"""`ensemblekit average` with each rule: its flags, and bytes that do not depend on the naming."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ensemblekit.averaging import RULES
from ensemblekit.cli import main

from ..comparing import CODE, mlp, problem, save
from ..helpers import contents, make_arrays, run, run_json, sha256, write_series

FLAGS = {
    "uniform": [],
    "weighted": ["--coefficients", "1,2,3,4"],
    "ema": ["--decay", "0.7"],
    "lawa": ["--k", "3"],
    "wsm-linear": [],
    "wsm-1-sqrt": [],
    "posthoc-ema": ["--width", "0.1", "--stored-widths", "0.05,0.1,0.05,0.1"],
    "greedy-soup": [
        *("--model", "targets.py:mlp", "--model-arg", "norm=False"),
        *("--val-data", "targets.py:data"),
    ],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four snapshots of a small network, and the targets that a greedy soup wants."""
    folder = tmp_path_factory.mktemp("rules")
    import torch

    one = problem("classes")
    (folder / "targets.py").write_text(CODE)
    states = []
    for k, state in enumerate(one.weights):
        torch.manual_seed(k)
        fresh = mlp(norm=False).state_dict()
        linear = {"0.weight": "0.weight", "0.bias": "0.bias", "2.weight": "3.weight"}
        moved = {new: state[old] for new, old in (linear | {"2.bias": "3.bias"}).items()}
        assert fresh.keys() == moved.keys()
        states.append(moved)
    save(folder / "ckpts", states)
    return folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_every_rule_is_here() -> None:
    assert FLAGS.keys() == RULES.keys()


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_order_of_naming_does_not_matter(work: Path, tmp_path: Path, name: str) -> None:
    files = [f"ckpts/snap_{k}.pt" for k in (1, 2, 3, 4)]
    orders = [["ckpts"], files, *list(itertools.permutations(files))[1::7]]
    outputs = set()
    with inside(work), contextlib.redirect_stdout(io.StringIO()):
        for n, order in enumerate(orders):
            for ending in ("safetensors", "pt"):
                out = tmp_path / f"{n}.{ending}"
                line = ["average", *order, "--method", name, *FLAGS[name], "-o", str(out)]
                assert main.run(line) == 0
                outputs.add((ending, sha256(out)))
    assert len(outputs) == 2


@pytest.mark.parametrize(
    "flags, name, weights",
    [
        (["--decay", "0.5"], "ema", [0.125, 0.125, 0.25, 0.5]),
        (["--half-life", "1"], "ema", [0.125, 0.125, 0.25, 0.5]),
        (["--k", "2"], "lawa", [0, 0, 0.5, 0.5]),
        (["--method", "lawa", "--last", "2"], "lawa", [0.5, 0.5]),
        (["--method", "wsm-linear"], "wsm-linear", [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        (["--coefficients", "1,1,2,0"], "weighted", [0.25, 0.25, 0.5, 0]),
        ([], "uniform", [0.25] * 4),
    ],
)
def test_flags(tmp_path: Path, flags: list[str], name: str, weights: list[float]) -> None:
    write_series(tmp_path / "ckpts", 4)
    value = run_json("average", "ckpts", *flags, cwd=tmp_path)
    assert value["method"] == name
    assert [s["coefficient"] for s in value["snapshots"]] == pytest.approx(weights)
    found = load_file(tmp_path / "averaged.safetensors")
    arrays = [make_arrays(k) for k in range(5 - len(weights), 5)]
    for key, values in found.items():
        expected = sum(w * a[key].astype(np.float64) for w, a in zip(weights, arrays, strict=True))
        np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("name, split", [("greedy-soup", "val"), ("uniform", None)])
def test_the_manifest_says_what_a_rule_was_chosen_on(
    work: Path, tmp_path: Path, name: str, split: str | None
) -> None:
    out = tmp_path / "out.safetensors"
    with inside(work), contextlib.redirect_stdout(io.StringIO()):
        line = ["average", "ckpts", "--method", name, *FLAGS[name], "-o", str(out)]
        assert main.run(line) == 0
    assert json.loads(Path(f"{out}.json").read_text())["candidate"]["chosen_on"] == split


WRONG: dict[str, tuple[list[str], int, str, str]] = {
    "two-rules": (["--decay", "0.9", "--k", "2"], 2, "--k is no option of method 'ema'", "lawa"),
    "other-rule": (["--method", "uniform", "--decay", "0.9"], 2, "--decay is no option", "ema"),
    "twice": (["--decay", "0.9", "--half-life", "2"], 2, "one of them", ""),
    "range": (["--decay", "1.5"], 2, "--decay 1.5", ""),
    "too-many": (["--k", "9"], 2, "there are 4 snapshots", ""),
    "no-width": (
        ["--method", "posthoc-ema", "--stored-widths", "0.1"], 2, "needs a width", "--width"
    ),
    "no-stored-width": (["--width", "0.1"], 3, "raw weights", "--method ema"),
    "no-data": (["--method", "greedy-soup"], 2, "chosen on data", "--val-data"),
    "no-number": (["--decay", "much"], 2, "much", ""),
    "no-list": (
        ["--width", "0.1", "--stored-widths", "a,b"], 2, "'--stored-widths': 'a,b' is not", "--help"
    ),
    "no-rule": (["--method", "emma"], 2, "emma", "did you mean 'ema'?"),
    "policy": (["--bn", "averge"], 2, "averge", "did you mean 'average'?"),
    "far-policy": (["--bn", "xyz"], 2, "xyz", "--help"),
    "dtype": (["--dtype", "int8"], 2, "int8", ""),
    "dtype-word": (["--dtype", "bfloat61"], 2, "bfloat61", "bfloat16"),
    "shard": (["-o", "out", "--max-shard-size", "many"], 2, "'--max-shard-size': 'many' is not", ""),
    "no-shard": (["-o", "out", "--max-shard-size", "0"], 2, "more than 0", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_usage(tmp_path: Path, name: str) -> None:
    flags, code, words, hint = WRONG[name]
    write_series(tmp_path / "ckpts", 4)
    before = contents(tmp_path)
    done = run("average", "ckpts", *flags, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert hint in done.stderr.partition("hint:")[2] or not hint
    assert contents(tmp_path) == before


def test_raw_weights_beside_moving_averages(tmp_path: Path) -> None:
    import torch

    for k in (1, 2, 3):
        state = {"w": torch.full((3,), float(k))}
        value = {"model": state, "ema": {"w": state["w"] * 10}, "step": 100 * k}
        torch.save(value, tmp_path / f"snap_{k}.pt")
    line = ("average", "*.pt", "--width", "0.1", "--stored-widths", "0.1")
    done = run(*line, "--weights", "model", cwd=tmp_path)
    assert done.returncode == 3
    assert "--weights ema" in done.stderr
    done = run(*line, "--weights", "ema", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "averaged.safetensors")["w"].tolist() == [30.0] * 3


def test_an_order_is_needed_where_coefficients_differ(tmp_path: Path) -> None:
    write_series(tmp_path / "ckpts", 3)
    for k, letter in enumerate("pqr", 1):
        (tmp_path / f"ckpts/snap_{k}.safetensors").rename(tmp_path / f"ckpts/{letter}.safetensors")
    for flags in (["--decay", "0.5"], ["--k", "2"], ["--method", "wsm-linear"]):
        done = run("average", "ckpts", *flags, cwd=tmp_path)
        assert done.returncode == 2
        assert "need an order" in done.stderr
    assert run("average", "ckpts", "--k", "3", cwd=tmp_path).returncode == 0
