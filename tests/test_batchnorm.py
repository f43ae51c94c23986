"""`recompute_bn`: which layers change, what stays as it was, and what it refuses."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ensemblekit.batches import Batch, Plan, as_batch, batches
from ensemblekit.batchnorm import norm_layers, recompute_all, recompute_bn
from ensemblekit.errors import InputError, NotFiniteError

torch.set_num_threads(1)

Array = np.ndarray[Any, np.dtype[np.float64]]


def normal(*shape: int, seed: int = 0, offset: float = 1.0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + offset


def split(x: torch.Tensor, *sizes: int) -> list[Batch]:
    return [as_batch(part) for part in torch.split(x, list(sizes))]


def population(x: torch.Tensor) -> tuple[Array, Array]:
    """Mean and variance (divisor N) by channel, of everything at once."""
    flat_CN = x.double().numpy().swapaxes(0, 1).reshape(x.shape[1], -1)
    return flat_CN.mean(1), flat_CN.var(1)


def assert_statistics(layer: nn.Module, x: torch.Tensor, *, within: float = 1e-6) -> None:
    for key, wanted in zip(("running_mean", "running_var"), population(x), strict=True):
        np.testing.assert_allclose(getattr(layer, key).double().numpy(), wanted, rtol=within)


class Fickle(nn.Module):
    """Stands for stochastic depth: in train mode it would drop its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 if self.training else x


class Twice(nn.Module):
    """One layer, called two times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.norm(x) * 3 + 5)
        return out


class Aliased(nn.Module):
    """One layer, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(x)
        return out


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(80, 3),
    )


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d-NC": (lambda: nn.BatchNorm1d(3), (23, 3)),
    "1d-NCL": (lambda: nn.BatchNorm1d(3), (23, 3, 7)),
    "2d": (lambda: nn.BatchNorm2d(3), (23, 3, 4, 5)),
    "3d": (lambda: nn.BatchNorm3d(3), (23, 3, 2, 3, 4)),
    "sync": (lambda: nn.SyncBatchNorm(3), (23, 3, 4, 5)),
    "momentum-none": (lambda: nn.BatchNorm2d(3, momentum=None), (23, 3, 4, 5)),
    "momentum-zero": (lambda: nn.BatchNorm2d(3, momentum=0.0), (23, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_gets_the_population_statistics(name: str) -> None:
    make, shape = LAYERS[name]
    x = normal(*shape)
    model = nn.Sequential(make())
    outcome = recompute_bn(model, split(x, 10, 10, 3))
    assert_statistics(model[0], x)
    assert outcome.layers == ("0",)
    assert outcome.samples == 23
    assert set(outcome.statistics) == {"0.running_mean", "0.running_var"}
    assert all(v.dtype == torch.float64 for v in outcome.statistics.values())


def test_a_model_without_any_parameter() -> None:
    x = normal(9, 3)
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    recompute_bn(model, split(x, 4, 5))
    assert_statistics(model[0], x)


def test_a_layer_that_is_the_model_itself() -> None:
    x = normal(9, 3)
    model = nn.BatchNorm1d(3)
    assert set(recompute_bn(model, split(x, 9)).statistics) == {"running_mean", "running_var"}
    assert_statistics(model, x)


def test_instance_norm_pools_each_samples_own_statistics() -> None:
    x = normal(11, 3, 4, 5) * torch.arange(1, 12).view(-1, 1, 1, 1)
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    recompute_bn(model, split(x, 4, 4, 3))
    values = x.double().numpy()
    for key, wanted in (
        ("running_mean", values.mean((2, 3)).mean(0)),
        ("running_var", values.var((2, 3), ddof=1).mean(0)),  # torch keeps the unbiased one
    ):
        np.testing.assert_allclose(getattr(model[0], key).double().numpy(), wanted, rtol=1e-6)


def test_layers_without_running_statistics_are_left_out() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3), nn.BatchNorm1d(3)
    )
    assert set(norm_layers(model)) == {"2"}
    assert recompute_bn(model, split(normal(8, 3), 4, 4)).layers == ("2",)


