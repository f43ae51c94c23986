"""The workbench: every member over every sample once, kept for the next run, never of other data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit.batches import Plan, batches
from ensemblekit.batchnorm import recompute_bn
from ensemblekit.cache import Cache
from ensemblekit.candidates import Member, Row, mean_row, one_hot
from ensemblekit.errors import (
    EnsembleKitError,
    IncompatibleError,
    InputError,
    MachineError,
    NotFiniteError,
    UsageError,
    UserCodeError,
)
from ensemblekit.options import ModelOptions
from ensemblekit.predictions import Predictions
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.workbench import Workbench, _free_memory

from . import counted
from .counted import FORWARD, READ, Net, seen
from .helpers import read_set, write_safetensors

torch.set_num_threads(1)

ROOM = 1 << 30
SIZES = {"train": 260, "val": 100, "test": 70}
CODE = '''
import torch
from pathlib import Path
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler
from tests.counted import Net, Rows

HERE = Path(__file__).parent

def net(width=5, classes=3):
    return Net(width, classes)

def rows(split):
    return Rows(HERE / f"{split}.npz")

def stream(split):
    data = rows(split)
    for first in range(0, len(data), 16):
        pairs = [data[n] for n in range(first, min(first + 16, len(data)))]
        yield torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])

def loader(split, **options):
    return DataLoader(rows(split), batch_size=16, **options)

def shuffled(split):
    return loader(split, shuffle=True)

def random_subset(split):
    return loader(split, sampler=SubsetRandomSampler(range(50)))

def even(split):
    return loader(split, sampler=range(0, 100, 2))

def dropping(split):
    return loader(split, drop_last=True)

class Noisy(Rows):
    start = 0
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        if index >= self.start:
            x = x.clone()
            x[1:] += torch.randn(3)
        return x, y

def noisy(split):
    return Noisy(HERE / f"{split}.npz")

def noisy_later(split):
    data = noisy(split)
    data.start = 50
    return data

class Moody(Rows):
    """The labels of its second half change from walk to walk."""
    walk = 0
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        if index == 99:
            Moody.walk += 1
        return x, (y + Moody.walk) % 3 if index >= 50 else y

def moody(split):
    return Moody(HERE / f"{split}.npz")

def few(split):
    data = rows(split)
    return data.x[:2], data.y[:2]

def empty(split):
    return iter(())

def unlabelled(split):
    return rows(split).x

def high(split):
    data = rows(split)
    return data.x, data.y + 1

def high_later(split):
    data = rows(split)
    data.y[90] = 7
    return data

def values(split):
    data = rows(split)
    return data.x, torch.randn(len(data.x), generator=torch.Generator().manual_seed(0))

def raising(split):
    yield from list(stream(split))[:3]
    raise OSError("image is gone")

def uneven(split):
    data = rows(split)
    yield data.x[:16], data.y[:16]
    yield data.x[16:], data.y[15:]

class Growing(Net):
    """Says one class more on small batches."""
    def forward(self, x):
        out = super().forward(x)
        return out if len(x) > 4 else torch.cat([out, out[:, :1]], 1)

def growing():
    return Growing()
'''


def state(k: int) -> dict[str, np.ndarray]:
    """Snapshot k: `head.bias[0]` is k."""
    rng, own = np.random.default_rng(0), np.random.default_rng(k + 1)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) + 0.3 * own.normal(size=shape)).astype(np.float32)

    bias = draw(3)
    bias[0] = k
    return {
        "fc.weight": draw(5, 4),
        "fc.bias": draw(5),
        "bn.weight": np.ones(5, np.float32),
        "bn.bias": np.zeros(5, np.float32),
        "bn.running_mean": draw(5),
        "bn.running_var": 1 + draw(5) ** 2,
        "bn.num_batches_tracked": np.array(7, np.int64),
        "head.weight": draw(3, 5),
        "head.bias": bias,
    }


def arrays(split: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, whose first column is the sample's number, and labels."""
    rng = np.random.default_rng(list(SIZES).index(split))
    x = rng.normal(size=(count or SIZES[split], 4)).astype(np.float32)
    x[:, 0] = np.arange(len(x))
    return x, rng.integers(0, 3, len(x))


