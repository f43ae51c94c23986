"""`average` with a model and data: from a trained network's snapshots to figures that hold."""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ensemblekit
from ensemblekit import ModelOptions
from ensemblekit.cli.main import run
from ensemblekit.commands.measure import _judge
from ensemblekit.commands.result import AverageResult, Evaluation, Measured
from ensemblekit.errors import EnsembleKitError
from ensemblekit.targets import _file, parse
from tests import helpers

torch.set_num_threads(1)

CODE = '''
from collections import OrderedDict
import torch
from torch import nn

SIZES = {"train": 517, "val": 301, "test": 300}

def make(width=6, classes=4, last="fc"):
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(2, width, 3, bias=False), bn1=nn.BatchNorm2d(width), act1=nn.ReLU(),
        conv2=nn.Conv2d(width, width, 3, bias=False), bn2=nn.BatchNorm2d(width), act2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), bn3=nn.BatchNorm1d(width),
        drop=nn.Dropout(0.1), **{last: nn.Linear(width, classes)}))

def data(split):
    generator = torch.Generator().manual_seed(["train", "val", "test"].index(split))
    centres = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, 4, (SIZES[split],), generator=generator)
    return centres[y] + 2.0 * torch.randn(len(y), 2, 8, 8, generator=generator), y

def shifted(split):
    x, y = data(split)
    return x * 4 + 9, y

def stream(split):
    x, y = data(split)
    yield from zip(x.split(128), y.split(128))

def in_order(split):
    x, y = data(split)
    order = y.argsort()
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x[order], y[order]), batch_size=64)

def raises(split="train"):
    raise ValueError("no data today")

def raises_later(split):
    x, y = data(split)
    yield x[:64], y[:64]
    raise ValueError("no more data")

class Raising(torch.utils.data.Dataset):
    def __init__(self, split="train"):
        pass
    def __len__(self):
        return 300
    def __getitem__(self, index):
        raise OSError("image is gone")

def flat(split):
    x, y = data(split)
    return x.flatten(1), y

def unlabelled(split):
    return data(split)[0]

def chatty():
    print("building the model")
    return make()

class Clumsy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()
    def forward(self, x):
        raise AssertionError("forward is broken")

def nothing():
    return None

class Shared(nn.Module):
    """One BatchNorm layer under two names."""
    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.second = self.first
        self.head = nn.Linear(2, 4)
    def forward(self, x):
        return self.head(self.second(x).mean((2, 3)))
'''

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """A trained network: its code, and what its snapshots held."""

    module: ModuleType
    weights: tuple[Weights, ...]
    other_seed: Weights