def test_a_layer_used_twice_sees_the_values_of_both_calls() -> None:
    x, model = normal(12, 3), Twice()
    recompute_bn(model, split(x, 12))
    mean, var = population(x)
    second = (x.double() - torch.from_numpy(mean)) / torch.from_numpy(var + 1e-5).sqrt() * 3 + 5
    assert_statistics(model.norm, torch.cat([x, second]), within=1e-5)


def test_a_layer_under_two_names_is_one_layer() -> None:
    x, model = normal(12, 3), Aliased()
    recompute_bn(model, split(x, 6, 6))
    assert_statistics(model.first, x)
    assert model.first is model.second


def test_a_layer_called_by_keyword() -> None:
    class ByKeyword(Aliased):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.first(input=x)
            return out

    x, model = normal(12, 3), ByKeyword()
    recompute_bn(model, split(x, 6, 6))
    assert_statistics(model.first, x)


@pytest.mark.parametrize("noise", [nn.Dropout(0.9), nn.AlphaDropout(0.5), Fickle()])
def test_nothing_but_the_layers_is_in_train_mode(noise: nn.Module) -> None:
    x, model = normal(20, 3), nn.Sequential(noise, nn.BatchNorm1d(3))
    recompute_bn(model.train(), split(x, 10, 10))
    assert_statistics(model[1], x)
    assert noise.training


def test_frozen_layers_keep_their_statistics_and_use_them() -> None:
    x = normal(20, 3)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].running_mean.fill_(7.0)
    outcome = recompute_bn(model, split(x, 10, 10), frozen=["0"])
    assert outcome.kept == ("0",)
    assert outcome.layers == ("1",)
    assert torch.equal(model[0].running_mean, torch.full((3,), 7.0))
    assert_statistics(model[1], (x - 7) / (1 + 1e-5) ** 0.5, within=1e-5)


def condition(model: nn.Module) -> dict[str, Any]:
    """All that a recompute must leave alone, as plain values."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} training"] = module.training
        found[f"{name} momentum"] = getattr(module, "momentum", None)
        found[f"{name} hooks"] = (
            tuple(module._forward_pre_hooks),
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks_with_kwargs),
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found |= {key: value.tolist() for key, value in tensors.items()}
    return found | {f"{k} grad": v.requires_grad for k, v in tensors.items()}


@pytest.fixture
def used() -> nn.Sequential:
    """A network with a past: mixed flags, counters, a user's hook, odd momenta."""
    model = conv_net()
    model(normal(8, 2, 8, 8))
    model[1].momentum = None
    model[1].eval()
    model[3][1].momentum = 0.3
    model[1].register_forward_pre_hook(lambda module, args: None)
    model[0].weight.requires_grad_(False)
    return model


def test_everything_else_is_as_before(used: nn.Sequential) -> None:
    before = condition(used)
    recompute_bn(used, split(normal(20, 2, 8, 8, seed=1), 10, 10))
    after = condition(used)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {f"{n}.{k}" for n in ("1", "3.1") for k in ("running_mean", "running_var")}


def nan_in_the_second(x: torch.Tensor) -> torch.Tensor:
    x[15, 1, 2, 3] = float("nan")
    return x


def broken(error: BaseException) -> Iterator[Batch]:
    yield as_batch(normal(10, 2, 8, 8))
    raise error