def write(folder: Path, split: str, x: np.ndarray, y: np.ndarray) -> None:
    np.savez(folder / f"{split}.npz", x=x, y=y)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Code, data and three snapshots; whatever was imported from there is forgotten afterwards."""
    (tmp_path / "code.py").write_text(CODE)
    for split in SIZES:
        write(tmp_path, split, *arrays(split))
    for k in range(3):
        write_safetensors(tmp_path / f"snap_{k}.safetensors", state(k))
    counted.reset()
    yield tmp_path
    forget()


def forget() -> None:
    """As in a new process: targets are imported anew."""
    for name in [name for name in sys.modules if name.startswith("ensemblekit_target_")]:
        del sys.modules[name]


def snapshots(folder: Path, count: int = 3) -> SnapshotSet:
    return read_set(*(folder / f"snap_{k}.safetensors" for k in range(count)))


def target(folder: Path, name: str) -> str:
    return f"{folder / 'code.py'}:{name}"


@contextmanager
def bench(folder: Path, *, room: int = ROOM, **given: Any) -> Iterator[Workbench]:
    """A workbench as a new process would have it; counting starts when it stands."""
    forget()
    counted.reset()
    options: dict[str, Any] = {"model": "net", "val_data": "rows", "train_data": "rows", **given}
    for name in ("model", "val_data", "test_data", "train_data"):
        if isinstance(options.get(name), str):
            options[name] = target(folder, options[name])
    frozen = options.pop("frozen", ())
    chosen = options.pop("snapshots", None) or snapshots(folder)
    root = options.pop("root", folder / "cache")
    options = {"device": "cpu", "batch_size": 16, **options}
    with Cache(root, room) as cache:
        made = Workbench(chosen, ModelOptions(**options), cache=cache, frozen=frozen)
        counted.reset()
        yield made


SINGLES = [Member(one_hot(k, 3)) for k in range(3)]
MIXED = Member(mean_row(3), "recomputed")  # its `head.bias[0]` is 1, as that of snapshot 1
TILTED = Member(Row((1.0, 1.0, 2.0), 4.0), "averaged")  # 1.25


def right(k: int, split: str = "val") -> torch.Tensor:
    """What snapshot k says, made plainly."""
    model = Net()
    model.load_state_dict({key: torch.from_numpy(v) for key, v in state(k).items()})
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(arrays(split)[0])).log_softmax(1)
    FORWARD.pop()
    return found


def outputs(made: Workbench, members: list[Member], split: str = "val") -> list[np.ndarray]:
    return [np.array(one) for one in made.predictions(members, split).outputs]


class TestOnce:
    def test_every_member_sees_every_sample_once(self, folder: Path) -> None:
        with bench(folder, test_data="rows") as made:
            made.predict([*SINGLES, TILTED])
            both = list(range(100)) + list(range(70))
            for member in (0, 1, 2, 1.25):
                assert seen(member) == both
            assert (made.passes.forward, made.passes.reused) == (8, 0)
            for split in ("val", "test"):
                found = made.predictions([*SINGLES, TILTED], split)
                np.testing.assert_array_equal(found.targets, arrays(split)[1])
                assert found.sizes_N is None
                assert found.samples == SIZES[split]
                for k in range(3):
                    torch.testing.assert_close(
                        torch.tensor(np.array(found.outputs[k])), right(k, split)
                    )

    def test_one_walk_serves_all_members(self, folder: Path) -> None:
        with bench(folder, test_data="rows") as made:
            made.predict([*SINGLES, TILTED])
            assert set(READ.values()) == {1}
            assert len(READ) == 170

    def test_members_given_twice_count_once(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict([SINGLES[0], SINGLES[1], SINGLES[0]])
            assert len(FORWARD) == 2 * 7
            first, _, again = outputs(made, [SINGLES[0], SINGLES[1], SINGLES[0]])
            np.testing.assert_array_equal(first, again)

    def test_members_that_come_later(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict(SINGLES[:2])
            before = len(FORWARD)
            made.predict(SINGLES)
            assert {who for who, _ in FORWARD[before:]} == {2.0}
            assert (made.passes.forward, made.passes.reused) == (3, 2)

    def test_one_split_alone(self, folder: Path) -> None:
        with bench(folder, test_data="rows") as made:
            made.predict(SINGLES, ["test"])
            assert {split for split, _ in READ} == {"test"}

    def test_more_members_than_memory_holds(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ensemblekit.workbench._free_memory", lambda _: 0)
        with bench(folder) as made:
            made.predict(SINGLES)
            assert set(READ.values()) == {3}
            for k in range(3):
                assert seen(k) == list(range(100))
            for k, found in enumerate(outputs(made, SINGLES)):
                torch.testing.assert_close(torch.tensor(found), right(k))

    def test_recomputed_statistics_are_the_right_ones(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict([MIXED])
            (found,) = outputs(made, [MIXED])
            kept = made.builder.statistics(MIXED)
        model = Net()
        mean = {key: np.mean([state(k)[key] for k in range(3)], axis=0) for key in state(0)}
        model.load_state_dict({key: torch.tensor(value) for key, value in mean.items()})
        x, y = arrays("train")
        wanted = recompute_bn(model, batches((x, y), Plan(16, 0, 50_000)))
        assert kept is not None
        assert kept.samples == 260
        for key, value in wanted.statistics.items():
            np.testing.assert_allclose(kept.values[key], value, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            log_probs = model.eval()(torch.from_numpy(arrays("val")[0])).log_softmax(1)
        np.testing.assert_allclose(found, log_probs, atol=1e-4)

    def test_the_callers_module_stays(self, folder: Path) -> None:
        module = Net().train()
        module.bn.eval()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        flags = [m.training for m in module.modules()]
        x, y = arrays("train")
        with bench(folder, model=module, train_data=(x, y)) as made:
            made.predict([SINGLES[1], MIXED])
            torch.testing.assert_close(torch.tensor(outputs(made, SINGLES[1:2])[0]), right(1))
            assert all(
                not m.training for ready in made.builder.models([MIXED]) for m in ready.modules()
            )
        assert [m.training for m in module.modules()] == flags
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        assert not any(p.grad is not None for p in module.parameters())


class TestAgain:
    """A second run, with the same cache."""

    def test_nothing_runs_again(self, folder: Path) -> None:
        with bench(folder, test_data="rows") as made:
            made.predict([*SINGLES, MIXED])
            before = outputs(made, [*SINGLES, MIXED])
        with bench(folder, test_data="rows") as made:
            made.predict([*SINGLES, MIXED])
            assert FORWARD == []
            passes = made.passes
            assert (passes.forward, passes.batch_norm, passes.reused) == (0, 0, 8)
            for one, other in zip(before, outputs(made, [*SINGLES, MIXED]), strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(made.splits["val"].seen.targets, arrays("val")[1])  # type: ignore[union-attr]

    def test_other_members_of_the_same_run(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict(SINGLES[:2])
        with bench(folder) as made:
            made.predict([TILTED, *SINGLES])
            assert {who for who, _ in FORWARD} == {1.25, 2.0}

    def test_a_snapshot_is_known_by_its_content(self, folder: Path) -> None:
        """Whatever it is called, and wherever it stands among how many."""
        with bench(folder) as made:
            made.predict(SINGLES)
        (folder / "snap_2.safetensors").rename(folder / "last.safetensors")
        two = read_set(folder / "last.safetensors", folder / "snap_0.safetensors")
        with bench(folder, snapshots=two) as made:
            made.predict([Member(one_hot(0, 2)), Member(one_hot(1, 2))])
            assert FORWARD == []
            first, _ = outputs(made, [Member(one_hot(0, 2)), Member(one_hot(1, 2))])
            torch.testing.assert_close(torch.tensor(first), right(2))

    def test_a_python_module_has_no_name_to_be_known_by(self, folder: Path) -> None:
        for _ in range(2):
            with bench(folder, model=Net()) as made:
                made.predict(SINGLES[:1])
                assert seen(0) == list(range(100))
        assert list((folder / "cache").glob("*")) == []

    def test_without_a_cache(self, folder: Path) -> None:
        for _ in range(2):
            with bench(folder, root=None) as made:
                made.predict(SINGLES[:1])
                assert seen(0) == list(range(100))

    def test_generators_too(self, folder: Path) -> None:
        with bench(folder, val_data="stream") as made:
            made.predict(SINGLES)
            assert seen(2) == list(range(100))
        with bench(folder, val_data="stream") as made:
            made.predict(SINGLES)
            assert FORWARD == []
            for k, found in enumerate(outputs(made, SINGLES)):
                torch.testing.assert_close(torch.tensor(found), right(k))

    def test_two_at_the_same_time(self, folder: Path) -> None:
        with bench(folder) as first:
            first.predict(SINGLES[:1])
            with bench(folder) as second:
                second.predict(SINGLES[:1])
                assert seen(0) == list(range(100))
                first_out, second_out = outputs(first, SINGLES[:1]), outputs(second, SINGLES[:1])
                np.testing.assert_array_equal(first_out, second_out)

    def test_damaged_statistics_are_made_anew(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict([MIXED])
            before = made.builder.statistics(MIXED)
        (path,) = (folder / "cache").glob("bn-*/statistics.npz")
        os.truncate(path, path.stat().st_size // 2)
        with bench(folder) as made:
            made.builder.models([MIXED])
            assert made.passes.batch_norm == 1
            assert made.builder.statistics(MIXED).samples == before.samples == 260  # type: ignore[union-attr]


class TestInterrupted:
    def stopped(self, folder: Path, members: list[Member], **given: Any) -> None:
        limits = {what: given.pop(what) for what in ("forward", "read") if what in given}

        def use() -> None:
            with bench(folder, **given) as made:
                counted.LIMITS.update(limits)
                made.predict(members)

        with pytest.raises(KeyboardInterrupt):
            use()

    @pytest.mark.parametrize("what, limit", [("forward", 3 * 2 + 1), ("read", 16 * 2 + 5)])
    @pytest.mark.parametrize("data", ["rows", "stream"])
    def test_finished_batches_stay(self, folder: Path, what: str, limit: int, data: str) -> None:
        self.stopped(folder, SINGLES, val_data=data, **{what: limit})
        with bench(folder, val_data=data) as made:
            made.predict(SINGLES)
            for k in range(3):
                assert seen(k) == list(range(32, 100))
            for k, found in enumerate(outputs(made, SINGLES)):
                torch.testing.assert_close(torch.tensor(found), right(k))

    def test_again_and_again(self, folder: Path) -> None:
        total = 0
        for _ in range(20):
            try:
                with bench(folder) as made:
                    counted.LIMITS["forward"] = 5
                    made.predict(SINGLES)
                break
            except KeyboardInterrupt:
                total += len(FORWARD)
        else:
            raise AssertionError("no progress")
        with bench(folder) as made:
            made.predict(SINGLES)
            assert FORWARD == []
            for k, found in enumerate(outputs(made, SINGLES)):
                torch.testing.assert_close(torch.tensor(found), right(k))
        assert total < 3 * 7 * 2

    def test_with_new_members(self, folder: Path) -> None:
        self.stopped(folder, SINGLES[:1], forward=4)
        with bench(folder) as made:
            made.predict(SINGLES[:2])
            assert seen(0) == list(range(64, 100))
            assert seen(1) == list(range(100))

    def test_then_the_data_change(self, folder: Path) -> None:
        self.stopped(folder, SINGLES[:1], forward=4)
        x, y = arrays("val")
        x[20, 1] += 1
        write(folder, "val", x, y)
        with bench(folder) as made:
            made.predict(SINGLES[:1])
            assert seen(0) == list(range(100))


def change_first(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x[3, 2] += 0.5
    return x, y


def change_later(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x[77, 2] += 0.5
    return x, y


def change_last(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x[-1, 2] += 1e-6
    return x, y


def change_label(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y[77] = (y[77] + 1) % 3
    return x, y


def change_all_labels(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x, (y + 1) % 3


def fewer(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[:64], y[:64]


def more(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([x, x[:48]]), np.concatenate([y, y[:48]])


def other_order(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.concatenate([np.arange(16), np.arange(99, 15, -1)])
    return x[order], y[order]


CHANGES: list[Callable[..., tuple[np.ndarray, np.ndarray]]] = [
    *(change_first, change_later, change_last, change_label, change_all_labels),
    *(fewer, more, other_order),
]


class TestChanged:
    """Old predictions are never taken for something else."""

    @pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
    @pytest.mark.parametrize("data", ["rows", "stream"])
    def test_data(self, folder: Path, data: str, change: Callable[..., Any]) -> None:
        with bench(folder, val_data=data) as made:
            made.predict(SINGLES)
        x, y = change(*arrays("val"))
        write(folder, "val", x, y)
        with bench(folder, val_data=data) as made:
            made.predict([*SINGLES, TILTED])  # one that is new among them
            found = made.predictions(SINGLES, "val")
        np.testing.assert_array_equal(found.targets, y)
        with bench(folder, val_data=data, root=None) as made:
            made.predict(SINGLES)
            wanted = made.predictions(SINGLES, "val")
        for one, other in zip(found.outputs, wanted.outputs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)

    @pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
    def test_there_and_back(self, folder: Path, change: Callable[..., Any]) -> None:
        for x, y in (arrays("val"), change(*arrays("val")), arrays("val")):
            write(folder, "val", x, y)
            with bench(folder, val_data="stream") as made:
                made.predict(SINGLES)
                found = made.predictions(SINGLES, "val")
                np.testing.assert_array_equal(found.targets, y)
        for k in range(3):
            torch.testing.assert_close(torch.tensor(np.array(found.outputs[k])), right(k))

    @pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
    def test_batch_norm_data(self, folder: Path, change: Callable[..., Any]) -> None:
        with bench(folder) as made:
            made.predict([MIXED])
        write(folder, "train", *change(*arrays("train")))
        with bench(folder, root=None) as made:
            made.predict([MIXED])
            (wanted,) = outputs(made, [MIXED])
            right_values = made.builder.statistics(MIXED)
        with bench(folder) as made:
            made.predict([MIXED])
            (found,) = outputs(made, [MIXED])
            values = made.builder.statistics(MIXED)
        assert values is not None
        assert right_values is not None
        for key, value in right_values.values.items():
            np.testing.assert_array_equal(values.values[key], value)
        np.testing.assert_allclose(found, wanted, atol=1e-6)

    def test_batch_norm_data_of_a_python_caller(self, folder: Path) -> None:
        """The same list, with other samples in it."""
        x, y = map(torch.from_numpy, arrays("train"))
        train = [(x[:130], y[:130]), (x[130:], y[130:])]
        found = []
        for _ in range(2):
            with bench(folder, train_data=train) as made:
                made.builder.models([MIXED])
                statistics = made.builder.statistics(MIXED)
                assert statistics is not None
                found.append(statistics.values["bn.running_mean"])
            train[:] = [(part * 3 + 1, labels) for part, labels in train]
        assert np.abs(found[0] - found[1]).max() > 0.1

    @pytest.mark.parametrize(
        "option",
        [
            {"seed": 5},
            {"bn_samples": 64},
            {"limit": 64},
            {"batch_size": 20},
            {"precision": "bf16"},
        ],
        ids=lambda option: next(iter(option)),
    )
    def test_options_of_the_statistics(self, folder: Path, option: dict[str, Any]) -> None:
        with bench(folder) as made:
            made.builder.models([MIXED])
        with bench(folder, **option) as made:
            made.builder.models([MIXED])
            assert made.passes.batch_norm == 1

    def test_code(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict(SINGLES)
        changed = CODE.replace("return Net(width, classes)", "return Turned()")
        changed += (
            "\nclass Turned(Net):\n    def forward(self, x):\n        return -super().forward(x)\n"
        )
        (folder / "code.py").write_text(changed)
        with bench(folder) as made:
            made.predict(SINGLES)
            assert seen(0) == list(range(100))
            (found, *_) = outputs(made, SINGLES)
        assert np.abs(found - right(0).numpy()).max() > 0.1

    def test_a_neighbour_of_the_code(self, folder: Path) -> None:
        (folder / "neighbour.py").write_text("SIZE = 1")
        with bench(folder) as made:
            made.predict(SINGLES)
        (folder / "neighbour.py").write_text("SIZE = 2")
        with bench(folder) as made:
            made.predict(SINGLES)
            assert seen(0) == list(range(100))

    @pytest.mark.parametrize("given", [{"model_args": {"width": 5}}, {"precision": "bf16"}])
    def test_how_the_model_is_made_and_run(self, folder: Path, given: dict[str, Any]) -> None:
        with bench(folder) as made:
            made.predict(SINGLES)
        with bench(folder, **given) as made:
            made.predict(SINGLES)
            assert seen(0) == list(range(100))

    def test_a_file_that_an_argument_names(self, folder: Path) -> None:
        """`--model-arg config=FILE` and `code.py:net?config=FILE` are one thing."""
        (folder / "code.py").write_text(
            CODE.replace("def net(width=5, classes=3):", "def net(config, width=5, classes=3):")
        )
        config = folder / "config.json"
        for given in (
            {"model": f"net?config={config}"},
            {"model_args": {"config": str(config)}},
        ):
            for text in ("1", "2"):
                config.write_text(text)
                with bench(folder, **given) as made:
                    made.predict(SINGLES)
                    assert seen(0) == list(range(100)), (given, text)

    def test_weights(self, folder: Path) -> None:
        with bench(folder) as made:
            made.predict([SINGLES[0], MIXED])
        write_safetensors(folder / "snap_0.safetensors", state(5))
        with bench(folder) as made:
            made.predict([SINGLES[0], SINGLES[1]])
            assert seen(5) == list(range(100))

    def test_the_code_that_ran_is_the_code_that_is_named(self, folder: Path) -> None:
        """In one process a target is imported once: edited later, it is not what ran."""
        changed = CODE + "\nclass Turned(Net):\n    def forward(self, x):\n        "
        changed += "return -super().forward(x)\n\nnet = lambda: Turned()\n"
        with bench(folder, root=None) as made:  # imports the code
            made.predict(SINGLES[:1])
            (folder / "code.py").write_text(changed)
            options = made.options
        with Cache(folder / "cache", ROOM) as cache:  # the same process goes on
            later = Workbench(snapshots(folder), options, cache=cache)
            later.predict(SINGLES[:1])
        with bench(folder) as made:  # a new process
            made.predict(SINGLES[:1])
            (found,) = outputs(made, SINGLES[:1])
        with bench(folder, root=None) as made:
            made.predict(SINGLES[:1])
            (wanted,) = outputs(made, SINGLES[:1])
        np.testing.assert_allclose(found, wanted, atol=1e-6)


class TestUnfit:
    """Each mistake is one clear error: what, where, and what next."""

    def fails(
        self, folder: Path, kind: type[EnsembleKitError], words: tuple[str, ...], **given: Any
    ) -> EnsembleKitError:
        def use() -> None:
            with bench(folder, **given) as made:
                made.predict(SINGLES[:1])
                made.predict(SINGLES[1:])

        with pytest.raises(EnsembleKitError) as caught:
            use()
        error = caught.value
        assert type(error) is kind, repr(error)
        shown = f"{error.message} {error.hint}"
        assert not [word for word in words if word not in shown], shown
        return error

    @pytest.mark.parametrize(
        "data, kind, words",
        [
            ("shuffled", InputError, ("val", "shuffles", "shuffle=False")),
            ("random_subset", InputError, ("val", "read twice", "no shuffling")),
            ("dropping", InputError, ("val", "drop_last", "4 of 100 samples")),
            ("noisy", InputError, ("val", "augment")),
            ("noisy_later", InputError, ("val", "read twice")),
            ("moody", InputError, ("val", "labels", "read twice")),
            ("few", InputError, ("val", "2 samples for 3 classes", "--limit")),
            ("empty", InputError, ("val", "empty")),
            ("unlabelled", InputError, ("labels", "(x, y)")),
            ("high", InputError, ("labels run from 1 to 3", "0 to 2")),
            ("high_later", InputError, ("labels run from 0 to 7", "0 to 2")),
            ("values", InputError, ("(16, 3)", "(16,)", "--task")),
            ("raising", UserCodeError, ("image is gone", "OSError")),
            ("uneven", InputError, ("labels of shape (85,)",)),
            ("absent", UsageError, ("absent", "code.py")),
        ],
    )
    def test_data(
        self, folder: Path, data: str, kind: type[EnsembleKitError], words: tuple[str, ...]
    ) -> None:
        torch.manual_seed(0)
        error = self.fails(folder, kind, words, val_data=data)
        assert error.exit_code == (2 if kind is UsageError else 3)

    def test_the_split_is_named(self, folder: Path) -> None:
        self.fails(folder, InputError, ("the test data",), test_data="shuffled")

    def test_a_sampler_that_takes_some_samples_is_fine(self, folder: Path) -> None:
        with bench(folder, val_data="even") as made:
            made.predict(SINGLES)
            assert seen(0) == list(range(0, 100, 2))
            assert made.predictions(SINGLES, "val").samples == 50

    @pytest.mark.parametrize(
        "value, words",
        [
            (np.nan, ("snap_2.safetensors", "'head.weight' contains NaN", "--exclude")),
            (np.inf, ("snap_2.safetensors", "'head.weight' contains Inf", "--exclude")),
            (3e38, ("snap_2.safetensors", "output contains NaN or Inf", "--exclude")),
        ],
    )
    def test_a_member_that_diverged(
        self, folder: Path, value: float, words: tuple[str, ...]
    ) -> None:
        broken = state(2)
        broken["head.weight"][1:] = value
        write_safetensors(folder / "snap_2.safetensors", broken)
        self.fails(folder, NotFiniteError, words)

    def test_outputs_that_grow(self, folder: Path) -> None:
        self.fails(folder, InputError, ("4 classes here and 3",), model="growing", batch_size=24)

    def test_an_iterator_cannot_be_read_twice(self, folder: Path) -> None:
        x, y = map(torch.from_numpy, arrays("val"))
        given = zip(x.split(16), y.split(16), strict=True)
        error = self.fails(folder, UsageError, ("iterator", "Dataset"), val_data=given)
        assert error.exit_code == 2

    def test_a_model_of_another_size(self, folder: Path) -> None:
        words = ("fc.weight", "(5, 4)", "(6, 4)", "--model-arg")
        self.fails(folder, IncompatibleError, words, model_args={"width": 6})

    def test_a_cache_that_is_too_small(self, folder: Path) -> None:
        error = self.fails(folder, MachineError, ("--cache-size", "--limit"), room=100)
        assert error.exit_code == 4

    def test_an_unknown_task(self, folder: Path) -> None:
        error = self.fails(folder, UsageError, ("task", "tokens"), task="token")
        assert error.exit_code == 2


class Pixels(nn.Module):
    """A pixel is a sample: the classifier as a segmentation network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, _, height, width = x.shape
        flat = self.net(x.movedim(1, -1).reshape(-1, 4))
        return flat.view(count, height, width, 3).movedim(-1, 1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.flatten(0, 1)).view(*x.shape[:2], 3)