def train(module: ModuleType, seed: int, *, snapshots: int) -> list[Weights]:
    torch.manual_seed(seed)
    model = module.make()
    x, y = module.data("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = []
    for epoch in range(2 + snapshots):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch >= 2:
            found.append({key: value.clone() for key, value in model.state_dict().items()})
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("run") / "net.py"
    path.write_text(CODE)
    module = _file(parse(f"{path}:make"))
    weights = train(module, 0, snapshots=4)
    return Run(module, tuple(weights), train(module, 1, snapshots=1)[0])


def save(folder: Path, weights: Sequence[Weights]) -> Path:
    folder.mkdir()
    for number, state in enumerate(weights, start=1):
        torch.save({"step": 100 * number, "state_dict": state}, folder / f"snap_{number}.pt")
    return folder


@pytest.fixture
def here(tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with `net.py` and `ckpts/`."""
    (tmp_path / "net.py").write_text(CODE)
    save(tmp_path / "ckpts", trained.weights)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in os.environ if name.startswith("ENSEMBLEKIT_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)
    forget(tmp_path)


def forget(folder: Path) -> None:
    """What a fresh process would not know yet: modules and search paths of the folder."""
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == folder:
            del sys.modules[name]
    importlib.invalidate_caches()


def average(bn: str = "auto", path: str | None = None, **options: Any) -> AverageResult:
    """`average` on `ckpts/`; the model and its arguments as options."""
    rule = options.pop("rule_options", None)
    options = {"model": "net.py:make", "device": "cpu"} | options
    return ensemblekit.average(
        "ckpts",
        path,
        method="weighted" if rule else "uniform",
        rule_options=rule,
        model=ModelOptions(**options),
        bn=bn,
    )


def quality(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Accuracy and NLL, written down plainly."""
    x, y = data
    with torch.no_grad():
        logits = model.eval()(x)
    right = int((logits.argmax(1) == y).sum())
    return right / len(y), float(F.cross_entropy(logits.double(), y))


def mean_of(weights: Sequence[Weights], key: str) -> torch.Tensor:
    return torch.stack([w[key].double() for w in weights]).mean(0)


TRAIN = {"train_data": "net.py:data"}
VAL = {"val_data": "net.py:data"}
TEST = {"test_data": "net.py:data"}
POLICIES: list[tuple[str, dict[str, str], str | int]] = [
    ("auto", {}, "averaged"),
    ("auto", TRAIN, "recomputed"),
    ("auto", VAL, "averaged"),
    ("auto", TRAIN | VAL | TEST, "recomputed"),
    ("average", {}, "averaged"),
    ("average", TRAIN, "averaged"),
    ("recompute", {}, 2),
    ("recompute", VAL, 2),
    ("recompute", TRAIN, "recomputed"),
    ("error", {}, 5),
    ("error", VAL, 5),
    ("error", TRAIN, "recomputed"),
]


@pytest.mark.parametrize("bn, data, wanted", POLICIES)
def test_policies(here: Path, trained: Run, bn: str, data: Any, wanted: str | int) -> None:
    if isinstance(wanted, int):
        with pytest.raises(EnsembleKitError) as caught:
            average(bn, **data)
        assert caught.value.exit_code == wanted
        assert "--train-data" in str(caught.value.hint)
        return
    result = average(bn, **data)
    assert result.batch_norm["policy"] == wanted
    assert result.batch_norm["layers"] == 3
    assert result.batch_norm["samples"] == (517 if wanted == "recomputed" else 0)
    advised = [text for text in result.warnings if "averaged statistics" in text]
    assert bool(advised) == (wanted == "averaged" and bn != "average")
    assert result.state is not None
    stored = torch.from_numpy(result.state["bn1.running_var"])
    plain = mean_of(trained.weights, "bn1.running_var")
    assert torch.allclose(stored.double(), plain, rtol=1e-6) == (wanted == "averaged")


def test_recomputed_statistics_are_the_populations(here: Path, trained: Run) -> None:
    state = average(**TRAIN).state
    assert state is not None
    x, _ = trained.module.data("train")
    weight = torch.from_numpy(state["conv1.weight"])
    seen = F.conv2d(x, weight).double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(state["bn1.running_mean"], seen.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["bn1.running_var"], seen.var(1, correction=0), rtol=1e-6)
    for key, value in trained.weights[-1].items():
        if key.endswith("num_batches_tracked"):
            assert state[key] == value, "counters take the newest"
        elif "running" not in key:
            np.testing.assert_allclose(state[key], mean_of(trained.weights, key), rtol=1e-6)


def test_every_member_and_both_averages_are_evaluated(here: Path, trained: Run) -> None:
    found = average(**TRAIN | VAL | TEST).evaluation
    names = [f"snap_{n}.pt" for n in range(1, 5)]
    rows = [(Path(e.candidate).name, e.batch_norm, e.split) for e in found]
    assert rows == [
        *((name, "own", split) for name in names for split in ("val", "test")),
        *(("average", kind, s) for kind in ("averaged", "recomputed") for s in ("val", "test")),
    ]
    assert {(e.split, e.samples) for e in found} == {("val", 301), ("test", 300)}
    model = trained.module.make()
    for n, weights in enumerate(trained.weights):
        model.load_state_dict(weights)
        for e in found[2 * n : 2 * n + 2]:
            wanted = quality(model, trained.module.data(e.split))
            assert (e.accuracy, e.nll) == pytest.approx(wanted, abs=1e-6)


def test_auto_keeps_the_better_one_on_validation_data(here: Path, trained: Run) -> None:
    wrong = {"train_data": "net.py:shifted"}
    kept = average(**wrong, **VAL)
    by_kind = {e.batch_norm: e for e in kept.evaluation if e.candidate == "average"}
    assert set(by_kind) == {"averaged", "recomputed"}
    assert by_kind["averaged"].nll < by_kind["recomputed"].nll
    assert kept.batch_norm["policy"] == "averaged"
    assert kept.state is not None
    np.testing.assert_allclose(
        kept.state["bn1.running_mean"], mean_of(trained.weights, "bn1.running_mean"), rtol=1e-5
    )
    for bn, data in (("recompute", VAL), ("auto", TEST)):  # insisted; and test data choose nothing
        assert average(bn, **wrong, **data).batch_norm["policy"] == "recomputed"


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bn", ["auto", "average"])
def test_the_output_is_the_model_that_was_evaluated(
    here: Path, trained: Run, kind: torch.dtype, bn: str
) -> None:
    for n, weights in enumerate(trained.weights, start=1):
        lower = {k: v.to(kind) if v.is_floating_point() else v for k, v in weights.items()}
        torch.save({"step": n, "state_dict": lower}, f"ckpts/snap_{n}.pt")
    result = average(bn, "out.safetensors", **TRAIN | TEST)
    state = load_file("out.safetensors")
    assert state["conv1.weight"].dtype == kind
    assert state["bn1.running_var"].dtype == kind
    model = trained.module.make()
    model.load_state_dict(state)
    shipped = [
        e
        for e in result.evaluation
        if e.candidate == "average" and e.batch_norm == result.batch_norm["policy"]
    ]
    wanted = quality(model, trained.module.data("test"))
    assert [(e.accuracy, e.nll) for e in shipped] == [pytest.approx(wanted, abs=1e-6)]
    manifest = json.loads(Path("out.safetensors.json").read_text())
    assert manifest["evaluation"] == list(result.to_json()["evaluation"])
    assert manifest["batch_norm"] == result.batch_norm


def test_recomputing_helps_here(here: Path) -> None:
    found = {e.batch_norm: e for e in average(**TRAIN | TEST).evaluation}
    assert found["recomputed"].nll < found["averaged"].nll


def test_an_average_below_its_worst_member_is_called_out(here: Path, trained: Run) -> None:
    torch.save({"step": 500, "state_dict": trained.other_seed}, "ckpts/snap_5.pt")
    for name in ("snap_1.pt", "snap_2.pt", "snap_3.pt"):
        Path("ckpts", name).unlink()
    result = average(**TRAIN | VAL)
    (text,) = [t for t in result.warnings if "worse than its worst member" in t]
    members = [e for e in result.evaluation if e.candidate != "average"]
    worst = min(members, key=lambda e: e.accuracy)
    assert worst.candidate in text
    assert f"{worst.accuracy:.4f}" in text
    assert "on val" in text


def figures(*pairs: tuple[str, float], split: str = "val") -> list[Evaluation]:
    return [Evaluation(name, "none", split, 100, accuracy, 1.0) for name, accuracy in pairs]


@pytest.mark.parametrize(
    "average_, warned, noted",
    [(0.95, 0, 0), (0.9, 0, 0), (0.85, 0, 1), (0.8, 0, 1), (0.75, 1, 0)],
)
def test_judgement(average_: float, warned: int, noted: int) -> None:
    """Below the best snapshot is worth a remark, below the worst one a warning."""
    members = (("a.pt", 0.8), ("b.pt", 0.9))
    found = Measured("none", evaluation=figures(*members, ("average", average_)))
    _judge(found)
    assert (len(found.warnings), len(found.notes)) == (warned, noted)
    assert all("b.pt alone" in t and f"0.9000 against {average_:.4f}" in t for t in found.notes)


def test_judgement_is_by_validation_data() -> None:
    test = figures(("a.pt", 0.9), ("b.pt", 0.9), ("average", 0.1), split="test")
    found = Measured("none", evaluation=[*test, *figures(("a.pt", 0.5), ("average", 0.6))])
    _judge(found)
    assert (found.warnings, found.notes) == ([], [])
    found = Measured("none", evaluation=test)
    _judge(found)
    assert "on test" in found.warnings[0]


def test_judgement_is_of_what_is_written() -> None:
    """Not of the average with the other statistics."""
    average_ = [Evaluation("average", kind, "val", 9, a, 1.0) for kind, a in BOTH]
    found = Measured("recomputed", evaluation=[*figures(("a.pt", 0.5), ("b.pt", 0.6)), *average_])
    _judge(found)
    assert (found.warnings, found.notes) == ([], [])


BOTH = (("averaged", 0.1), ("recomputed", 0.7))


def test_a_better_snapshot_is_noted(here: Path, trained: Run) -> None:
    """One snapshot sees the first class only; the average does, too, and is not worse than it."""
    for number, bias in ((1, 0.0), (2, 1000.0)):
        state = {key: value.clone() for key, value in trained.weights[3].items()}
        state["fc.bias"][0] += bias
        torch.save({"step": number, "state_dict": state}, f"ckpts/snap_{number}.pt")
    for name in ("snap_3.pt", "snap_4.pt"):
        Path("ckpts", name).unlink()
    result = average("average", "out.pt", **VAL)
    [note] = result.notes
    assert "snap_1.pt alone has the higher accuracy on val" in note
    assert not any("accuracy" in text for text in result.warnings)
    assert result.to_json()["notes"] == (note,)
    assert average("average", "out.pt", **VAL).notes == (note,)


def test_good_averages_draw_no_warning(here: Path) -> None:
    assert average(**TRAIN | VAL | TEST).warnings == ()


def test_frozen_layers_are_kept_and_named(here: Path, trained: Run) -> None:
    for path in Path("ckpts").iterdir():
        state = torch.load(path)
        for key in ("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"):
            state["state_dict"][key] = trained.weights[0][key]
        torch.save(state, path)
    result = average(**TRAIN)
    assert result.state is not None
    for key in ("bn1.running_mean", "bn1.running_var"):
        assert result.state[key].tolist() == trained.weights[0][key].tolist()
    assert result.batch_norm["frozen"] == 1
    assert [t for t in result.warnings if "frozen" in t and "bn1" in t]


@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)])
def test_frozen_layers_are_kept_whatever_takes_part(
    here: Path, trained: Run, coefficients: tuple[float, ...]
) -> None:
    keys = ("bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked")
    for path in Path("ckpts").iterdir():
        state = torch.load(path)
        state["state_dict"].update({key: trained.weights[0][key] for key in keys})
        torch.save(state, path)
    result = average("recompute", rule_options={"coefficients": coefficients}, **TRAIN)
    assert result.state is not None
    assert result.batch_norm["policy"] == "recomputed"
    assert result.state["bn1.running_var"].tolist() == trained.weights[0][keys[1]].tolist()


