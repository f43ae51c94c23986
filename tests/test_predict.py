"""The forward pass: every member sees every sample once, in order, and only what is missing runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit.batches import Plan, as_batch, batches, digest
from ensemblekit.cache import Log
from ensemblekit.errors import InputError, NotFiniteError
from ensemblekit.predict import Keep, Seen, Stale, run_pass
from ensemblekit.rivals import Rivals, find_rivals, join
from ensemblekit.tasks import Form

from .passes import log_probs, passed

torch.set_num_threads(1)
X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3
FORM = Form("classification", 3)
KEEP = Keep(FORM, "float32", jointly=False)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    return model.eval()


class Named(nn.Module):
    """Takes keywords, gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        return {"hidden": pixels, "scores": self.inner(pixels)}


class Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


class Counting(nn.Module):
    """Remembers the sizes of the batches that it was given."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = net(seed)
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        out: torch.Tensor = self.inner(x)
        return out


def wanted(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).log_softmax(1)


def walk(logs: list[Log], models: list[nn.Module], data: Any, **options: Any) -> Seen:
    found = run_pass(
        logs,
        lambda m, _: models[m],
        1,
        batches(data, Plan(16)),
        options.pop("keep", KEEP),
        device=torch.device("cpu"),
        **options,
    )
    assert found is not None
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 49, 50, 128])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    ((found,), seen) = passed([net()], batches((X, Y), Plan(batch_size)), FORM)
    torch.testing.assert_close(found, wanted(net()))
    np.testing.assert_array_equal(seen.targets, Y.numpy())
    assert seen.samples == 50
    assert seen.sizes_N is None


def test_several_members_in_one_walk() -> None:
    models: list[nn.Module] = [Counting(seed) for seed in range(3)]
    found, _ = passed(models, batches((X, Y), Plan(16)), FORM)
    for seed, one in enumerate(found):
        torch.testing.assert_close(one, wanted(net(seed)))
        assert models[seed].sizes == [16, 16, 16, 2]


def test_flags_weights_and_statistics_stay() -> None:
    model = net()
    flags = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = log_probs(model, batches((X, Y), Plan()))
    assert torch.equal(first, log_probs(model, batches((X, Y), Plan())))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_the_model_can_be_trained_afterwards() -> None:
    model = net()
    log_probs(model, batches((X, Y), Plan()))
    assert torch.is_grad_enabled()
    model(X).sum().backward()
    assert model[0].weight.grad is not None


def test_dict_batches_and_dict_outputs() -> None:
    batch = {"pixels": X, "mask": X > 0, "labels": Y}
    found = log_probs(Named(), [as_batch(batch)], logits_key="scores")
    torch.testing.assert_close(found, wanted(net()))


@pytest.mark.parametrize("kind, within", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_is_near(kind: torch.dtype, within: float) -> None:
    plain = log_probs(net(), batches((X, Y), Plan()))
    found = log_probs(net(), batches((X, Y), Plan()), autocast=kind)
    assert found.dtype == torch.float32
    assert 0 < float((found - plain).abs().max()) < within


@pytest.mark.parametrize(
    "data, words",
    [
        ((X[:, :3], Y), ("50x3", "(50, 3)", "torch.float32")),
        ((X.double(), Y), ("torch.float64",)),
        ((X, X, Y), ("positional", "0: (50, 4)", "1: (50, 4)")),
        ((X,), ("no labels",)),
        ((X, Y + 1), ("1 to 3", "0 to 2")),
        ((X, Y.float()), ("torch.float32", "one integer a sample")),
        ((X, Y[:, None]), ("(50, 1)", "one integer a sample")),
    ],
)
def test_data_that_do_not_fit_the_model(data: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        log_probs(net(), [as_batch(data)])
    assert not [word for word in words if word not in caught.value.message], caught.value.message
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "error", [ValueError("v"), AssertionError("a"), ZeroDivisionError("z"), OSError("o")], ids=repr
)
def test_whatever_the_model_raises_is_the_users(error: Exception) -> None:
    with pytest.raises(InputError) as caught:
        log_probs(Raises(error), [as_batch((X, Y))])
    assert type(error).__name__ in caught.value.message
    assert __file__ in caught.value.message


def test_no_batches() -> None:
    with pytest.raises(InputError, match="empty"):
        log_probs(net(), [])


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_names_the_member(value: str) -> None:
    broken = net()
    nn.init.constant_(broken[3].bias, float(value))
    with pytest.raises(NotFiniteError) as caught:
        passed([net(), broken], [as_batch((X, Y))], FORM, names=["first.pt", "second.pt"])
    assert caught.value.message.startswith("second.pt")
    assert "--exclude" in str(caught.value.hint)


class TestLogs:
    def test_a_complete_log_needs_no_model(self, tmp_path: Path) -> None:
        log = Log(tmp_path / "log")
        first = Counting()
        walk([log], [first], (X, Y))
        before = log.rows("float32", 3).copy()
        again = walk([log], [Raises(AssertionError("not needed"))], (X, Y))
        np.testing.assert_array_equal(log.rows("float32", 3), before)
        np.testing.assert_array_equal(again.targets, Y.numpy())
        log.close()

    def test_what_is_there_is_not_predicted_again(self, tmp_path: Path) -> None:
        """A member that was interrupted goes on; one that is new starts; one that is ready rests."""
        logs = [Log(tmp_path / name) for name in ("ready", "begun", "new")]
        models: list[nn.Module] = [Counting(seed) for seed in range(3)]
        walk(logs[:1], models[:1], (X, Y))
        for batch in list(batches((X, Y), Plan(16)))[:2]:
            record = KEEP.record(wanted(net(1))[: batch.size], Y)
            logs[1].append(digest(batch), record, batch.size)
        models[0].sizes.clear()
        walk(logs, models, (X, Y))
        assert [model.sizes for model in models] == [[], [16, 2], [16, 16, 16, 2]]
        assert all(log.complete for log in logs)
        for log in logs:
            log.close()

    @pytest.mark.parametrize("where", ["first", "later", "label", "more"])
    def test_a_log_of_other_data_is_stale(self, tmp_path: Path, where: str) -> None:
        logs = [Log(tmp_path / name) for name in ("old", "new")]
        old, new = Counting(0), Counting(1)
        walk(logs[:1], [old], (X, Y))
        old.sizes.clear()
        x, y = X.clone(), Y.clone()
        if where == "more":
            x, y = torch.cat([x, x[:20]]), torch.cat([y, y[:20]])
        elif where == "label":
            y[20] = (y[20] + 1) % 3
        else:
            x[0 if where == "first" else 40] += 1
        with pytest.raises(Stale) as caught:
            walk(logs, [old, new], (x, y))
        assert caught.value.logs == {0}
        logs[0].clear()
        walk(logs, [old, new], (x, y))
        with torch.no_grad():
            right = net(0)(x).log_softmax(1).numpy()
        np.testing.assert_allclose(logs[0].rows("float32", 3), right, atol=1e-6)
        assert sum(new.sizes) == len(x)  # what it had said before the stale batch stays
        for log in logs:
            log.close()

    def test_fewer_data_leave_what_is_still_right(self, tmp_path: Path) -> None:
        log, model = Log(tmp_path / "log"), Counting()
        walk([log], [model], (X, Y))
        model.sizes.clear()
        seen = walk([log], [model], (X[:32], Y[:32]))
        assert model.sizes == []
        assert (seen.samples, len(log), log.complete) == (32, 2, True)
        log.close()

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
    def test_an_interruption_keeps_finished_batches(
        self, tmp_path: Path, error: BaseException
    ) -> None:
        log = Log(tmp_path / "log")

        class Stops(Counting):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                if len(self.sizes) == 2:
                    raise error
                return super().forward(x)

        with pytest.raises(type(error)):
            walk([log], [Stops()], (X, Y))
        log.close()
        log, model = Log(tmp_path / "log"), Counting()
        assert (len(log), log.complete) == (2, False)
        walk([log], [model], (X, Y))
        assert model.sizes == [16, 2]
        np.testing.assert_allclose(log.rows("float32", 3), wanted(net()).numpy(), atol=1e-6)
        log.close()

    def test_progress_counts_samples(self, tmp_path: Path) -> None:
        told: list[int] = []
        log = Log(tmp_path / "log")
        walk([log], [net()], (X, Y), progress=told.append)
        log.close()
        assert told[:4] == [16, 32, 48, 50]
        assert set(told[4:]) <= {50}


class TestOtherTasks:
    def test_tokens_keep_the_true_class_and_whether_it_wins(self) -> None:
        form = Form("tokens", 7)
        logits = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0))
        labels = torch.randint(0, 7, (5, 4), generator=torch.Generator().manual_seed(1))
        labels[0, 2:] = -100
        ((found,), seen) = passed([nn.Identity()], [as_batch((logits, labels))], form)
        kept = labels != -100
        log_probs_RC = logits.log_softmax(-1)[kept]
        torch.testing.assert_close(found[:, 0], log_probs_RC.gather(1, labels[kept][:, None])[:, 0])
        assert torch.equal(found[:, 1].bool(), log_probs_RC.argmax(1) == labels[kept])
        assert seen.sizes_N is not None
        assert seen.sizes_N.tolist() == [2, 4, 4, 4, 4]

    def test_segmentation_keeps_rivals_of_all_members(self, tmp_path: Path) -> None:
        x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        y = torch.randint(0, 4, (5, 3, 3), generator=torch.Generator().manual_seed(1))
        y[1, 0] = -100

        class Scaled(nn.Module):
            def __init__(self, by: float) -> None:
                super().__init__()
                self.by = by

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * self.by

        models = [Scaled(1.0), Scaled(-0.5)]
        log = Log(tmp_path / "log")
        seen = run_pass(
            [log],
            lambda _, index: models[index],
            2,
            [as_batch((x[:3], y[:3])), as_batch((x[3:], y[3:]))],
            Keep(Form("segmentation", 4), "float32", jointly=True),
            device=torch.device("cpu"),
        )
        found = join([Rivals.from_bytes(record) for record in log.records()])
        log.close()
        kept = y != -100
        stacked = torch.stack([(x * s).movedim(1, -1)[kept].log_softmax(1) for s in (1.0, -0.5)])
        right = find_rivals(stacked.numpy(), y[kept].numpy())
        assert seen is not None
        np.testing.assert_array_equal(seen.targets, y[kept].numpy())
        assert seen.sizes_N is not None
        assert seen.sizes_N.tolist() == [9, 6, 9, 9, 9]
        np.testing.assert_array_equal(found.classes_Q, right.classes_Q)
        np.testing.assert_allclose(found.rivals_MQ, right.rivals_MQ, rtol=1e-3)

    def test_float16_records(self) -> None:
        keep = Keep(FORM, "float16", jointly=False)
        rows = torch.tensor([[-0.25, -1e6, float("-inf")]])
        found = np.frombuffer(keep.record(rows, torch.tensor([0])), np.float16)
        assert found.tolist() == [-0.25, -65504.0, -65504.0]
