"""Combiners: M outputs become one, beside the same formulas written down plainly in float64."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, logit, logsumexp, softmax
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV

from ensemblekit.combiners import COMBINERS, best_temperature, combine, combiner
from ensemblekit.errors import UsageError
from ensemblekit.tasks import TASKS

torch.set_num_threads(1)
Array = np.ndarray
MEMBERS, ROWS, CLASSES = 4, 60, 5


def outputs(
    task: str,
    members: int = MEMBERS,
    rows: int = ROWS,
    classes: int = CLASSES,
    *,
    seed: int = 0,
    scale: float = 2.0,
) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=(members, rows, classes)) * scale
    if task == "classification":
        values = log_softmax(values, axis=2)
    return torch.from_numpy(values.astype(np.float32))


def targets(task: str, rows: int = ROWS, classes: int = CLASSES, *, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed + 100)
    if task == "classification":
        return rng.integers(0, classes, rows)
    if task == "multilabel":
        return rng.integers(0, 2, (rows, classes)).astype(np.uint8)
    return rng.normal(size=(rows, classes))


def wide(values: torch.Tensor) -> Array:
    return values.double().numpy()


def nll(made: Array, truth: Array, task: str) -> float:
    if task == "classification":
        return float(-np.take_along_axis(made, truth[:, None], axis=1).mean())
    return float(-log_expit(np.where(truth == 1, made, -made)).mean())


WEIGHTS = np.array([0.5, 0.25, 0.0, 0.25])
PLAIN = {
    ("mean", "classification"): lambda o: np.log(np.exp(o).mean(axis=0)),
    ("mean", "multilabel"): lambda o: logit(expit(o).mean(axis=0)),
    ("mean", "regression"): lambda o: o.mean(axis=0),
    ("weighted", "classification"): lambda o: np.log(np.tensordot(WEIGHTS, np.exp(o), 1)),
    ("weighted", "multilabel"): lambda o: logit(np.tensordot(WEIGHTS, expit(o), 1)),
    ("weighted", "regression"): lambda o: np.tensordot(WEIGHTS, o, 1),
    ("mean-logits", "classification"): lambda o: log_softmax(o.mean(axis=0), axis=1),
    ("mean-logits", "multilabel"): lambda o: o.mean(axis=0),
    ("temperature", "classification"): lambda o: log_softmax(
        np.log(np.exp(o).mean(axis=0)) / 1.7, axis=1
    ),
    ("temperature", "multilabel"): lambda o: logit(expit(o).mean(axis=0)) / 1.7,
}
PARAMS = {"weighted": {"weights": WEIGHTS.tolist()}, "temperature": {"temperature": 1.7}}


@pytest.mark.parametrize("name, task", PLAIN)
def test_formulas(name: str, task: str) -> None:
    stacked = outputs(task)
    found = combine(name, stacked, PARAMS.get(name), task)
    assert found.dtype == torch.float32
    assert found.shape == stacked.shape[1:]
    np.testing.assert_allclose(wide(found), PLAIN[name, task](wide(stacked)), atol=2e-5)


class TestVote:
    @pytest.mark.parametrize("classes", [2, 5])
    @pytest.mark.parametrize("members", [2, 3, 4, 5])
    def test_most_votes_then_the_mean_probability(self, members: int, classes: int) -> None:
        stacked = outputs("classification", members, 400, classes, scale=0.5)
        found = combine("vote", stacked, None, "classification").argmax(1)
        probs = np.exp(wide(stacked))
        for r in range(400):
            votes = np.bincount(probs[:, r].argmax(axis=1), minlength=classes)
            mean = probs[:, r].mean(axis=0)
            best = max(range(classes), key=lambda c: (votes[c], mean[c]))
            assert found[r] == best

    @pytest.mark.parametrize("members", [2, 3, 4, 5])
    def test_labels(self, members: int) -> None:
        stacked = outputs("multilabel", members, 400)
        found = combine("vote", stacked, None, "multilabel") > 0
        votes = (wide(stacked) > 0).sum(axis=0)
        tie_broken = expit(wide(stacked)).mean(axis=0) > 0.5
        wanted = np.where(2 * votes == members, tie_broken, 2 * votes > members)
        np.testing.assert_array_equal(found, wanted)


class TestTemperature:
    @pytest.mark.parametrize("task", ["classification", "multilabel"])
    @pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
    @pytest.mark.parametrize("seed", range(3))
    def test_the_minimum(self, task: str, scale: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        truth = targets(task, 500, seed=seed)
        hot = np.eye(CLASSES)[truth] if task == "classification" else truth
        logits = (rng.normal(size=(500, CLASSES)) + hot) * scale

        def loss(log_t: float) -> float:
            divided = logits / np.exp(log_t)
            made = log_softmax(divided, axis=1) if task == "classification" else divided
            return nll(made, truth, task)

        wanted = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
        found = best_temperature(torch.from_numpy(logits), torch.from_numpy(truth), task)
        assert 0.05 <= found <= 20
        assert loss(np.log(found)) <= wanted.fun + 1e-9
        assert np.log(found) == pytest.approx(wanted.x, abs=1e-3)

    def test_separable_data(self) -> None:
        """The colder the better, until nothing is left to gain."""
        logits, truth = torch.eye(3).repeat(5, 1) * 4, torch.arange(3).repeat(5)
        found = best_temperature(logits, truth, "classification")
        assert found >= 0.05
        left = torch.nn.functional.cross_entropy(logits.double() / found, truth)
        assert float(left) < 1e-9

    def test_data_that_are_always_wrong(self) -> None:
        logits, truth = torch.eye(3).repeat(5, 1) * 4, (torch.arange(3).repeat(5) + 1) % 3
        assert best_temperature(logits, truth, "classification") == pytest.approx(20)

    def test_equal_logits(self) -> None:
        found = best_temperature(torch.zeros(6, 3), torch.arange(6) % 3, "classification")
        assert 0.05 <= found <= 20

    def test_a_class_that_is_ruled_out(self) -> None:
        logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
        logits[:, 2] = float("-inf")
        found = best_temperature(logits, torch.arange(30) % 2, "classification")
        wanted = best_temperature(logits[:, :2], torch.arange(30) % 2, "classification")
        assert found == pytest.approx(wanted, rel=1e-6)

    @pytest.mark.parametrize("task", ["classification", "multilabel"])
    def test_the_fit_is_of_the_mean(self, task: str) -> None:
        stacked, truth = outputs(task), targets(task)
        fit = COMBINERS["temperature"].fit
        assert fit is not None
        params = fit(stacked.numpy(), truth, task)
        assert params is not None
        mean = combine("mean", stacked, None, task)
        wanted = best_temperature(mean, torch.from_numpy(truth), task)
        assert params["temperature"] == pytest.approx(wanted, rel=1e-6)
        made = combine("temperature", stacked, params, task)
        assert nll(wide(made), truth, task) <= nll(wide(mean), truth, task) + 1e-6


def fitted(name: str, stacked: torch.Tensor, truth: Array, task: str) -> Any:
    fit = COMBINERS[name].fit
    assert fit is not None
    return fit(stacked.numpy(), truth, task)


def features(stacked: Array) -> Array:
    return np.concatenate(list(stacked), axis=1)


class TestStacking:
    def test_ridge_of_classes(self) -> None:
        stacked, truth = outputs("classification"), targets("classification")
        params = fitted("stack-ridge", stacked, truth, "classification")
        probs = features(np.exp(wide(stacked)))
        model = RidgeCV(alphas=np.logspace(-2, 4, 13)).fit(probs, np.eye(CLASSES)[truth])
        found = combine("stack-ridge", stacked, params, "classification")
        np.testing.assert_allclose(wide(found), model.predict(probs), atol=1e-4)

    def test_ridge_of_classes_is_the_closed_form(self) -> None:
        stacked, truth = outputs("classification"), targets("classification")
        params = fitted("stack-ridge", stacked, truth, "classification")
        probs, hot = features(np.exp(wide(stacked))), np.eye(CLASSES)[truth]
        losses = {}
        for alpha in np.logspace(-2, 4, 13):  # leave-one-out, by leaving one out
            errors = []
            for r in range(ROWS):
                rest = np.arange(ROWS) != r
                model = Ridge(alpha=alpha).fit(probs[rest], hot[rest])
                errors.append(((model.predict(probs[r : r + 1]) - hot[r]) ** 2).mean())
            losses[alpha] = np.mean(errors)
        model = Ridge(alpha=min(losses, key=losses.__getitem__)).fit(probs, hot)
        np.testing.assert_allclose(np.array(params["coef"]), model.coef_, atol=1e-6)
        np.testing.assert_allclose(np.array(params["intercept"]), model.intercept_, atol=1e-6)

    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_logistic(self, classes: int) -> None:
        stacked = outputs("classification", 3, 80, classes)
        truth = targets("classification", 80, classes)
        params = fitted("stack-logistic", stacked, truth, "classification")
        x = features(wide(stacked))
        found = wide(combine("stack-logistic", stacked, params, "classification"))
        np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)
        model = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit(x - x.mean(0), truth)
        np.testing.assert_allclose(np.exp(found), model.predict_proba(x - x.mean(0)), atol=0.01)

    @pytest.mark.parametrize("columns", [1, 3])
    def test_ridge_of_values(self, columns: int) -> None:
        stacked = outputs("regression", 3, 50, columns)
        truth = targets("regression", 50, columns)
        params = fitted("ridge", stacked, truth, "regression")
        x = features(wide(stacked))
        model = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(x, truth)
        found = combine("ridge", stacked, params, "regression")
        assert found.shape == (50, columns)
        wanted = model.predict(x).reshape(50, columns)
        np.testing.assert_allclose(wide(found), wanted, atol=1e-4)

    def test_a_class_that_never_occurs_has_no_logistic_model(self) -> None:
        stacked, truth = outputs("classification"), targets("classification") % (CLASSES - 1)
        assert fitted("stack-logistic", stacked, truth, "classification") is None

    @pytest.mark.parametrize("name", ["stack-ridge", "stack-logistic"])
    def test_too_few_rows(self, name: str) -> None:
        stacked = outputs("classification", 3, 9)
        assert fitted(name, stacked, np.arange(9) % CLASSES, "classification") is None

    @pytest.mark.parametrize("name", ["stack-ridge", "stack-logistic"])
    def test_a_class_that_a_member_rules_out(self, name: str) -> None:
        stacked = outputs("classification")
        stacked[1, :, 2] = float("-inf")
        params = fitted(name, stacked, targets("classification"), "classification")
        made = combine(name, stacked, params, "classification")
        assert bool(torch.isfinite(made).all())


PAIRS = [(name, task) for name, one in COMBINERS.items() for task in one.tasks]


def params_of(name: str, stacked: torch.Tensor, task: str) -> dict[str, Any] | None:
    if name == "weighted":
        weights = np.random.default_rng(0).dirichlet(np.ones(len(stacked)))
        return {"weights": weights.tolist()}
    if not COMBINERS[name].fitted:
        return None
    params: dict[str, Any] = fitted(name, stacked, targets(task), task)
    return params


DENSE = ("segmentation", "tokens")
WHOLE = [(name, task) for name, task in PAIRS if task not in DENSE]


class TestAllOfThem:
    @pytest.mark.parametrize("name, task", WHOLE)
    def test_outputs_are_what_the_entry_says(self, name: str, task: str) -> None:
        stacked = outputs(task)
        made = combine(name, stacked, params_of(name, stacked, task), task)
        assert made.shape == stacked.shape[1:]
        assert bool(torch.isfinite(made).all())
        if task == "classification" and COMBINERS[name].likelihood:
            torch.testing.assert_close(made.exp().sum(1), torch.ones(ROWS))

    @pytest.mark.parametrize("name, task", WHOLE)
    def test_the_order_of_members_does_not_matter(self, name: str, task: str) -> None:
        stacked = outputs(task)
        params = params_of(name, stacked, task)
        made = combine(name, stacked, params, task)
        for order in itertools.islice(itertools.permutations(range(MEMBERS)), 5, 20, 7):
            again = stacked[list(order)]
            theirs = params
            if name == "weighted":
                assert params is not None
                theirs = {"weights": [params["weights"][m] for m in order]}
            elif params is not None:
                theirs = params_of(name, again, task)
            found = combine(name, again, theirs, task)
            close = {"stack-logistic": 2e-2}.get(name, 1e-4)
            torch.testing.assert_close(found, made, atol=close, rtol=close)

    @pytest.mark.parametrize("name, task", WHOLE)
    def test_equal_members_are_one(self, name: str, task: str) -> None:
        if name in ("stack-ridge", "stack-logistic", "ridge", "temperature"):
            pytest.skip("fitted: it may improve on a single member")
        one = outputs(task, 1)
        stacked = one.expand(3, -1, -1)
        params = {"weights": [0.2, 0.3, 0.5]} if name == "weighted" else None
        made = combine(name, stacked, params, task)
        if name == "vote":
            decided = made.argmax(1) if task == "classification" else made > 0
            wanted = one[0].argmax(1) if task == "classification" else one[0] > 0
            assert torch.equal(decided, wanted)
        else:
            torch.testing.assert_close(made, one[0], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("task", TASKS)
    def test_a_single_member_is_itself(self, task: str) -> None:
        one = outputs(task, 1)
        assert torch.equal(combine(None, one, None, task), one[0])
        torch.testing.assert_close(combine("mean", one, None, task), one[0], atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("name", ["weighted", "mean"])
    @pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
    def test_one_hot_weights_take_one_member(self, name: str, task: str) -> None:
        stacked = outputs(task)
        weights = [0.0, 0.0, 1.0, 0.0]
        found = combine("weighted", stacked, {"weights": weights}, task)
        torch.testing.assert_close(found, stacked[2], atol=1e-6, rtol=1e-6)

    def test_names(self) -> None:
        assert combiner("soft-vote") is COMBINERS["mean"]
        with pytest.raises(UsageError, match="stack-ridge"):
            combiner("stack_ridge")

    @pytest.mark.parametrize("name", COMBINERS)
    def test_fitted_numbers_are_plain(self, name: str) -> None:
        import json

        task = COMBINERS[name].tasks[0]
        if COMBINERS[name].fitted:
            params = params_of(name, outputs(task), task)
            assert json.loads(json.dumps(params)) == params


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    members=st.integers(2, 6),
    scale=st.sampled_from([0.1, 2.0, 20.0]),
    task=st.sampled_from(["classification", "multilabel", "regression"]),
)
def test_the_mean_is_no_worse_than_its_members_on_average(
    seed: int, members: int, scale: float, task: str
) -> None:
    """Jensen: NLL and squared error are convex, for every weighting."""
    stacked = outputs(task, members, 30, seed=seed, scale=scale)
    truth = targets(task, 30, seed=seed)
    weights = np.random.default_rng(seed).dirichlet(np.ones(members))

    def loss(made: Array) -> float:
        return (
            float(((made - truth) ** 2).mean()) if task == "regression" else nll(made, truth, task)
        )

    each = np.array([loss(one) for one in wide(stacked)])
    mean = loss(wide(combine("mean", stacked, None, task)))
    mixed = loss(wide(combine("weighted", stacked, {"weights": weights.tolist()}, task)))
    assert mean <= each.mean() * (1 + 1e-5) + 1e-6
    assert mixed <= weights @ each * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_sure_members_do_not_overflow(task: str) -> None:
    """Probabilities that are 0 or 1 in float32 still have their logarithms."""
    stacked = outputs(task, scale=300.0)
    found = wide(combine("mean", stacked, None, task))
    assert np.isfinite(found).all()
    if task == "classification":
        wanted = logsumexp(wide(stacked), axis=0) - np.log(MEMBERS)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        yes = logsumexp(log_expit(wide(stacked)), axis=0)
        no = logsumexp(log_expit(-wide(stacked)), axis=0)
        np.testing.assert_allclose(found, yes - no, rtol=1e-4, atol=1e-4)


def test_the_mean_keeps_a_distribution() -> None:
    probs = softmax(np.random.default_rng(0).normal(size=(3, 20, 4)), axis=2)
    stacked = torch.from_numpy(np.log(probs).astype(np.float32))
    made = combine("mean", stacked, None, "classification").exp()
    low, high = stacked.exp().amin(0), stacked.exp().amax(0)
    assert bool(((made >= low - 1e-6) & (made <= high + 1e-6)).all())