def test_layers_that_were_never_updated_are_recomputed(here: Path, trained: Run) -> None:
    """Their statistics are equal in all snapshots, too, but nobody froze them."""
    for path in Path("ckpts").iterdir():
        state = torch.load(path)
        state["state_dict"]["bn1.running_mean"].zero_()
        state["state_dict"]["bn1.running_var"].fill_(1)
        torch.save(state, path)
    result = average("recompute", **TRAIN)
    assert result.state is not None
    assert not any("never updated" in text for text in result.warnings)
    assert result.batch_norm["frozen"] == 0
    assert (result.state["bn1.running_var"] != 1).all()
    with pytest.raises(EnsembleKitError, match="--bn error"):
        ensemblekit.average("ckpts", bn="error")


def test_one_snapshot(here: Path, trained: Run) -> None:
    for name in ("snap_1.pt", "snap_2.pt", "snap_3.pt"):
        Path("ckpts", name).unlink()
    plain = average(**TRAIN | TEST)
    assert plain.batch_norm["policy"] == "none"
    assert plain.warnings == ()
    assert [e.batch_norm for e in plain.evaluation] == ["own", "none"]
    assert plain.evaluation[0].nll == plain.evaluation[1].nll
    assert plain.state is not None
    assert all(plain.state[k].tolist() == v.tolist() for k, v in trained.weights[3].items())
    again = average("recompute", **TRAIN | TEST)
    assert again.batch_norm["policy"] == "recomputed"
    assert [e.batch_norm for e in again.evaluation] == ["own", "none", "recomputed"]