class TestDense:
    def predictions(self, folder: Path, model: nn.Module, data: Any, **given: Any) -> Predictions:
        with bench(folder, model=model, val_data=data, **given) as made:
            made.predict(SINGLES)
            found = made.predictions(SINGLES, "val")
            return Predictions(
                found.form,
                tuple(np.array(one) for one in found.outputs),
                found.rivals,
                found.targets,
                found.sizes_N,
            )

    def test_segmentation(self, folder: Path) -> None:
        x, y = map(torch.from_numpy, arrays("val"))
        image, labels = x.view(4, 5, 5, 4).movedim(-1, 1), y.view(4, 5, 5).clone()
        labels[0, 0] = 255
        found = self.predictions(folder, Pixels(), (image, labels), ignore_index=255, batch_size=2)
        kept = labels.flatten() != 255
        assert found.form.task == "segmentation"
        assert found.samples == 4
        assert found.sizes_N is not None
        assert found.sizes_N.tolist() == [20, 25, 25, 25]
        np.testing.assert_array_equal(found.targets, y[kept])
        assert found.rivals is not None
        true = torch.stack([right(k)[kept] for k in range(3)]).gather(
            2, y[kept].expand(3, -1)[..., None]
        )
        np.testing.assert_allclose(found.rivals.true_MR, true[..., 0], rtol=2e-3)
        part = found.part(np.array([True, False, False, True]))
        assert part.targets.tolist() == [*found.targets[:20], *found.targets[70:]]

    def test_tokens(self, folder: Path) -> None:
        x, y = map(torch.from_numpy, arrays("val"))
        found = self.predictions(folder, Tokens(), (x.view(20, 5, 4), y.view(20, 5)))
        assert found.form.task == "tokens"
        for k in range(3):
            wanted = right(k)
            np.testing.assert_allclose(
                found.outputs[k][:, 0], wanted.gather(1, y[:, None])[:, 0], atol=1e-5
            )
            np.testing.assert_array_equal(found.outputs[k][:, 1] == 1, wanted.argmax(1) == y)
        part = found.part(np.arange(20) % 2 == 1)
        np.testing.assert_array_equal(part.targets, y.view(20, 5)[1::2].flatten())
        assert part.samples == 10

    def test_a_second_run_of_a_segmentation(self, folder: Path) -> None:
        code = CODE + (
            "\nfrom tests.test_workbench import Pixels\n"
            "def pixels():\n    return Pixels()\n"
            "def images(split):\n    data = rows(split)\n"
            "    return data.x.view(4, 5, 5, 4).movedim(-1, 1).contiguous(), data.y.view(4, 5, 5)\n"
        )
        (folder / "code.py").write_text(code)
        found = []
        for _ in range(2):
            with bench(folder, model="pixels", val_data="images", batch_size=2) as made:
                made.predict(SINGLES)
                found.append(made.predictions(SINGLES, "val").rivals)
        assert FORWARD == []
        np.testing.assert_array_equal(found[0].true_MR, found[1].true_MR)