FAILURES: dict[str, tuple[Callable[[], Any], type[BaseException]]] = {
    "data-raise": (lambda: broken(OSError("gone")), OSError),
    "interrupted": (lambda: broken(KeyboardInterrupt()), KeyboardInterrupt),
    "model-raises": (lambda: [as_batch(normal(10, 2, 8, 8)), as_batch(normal(4, 9))], Exception),
    "nan": (lambda: split(nan_in_the_second(normal(20, 2, 8, 8)), 10, 10), NotFiniteError),
    "empty": (list, InputError),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_leaves_the_model_as_it_was(used: nn.Sequential, name: str) -> None:
    data, error = FAILURES[name]
    before = condition(used)
    with pytest.raises(error):
        recompute_bn(used, data())
    assert condition(used) == before


@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=8),
    shape=st.sampled_from([(), (3,), (2, 2)]),
    offset=st.sampled_from([0.0, 1.0, -1e3]),
    seed=st.integers(0, 2**16),
)
def test_any_split_gives_the_same_statistics(
    sizes: list[int], shape: tuple[int, ...], offset: float, seed: int
) -> None:
    x = normal(sum(sizes), 3, *shape, seed=seed, offset=offset)
    kinds: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
    model = nn.Sequential(kinds[len(shape)](3))
    found = recompute_bn(model, split(x, *sizes)).statistics
    mean, var = population(x)
    np.testing.assert_allclose(found["0.running_mean"], mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["0.running_var"], var, rtol=1e-9)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    x = normal(3000, 2, offset=1e4, scale=1e-2)
    found = recompute_bn(nn.Sequential(nn.BatchNorm1d(2)), split(x, *[100] * 30)).statistics
    np.testing.assert_allclose(found["0.running_var"], population(x)[1], rtol=1e-9)


@pytest.mark.parametrize("sizes", [(1,), (4, 1)])
def test_a_batch_of_one_value_a_channel_has_no_variance(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="'0' sees a single value a channel") as caught:
        recompute_bn(nn.Sequential(nn.BatchNorm1d(3)), split(normal(sum(sizes), 3), *sizes))
    assert "batch size" in str(caught.value.hint)


def test_one_image_has_a_variance() -> None:
    x, model = normal(3, 2, 4, 4), nn.Sequential(nn.BatchNorm2d(2))
    recompute_bn(model, split(x, 1, 1, 1))
    assert_statistics(model[0], x)


def test_no_batches() -> None:
    with pytest.raises(InputError, match="empty"):
        recompute_bn(nn.BatchNorm1d(3), [])


def test_no_layers() -> None:
    with pytest.raises(InputError, match="no normalisation layer"):
        recompute_bn(nn.Linear(3, 3), split(normal(4, 3), 4))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_that_are_not_finite_name_the_layer(value: str) -> None:
    model = conv_net()
    model[3][0].bias.data.fill_(float(value))
    with pytest.raises(NotFiniteError, match=r"layer '3\.1' receives NaN or Inf"):
        recompute_bn(model, split(normal(8, 2, 8, 8), 8))


def test_a_layer_that_no_data_reach_is_reported() -> None:
    model = Aliased()
    model.lonely = nn.BatchNorm1d(3)
    outcome = recompute_bn(model, split(normal(8, 3), 8))
    assert outcome.layers == ("first",)
    assert "'lonely'" in outcome.warnings[0]


SORTED = torch.arange(4).repeat_interleave(10)


@pytest.mark.parametrize(
    "labels, warns",
    [
        (SORTED, True),
        (SORTED[torch.randperm(40, generator=torch.Generator().manual_seed(0))], False),
        (torch.zeros(40, dtype=torch.long), False),
        (torch.rand(40), False),
    ],
    ids=["sorted", "shuffled", "one-class", "regression"],
)
def test_data_sorted_by_label_are_noticed(labels: torch.Tensor, warns: bool) -> None:
    pairs = [as_batch((normal(10, 3, seed=i), labels[10 * i : 10 * i + 10])) for i in range(4)]
    notes = recompute_bn(nn.Sequential(nn.BatchNorm1d(3)), pairs).warnings
    assert [("sorted by label" in note) for note in notes] == [True] * warns


def test_labels_may_be_a_list() -> None:
    recompute_bn(nn.Sequential(nn.BatchNorm1d(3)), [as_batch((normal(4, 3), [0, 1, 2, 3]))])


@pytest.mark.parametrize(
    "autocast, layout, within",
    [
        pytest.param(torch.bfloat16, torch.contiguous_format, 0.03, id="bf16"),
        pytest.param(torch.float16, torch.contiguous_format, 0.01, id="fp16"),
        pytest.param(None, torch.channels_last, 1e-5, id="channels-last"),
    ],
)
def test_variants_are_near_the_plain_pass(
    autocast: torch.dtype | None, layout: torch.memory_format, within: float
) -> None:
    x = normal(40, 2, 8, 8)
    plain = recompute_bn(conv_net(), split(x, 20, 20)).statistics
    model = conv_net().to(memory_format=layout)
    parts = split(x.to(memory_format=layout), 20, 20)
    found = recompute_bn(model, parts, autocast=autocast).statistics
    for key, wanted in plain.items():
        assert float((found[key] - wanted).norm() / wanted.norm()) < within, key