@pytest.mark.parametrize(
    "options, samples, evaluated",
    [
        ({"bn_samples": 100}, 100, 300),
        ({"limit": 50}, 50, 50),
        ({"bn_samples": 200, "limit": 100}, 100, 100),
        ({"bn_samples": 9999, "limit": 9999}, 517, 300),
    ],
)
def test_limits(here: Path, options: Any, samples: int, evaluated: int) -> None:
    result = average(**TRAIN | TEST | options)
    assert result.batch_norm["samples"] == samples
    assert {e.samples for e in result.evaluation} == {evaluated}


def test_the_seed_decides_the_result(here: Path) -> None:
    def deep(seed: int) -> list[float]:
        state = average(**TRAIN, seed=seed, batch_size=64).state
        assert state is not None
        values: list[float] = state["bn3.running_var"].tolist()
        return values

    assert deep(1) == deep(1)
    assert deep(1) != deep(2)


def test_lower_precision_is_near(here: Path) -> None:
    plain, found = average(**TRAIN | TEST), average(**TRAIN | TEST, precision="bf16")
    pairs = zip(plain.evaluation, found.evaluation, strict=True)
    assert max(abs(a.nll - b.nll) for a, b in pairs) < 0.02


def test_a_prefix_between_snapshots_and_model(here: Path) -> None:
    Path("wrapped.py").write_text(
        "from torch import nn\nimport net\ndef make(): return nn.Sequential(net.make())"
    )
    plain, found = average(**TRAIN), average(**TRAIN, model="wrapped.py:make")
    assert plain.state is not None
    assert found.state is not None
    assert list(found.state) == list(plain.state)
    for key, value in plain.state.items():
        np.testing.assert_array_equal(found.state[key], value)


