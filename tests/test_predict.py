"""The forward pass: every sample once, in order, in eval mode."""

from typing import Any

import pytest
import torch
from torch import nn

from ensemblekit.batches import Plan, as_batch, batches
from ensemblekit.errors import InputError, NotFiniteError
from ensemblekit.predict import predict

torch.set_num_threads(1)
X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


class Named(nn.Module):
    """Takes keywords, gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, Any]:
        return {"hidden": pixels, "scores": self.inner(pixels)}


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("batch_size", [1, 7, 49, 50, 128])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = net()
    found = predict(model, batches((X, Y), Plan(batch_size)))
    with torch.no_grad():
        wanted = model.eval()(X).log_softmax(1)
    torch.testing.assert_close(found.log_probs_NC, wanted)
    assert torch.equal(found.targets_N, Y)


def test_flags_weights_and_statistics_stay() -> None:
    model = net().train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    first = predict(model, batches((X, Y), Plan()))
    assert torch.equal(first.log_probs_NC, predict(model, batches((X, Y), Plan())).log_probs_NC)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_the_model_can_be_trained_afterwards() -> None:
    model = net()
    found = predict(model, batches((X, Y), Plan()))
    assert not found.log_probs_NC.requires_grad
    model(X).sum().backward()
    assert model[0].weight.grad is not None


def test_dict_batches_and_dict_outputs() -> None:
    batch = {"pixels": X, "mask": X > 0, "labels": Y}
    found = predict(Named(), [as_batch(batch)], logits_key="scores")
    assert found.log_probs_NC.shape == (50, 3)


@pytest.mark.parametrize("kind, within", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_is_near(kind: torch.dtype, within: float) -> None:
    model = net()
    plain = predict(model, batches((X, Y), Plan()))
    found = predict(model, batches((X, Y), Plan()), autocast=kind)
    assert found.log_probs_NC.dtype == torch.float32
    assert 0 < float((found.log_probs_NC - plain.log_probs_NC).abs().max()) < within


@pytest.mark.parametrize(
    "data, words",
    [
        ((X[:, :3], Y), ("50x3", "(50, 3)", "torch.float32")),
        ((X.double(), Y), ("torch.float64",)),
        ((X, X, Y), ("positional", "0: (50, 4)", "1: (50, 4)")),
        ((X,), ("no labels",)),
        ((X, Y + 1), ("1 to 3", "0 to 2")),
    ],
)
def test_data_that_do_not_fit_the_model(data: Any, words: tuple[str, ...]) -> None:
    model = net()
    with pytest.raises(InputError) as caught:
        predict(model, [as_batch(data)])
    assert not [word for word in words if word not in caught.value.message], caught.value.message
    assert model.training  # the flags are back


@pytest.mark.parametrize(
    "error", [ValueError("v"), AssertionError("a"), ZeroDivisionError("z"), OSError("o")], ids=repr
)
def test_whatever_the_model_raises_is_the_users(error: Exception) -> None:
    with pytest.raises(InputError) as caught:
        predict(Raises(error), [as_batch((X, Y))])
    assert type(error).__name__ in caught.value.message
    assert __file__ in caught.value.message


def test_no_batches() -> None:
    with pytest.raises(InputError, match="empty"):
        predict(net(), [])


def test_nan() -> None:
    model = net()
    nn.init.constant_(model[3].bias, float("nan"))
    with pytest.raises(NotFiniteError):
        predict(model, [as_batch((X, Y))])