def test_a_model_in_half_precision() -> None:
    x, model = normal(20, 3).bfloat16(), nn.Sequential(nn.BatchNorm1d(3)).bfloat16()
    recompute_bn(model, split(x, 10, 10))
    assert model[0].running_var.dtype == torch.bfloat16
    assert_statistics(model[0], x, within=2**-8)


def test_the_seed_decides_the_order() -> None:
    data = (normal(64, 2, 8, 8), torch.arange(64) % 3)

    def deep(seed: int, limit: int | None = None) -> tuple[list[float], int]:
        plan = Plan(batch_size=16, shuffle_seed=seed, limit=limit)
        outcome = recompute_bn(conv_net(), batches(data, plan))
        return outcome.statistics["3.1.running_var"].tolist(), outcome.samples

    assert deep(1) == deep(1)
    assert deep(1) != deep(2)
    assert deep(1, limit=20)[1] == 20
    assert deep(1, limit=20) == deep(1, limit=20)


def test_progress_counts_samples() -> None:
    seen: list[int] = []
    recompute_bn(nn.BatchNorm1d(3), split(normal(9, 3), 4, 5), progress=seen.append)
    assert seen == [4, 9]


class TestSeveral:
    """Several models in one pass over the data."""

    def models(self, count: int) -> list[nn.Sequential]:
        found = []
        for seed in range(count):
            torch.manual_seed(seed)
            found.append(nn.Sequential(*(copy.deepcopy(layer) for layer in conv_net())))
            for parameter in found[-1].parameters():
                nn.init.normal_(parameter)
        return found

    @pytest.mark.parametrize("frozen", [(), ("1",)])
    def test_each_is_as_alone(self, frozen: tuple[str, ...]) -> None:
        models = self.models(3)
        alone = copy.deepcopy(models)
        x = normal(23, 2, 8, 8)
        found = recompute_all(models, lambda: split(x, 10, 10, 3), frozen=frozen)
        for model, twin, outcome in zip(models, alone, found, strict=True):
            wanted = recompute_bn(twin, split(x, 10, 10, 3), frozen=frozen)
            assert outcome.layers == wanted.layers
            assert outcome.kept == wanted.kept
            assert outcome.samples == wanted.samples == 23
            assert outcome.warnings == wanted.warnings
            assert list(outcome.statistics) == list(wanted.statistics)
            for key, value in wanted.statistics.items():
                assert torch.equal(outcome.statistics[key], value), key
            for key, value in twin.state_dict().items():
                assert torch.equal(model.state_dict()[key], value), key
            assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]

    def test_the_data_are_read_once(self) -> None:
        read: list[int] = []

        def told() -> Iterator[Batch]:
            for batch in split(normal(20, 2, 8, 8), 10, 10):
                read.append(batch.size)
                yield batch

        recompute_all(self.models(3), told)
        assert read == [10, 10]

    def test_an_error_in_one_leaves_all_as_they_were(self) -> None:
        models = self.models(2)
        nn.init.constant_(models[1][0].weight, float("nan"))
        before = [copy.deepcopy(model.state_dict()) for model in models]
        with pytest.raises(NotFiniteError):
            recompute_all(models, lambda: split(normal(20, 2, 8, 8), 10, 10))
        for model, state in zip(models, before, strict=True):
            for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
                assert torch.equal(model.state_dict()[key], state[key])
            assert not any(module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    """Two paths, a layer that is used twice, and one that no data reach."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
        self.unused = nn.BatchNorm2d(5)
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.twice:
            x = self.left[1](x)
        return torch.as_tensor(self.last(self.left(x) + self.right(x))).mean((2, 3))


def population_of_every_layer(model: nn.Module, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """One layer after the other in float64, all samples at once: what batches stand for."""
    wide = copy.deepcopy(model).double().eval()
    found = {}
    for name in ("first.1", "left.1", "right.1", "last.2"):
        layer = wide.get_submodule(name)
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            wide(x.double())
        handle.remove()
        mean, var = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), correction=0)
        layer.running_mean, layer.running_var = mean, var  # type: ignore[assignment]
        found[name] = [mean, var]
    return found


@pytest.mark.parametrize("sizes", [(60,), (7,) * 8 + (4,), (2,) * 30])
def test_layer_by_layer_is_exact_whatever_the_batches(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = Branches(), normal(60, 3, 10, 10, offset=2)
    wanted = population_of_every_layer(model, x)
    found = recompute_bn(model, split(x, *sizes), layerwise=True)
    for name, (mean, var) in wanted.items():
        own = found.statistics
        np.testing.assert_allclose(own[f"{name}.running_mean"], mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(own[f"{name}.running_var"], var, rtol=1e-6)
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=0)  # type: ignore[union-attr]
    assert found.samples == 60
    assert found.warnings == ("no data reached 1 normalisation layers, such as 'unused'",)
    assert all(module.training for module in model.modules())  # as before


@pytest.mark.parametrize("dtype, within", [(torch.bfloat16, 0.03), (torch.float16, 0.003)])
def test_layer_by_layer_in_half_precision(dtype: torch.dtype, within: float) -> None:
    """Batches of two kinds: normalised by the batch, deeper layers would see something else."""
    torch.manual_seed(0)
    model, x = Branches().to(dtype), normal(60, 3, 10, 10)
    x[:30] += 6
    wanted = population_of_every_layer(model, x.to(dtype))
    found = recompute_bn(model, split(x.to(dtype), *(6,) * 10), layerwise=True).statistics
    for name, (mean, var) in wanted.items():
        off = (found[f"{name}.running_mean"] - mean).abs() / var.sqrt()
        assert float(off.max()) < within
        assert float((found[f"{name}.running_var"] / var - 1).abs().max()) < within


def test_layer_by_layer_behind_instance_norm() -> None:
    """In eval mode it normalises by its own running values."""
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(norm, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).eval()
    x = normal(24, 4, 9, 9)
    found = recompute_bn(model, split(x, 8, 8, 8), layerwise=True).statistics
    with torch.no_grad():
        assert_statistics(model[2], model[1](norm(x)))
    assert found.keys() >= {"2.running_var"}


def test_layer_by_layer_a_last_batch_of_one_sample_counts() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3)), normal(9, 3)
    recompute_bn(model, split(x, 8, 1), layerwise=True)
    assert_statistics(model[0], x)


def test_an_empty_batch() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3)), normal(8, 3)
    with pytest.raises(InputError, match="layer '0' receives an empty batch"):
        recompute_bn(model, split(x, 8, 0))


def test_layer_by_layer_with_a_layer_that_is_used_twice() -> None:
    torch.manual_seed(0)
    model, x = Branches(twice=True), normal(20, 3, 8, 8)
    found = recompute_bn(model, split(x, 20), layerwise=True)
    assert torch.isfinite(found.statistics["last.2.running_var"]).all()
    assert "left.1" in found.layers


def test_layer_by_layer_leaves_everything_as_it_was_when_it_fails() -> None:
    model, x = Branches(), normal(8, 3, 6, 6)
    x[5, 0, 0, 0] = torch.nan
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NotFiniteError):
        recompute_bn(model, split(x, 4, 4), layerwise=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="empty"):
        recompute_bn(model, [], layerwise=True)


@pytest.mark.parametrize("layerwise", [False, True])
def test_channels_last_gives_the_same_and_leaves_no_trace(layerwise: bool) -> None:
    torch.manual_seed(0)
    model, x = Branches(), normal(32, 3, 8, 8)
    other = copy.deepcopy(model)
    plain = recompute_bn(model, split(x, 16, 16), layerwise=layerwise).statistics
    fast = recompute_bn(other, split(x, 16, 16), layerwise=layerwise, channels_last=True).statistics
    for key, value in plain.items():
        np.testing.assert_allclose(fast[key], value, rtol=1e-4, atol=1e-5)
    assert all(p.is_contiguous() for p in other.parameters())