def test_python_objects_in_place_of_targets(here: Path, trained: Run) -> None:
    module = trained.module
    loader = DataLoader(TensorDataset(*module.data("test")), batch_size=50)
    found = average(model=module.make(), train_data=module.data("train"), test_data=loader)
    wanted = average(**TRAIN | TEST)
    assert found.batch_norm == wanted.batch_norm
    assert [e.accuracy for e in found.evaluation] == [e.accuracy for e in wanted.evaluation]
    assert [e.nll for e in found.evaluation] == pytest.approx([e.nll for e in wanted.evaluation])


def test_a_callers_model_is_given_back_as_it_was(here: Path, trained: Run) -> None:
    model = trained.module.make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    average(model=model, **TRAIN | TEST)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_generator_serves_every_candidate(here: Path) -> None:
    found = average(train_data="net.py:stream", test_data="net.py:stream")
    assert [e.samples for e in found.evaluation] == [300] * 6
    assert found.batch_norm["samples"] == 517


def test_sorted_batches_draw_a_warning(here: Path) -> None:
    assert [t for t in average(train_data="net.py:in_order").warnings if "sorted by label" in t]


def test_statistics_that_must_not_be_averaged_can_be_recomputed(here: Path) -> None:
    for n, path in enumerate(sorted(Path("ckpts").iterdir())):
        if n < 2:
            state = torch.load(path)
            state["state_dict"]["bn1.running_var"] *= 1 + 9 * n
            torch.save(state, path)
        else:
            path.unlink()
    rule = {"coefficients": (2.0, -1.0)}
    with pytest.raises(EnsembleKitError, match="variance negative"):
        average("average", rule_options=rule)
    result = average("recompute", rule_options=rule, **TRAIN)
    assert result.state is not None
    assert (result.state["bn1.running_var"] > 0).all()


def test_a_layer_under_two_names_is_recomputed_under_both(here: Path, trained: Run) -> None:
    for path in Path("ckpts").iterdir():
        torch.manual_seed(int(path.stem[-1]))
        model = trained.module.Shared()
        model(torch.randn(64, 2, 8, 8) * 5)
        torch.save({"step": int(path.stem[-1]), "state_dict": model.state_dict()}, path)
    result = average(model="net.py:Shared", **TRAIN | TEST)
    assert result.state is not None
    for key in ("running_mean", "running_var"):
        assert result.state[f"first.{key}"].tolist() == result.state[f"second.{key}"].tolist()


def test_other_arrays_are_another_request(here: Path, trained: Run) -> None:
    model = trained.module.make()
    x, y = trained.module.data("train")
    average(path="out.safetensors", model=model, train_data=(x, y))
    middle = x.clone()
    middle[100:400] += 3
    again = average(path="out2.safetensors", model=model, train_data=(middle, y))
    first = load_file("out.safetensors")["bn1.running_mean"]
    second = load_file("out2.safetensors")["bn1.running_mean"]
    assert not again.up_to_date
    assert not torch.equal(first, second)
    with pytest.raises(EnsembleKitError, match="exist"):  # never taken for the same command
        average(path="out.safetensors", model=model, train_data=(middle, y))