class TestGradient:
    def test_it_is_the_slope_of_the_loss(self, folder: Path) -> None:
        """Against differences of the loss, on some of the samples."""
        x, y = map(torch.from_numpy, arrays("val"))
        taken = np.arange(100) % 3 != 0

        def loss(coefficients: np.ndarray) -> float:
            model = Net().double()
            mixed = {
                key: sum(c * state(k)[key].astype(np.float64) for k, c in enumerate(coefficients))
                for key in state(0)
                if not key.endswith("tracked")
            }
            model.load_state_dict({key: torch.tensor(v) for key, v in mixed.items()}, strict=False)
            with torch.no_grad():
                logits = model.eval()(x.double())[torch.from_numpy(taken)]
            return float(nn.functional.cross_entropy(logits, y[torch.from_numpy(taken)]))

        row = Row((0.2, 0.3, 0.5), 1.0)
        with bench(folder) as made:
            value, slope = made.gradient(Member(row, "averaged"), "val", taken, None)
            assert made.passes.gradient == 1
        at = np.array(row.coefficients)
        assert value == pytest.approx(loss(at), rel=1e-5)
        # running statistics are no parameters: their part of the slope is held still
        model_keys = [key for key in state(0) if "running" not in key]
        assert model_keys
        assert slope.shape == (3,)
        step = 1e-4
        still = {
            key: sum(c * state(k)[key] for k, c in enumerate(at))
            for key in ("bn.running_mean", "bn.running_var")
        }

        def loss_with_still_statistics(coefficients: np.ndarray) -> float:
            model = Net().double()
            mixed = {
                key: sum(c * state(k)[key].astype(np.float64) for k, c in enumerate(coefficients))
                for key in model_keys
                if not key.endswith("tracked")
            }
            mixed |= still
            model.load_state_dict({k: torch.tensor(v) for k, v in mixed.items()}, strict=False)
            with torch.no_grad():
                logits = model.eval()(x.double())[torch.from_numpy(taken)]
            return float(nn.functional.cross_entropy(logits, y[torch.from_numpy(taken)]))

        for k in range(3):
            ahead, behind = at.copy(), at.copy()
            ahead[k] += step
            behind[k] -= step
            difference = loss_with_still_statistics(ahead) - loss_with_still_statistics(behind)
            assert slope[k] == pytest.approx(difference / (2 * step), rel=1e-3, abs=1e-4)


def test_free_memory_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SC_AVPHYS_PAGES` is Linux's; macOS has no such number, Windows no `sysconf`."""

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown, raising=False)
    assert _free_memory(torch.device("cpu")) > 0