@dataclass(frozen=True)
class Ran:
    """What a command said."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The command line in this process."""

    def call(*args: str) -> Ran:
        capsys.readouterr()
        code = run(["average", "ckpts", "-o", "out.safetensors", "--device", "cpu", *args])
        return Ran(code, *capsys.readouterr())

    return call


MODEL = ("--model", "net.py:make")
DATA = ("--train-data", "net.py:data")
ERRORS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "bn-error": (5, ("--bn", "error"), ("3 BatchNorm layers", "--train-data")),
    "bn-recompute": (2, ("--bn", "recompute"), ("--train-data",)),
    "bn-unknown": (2, ("--bn", "maybe"), ("maybe",)),
    "data-alone": (2, DATA, ("needs a model", "--model")),
    "batch-size-one": (3, (*MODEL, *DATA, "--batch-size", "1"), ("bn3", "batch size")),
    "batch-size-zero": (2, (*MODEL, *DATA, "--batch-size", "0"), ("--batch-size",)),
    "limit-zero": (2, (*MODEL, *DATA, "--limit", "0"), ("--limit",)),
    "bn-samples-zero": (2, (*MODEL, *DATA, "--bn-samples", "0"), ("--bn-samples",)),
    "seed-negative": (2, (*MODEL, *DATA, "--seed", "-1"), ("--seed",)),
    "workers-negative": (2, (*MODEL, *DATA, "--workers", "-1"), ("--workers",)),
    "device": (4, (*MODEL, *DATA, "--device", "cuda:99"), ("cuda:99",)),
    "wrong-keys": (
        3,
        (*MODEL, "--model-arg", "last=classifier", *DATA),
        ("classifier.weight", "fc.weight", "--model"),
    ),
    "wrong-shape": (3, (*MODEL, "--model-arg", "width=5", *DATA), ("(6, 2, 3, 3)", "(5, 2, 3, 3)")),
    "no-module": (2, ("--model", "net.py:nothing", *DATA), ("NoneType", "torch.nn.Module")),
    "model-raises": (3, ("--model", "net.py:raises", *DATA), ("no data today", "net.py")),
    "model-argument": (3, (*MODEL, "--model-arg", "depth=2", *DATA), ("TypeError", "depth")),
    "forward-raises": (
        3,
        ("--model", "net.py:Clumsy", *DATA),
        ("AssertionError", "forward is broken", "net.py"),
    ),
    "forward-raises-on-test-data": (
        3,
        ("--model", "net.py:Clumsy", "--test-data", "net.py:data"),
        ("AssertionError", "forward is broken", "net.py"),
    ),
    "data-raise": (3, (*MODEL, "--train-data", "net.py:raises"), ("no data today", "net.py")),
    "data-raise-later": (
        3,
        (*MODEL, "--train-data", "net.py:raises_later"),
        ("no more data", "net.py"),
    ),
    "dataset-raises": (
        3,
        (*MODEL, "--train-data", "net.py:Raising"),
        ("image is gone", "net.py"),
    ),
    "dataset-raises-on-test-data": (
        3,
        (*MODEL, "--test-data", "net.py:Raising"),
        ("image is gone", "net.py"),
    ),
    "shape-of-train-data": (3, (*MODEL, "--train-data", "net.py:flat"), ("(128, 128)",)),
    "shape-of-test-data": (3, (*MODEL, "--test-data", "net.py:flat"), ("(128, 128)",)),
    "no-labels": (3, (*MODEL, "--test-data", "net.py:unlabelled"), ("labels",)),
    "no-file": (2, (*MODEL, "--train-data", "data.py:load"), ("data.py",)),
    "no-attribute": (2, (*MODEL, "--train-data", "net.py:dta"), ("dta", "data")),
    "text-labels": (3, (*MODEL, "--test-data", "words.npz"), ("",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(here: Path, cli: Callable[..., Ran], name: str) -> None:
    wanted, args, words = ERRORS[name]
    np.savez("words.npz", x=np.zeros((3, 2, 8, 8), np.float32), y=np.array(["a", "b", "c"]))
    before = sorted(here.iterdir())
    done = cli(*args)
    assert done.code == wanted, done.err
    assert done.out == ""
    assert not [word for word in words if word not in done.err], done.err
    left = [path for path in sorted(here.iterdir()) if path.name != "__pycache__"]
    assert left == before


def test_a_changed_module_is_another_request(here: Path, cli: Callable[..., Ran]) -> None:
    Path("stats.py").write_text("from net import data")
    args = ("--model", "net.py:make", "--train-data", "stats:data")
    assert cli(*args).code == 0
    Path("stats.py").write_text("from net import shifted as data")
    forget(here)
    assert "up to date" not in cli(*args).out


def test_json_stays_one_object_whatever_their_code_prints(cli: Callable[..., Ran]) -> None:
    done = cli("--model", "net.py:chatty", *DATA, "--json")
    assert json.loads(done.out)["batch_norm"]["policy"] == "recomputed"
    assert "building the model" in done.err


def test_what_other_processes_print_goes_to_stderr(here: Path) -> None:
    """Stdout is one JSON object, whatever a data set starts or writes by descriptor."""
    with Path("net.py").open("a") as file:
        file.write(
            "\nimport os, subprocess\n"
            "def loud(split):\n"
            "    print('printed')\n"
            "    os.write(1, b'written by descriptor')\n"
            "    subprocess.run(['echo', 'of another process'], check=True)\n"
            "    return data(split)\n"
        )
    line = ("average", "ckpts", "--device", "cpu", *MODEL, "--val-data", "net.py:loud")
    done = helpers.run(*line, "-o", "out.pt", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["output"] == "out.pt"
    for text in ("printed", "written by descriptor", "of another process"):
        assert text in done.stderr


def test_arrays_from_a_file(cli: Callable[..., Ran], trained: Run) -> None:
    x, y = (part.numpy() for part in trained.module.data("test"))
    np.savez("a.npz", x=x.astype(np.float64), y=y.astype(np.uint16), plain=x)
    done = cli(*MODEL, "--train-data", "a.npz?x=plain", "--test-data", "a.npz", "--json")
    assert done.code == 0, done.err + done.out
    assert {e["samples"] for e in json.loads(done.out)["evaluation"]} == {300}


def test_strict_makes_a_warning_fail(here: Path, cli: Callable[..., Ran]) -> None:
    done = cli("--strict")
    assert done.code == 5
    assert "averaged statistics" in done.err
    assert not Path("out.safetensors").exists()


def test_the_installed_command_with_a_settings_file(here: Path, trained: Run) -> None:
    Path("ensemblekit.toml").write_text(
        'model = "net.py:make"\nmodel-arg = {width = 6}\ndevice = "cpu"\n'
        'train-data = "net.py:data"\nval-data = "net.py:data"\ntest-data = "net.py:data"\n'
        "[average]\nbn-samples = 400\n"
    )
    done = helpers.run("average", "ckpts", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["batch_norm"] == {
        "layers": 3,
        "frozen": 0,
        "policy": "recomputed",
        "samples": 400,
    }
    model = trained.module.make()
    model.load_state_dict(load_file("averaged.safetensors"))
    for e in result["evaluation"]:
        if e["candidate"] == "average" and e["batch_norm"] == "recomputed":
            wanted = quality(model, trained.module.data(e["split"]))
            assert (e["accuracy"], e["nll"]) == pytest.approx(wanted, abs=1e-6)
    again = helpers.run("average", "ckpts", cwd=here)
    assert "up to date" in again.stdout
    assert "recomputed on 400 samples" in again.stdout


def test_the_installed_command_shows_a_table(here: Path) -> None:
    args = ("--model", "net.py:make", "--train-data", "net.py:data", "--test-data", "net.py:data")
    done = helpers.run(
        "average", "ckpts", "-o", "out.safetensors", "--device", "cpu", *args, cwd=here
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows if row[:1] == ["candidate"]] == [["candidate", "BatchNorm"]]
    averages = [row[:2] for row in rows if row[:1] == ["average"]]
    assert averages == [["average", "averaged"], ["average", "recomputed"]]
    assert "3 BatchNorm layers recomputed on 517 samples" in done.stdout
    assert load_file("out.safetensors")["bn1.running_var"].shape == (6,)


def test_the_installed_command_shows_only_their_traceback(here: Path) -> None:
    args = ("--model", "net.py:make", "--train-data", "net.py:raises")
    done = helpers.run("average", "ckpts", "-o", "out.safetensors", *args, cwd=here)
    assert done.returncode == 3
    assert 'net.py", line' in done.stderr
    assert "targets.py" not in done.stderr
