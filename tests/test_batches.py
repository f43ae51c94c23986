"""Batches: every form of data that a user may hand over, and how it is cut up."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ensemblekit.batches import (
    Batch,
    Plan,
    as_batch,
    batches,
    check_repeatable,
    count,
    digest,
    forward,
)
from ensemblekit.errors import EnsembleKitError, InputError, UsageError

X = torch.arange(30, dtype=torch.float32).reshape(10, 3)
Y = torch.arange(10)


class Squares(Dataset[tuple[torch.Tensor, int]]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return X[index], index


class Records(Squares):
    def __getitem__(self, index: int) -> Any:
        return {"pixels": X[index], "label": index}


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """Samples, not batches, as torch's class has it."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return ((X[i], i) for i in range(10))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 10


def generator() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(X.split(4), Y.split(4), strict=True)


FORMS: dict[str, Any] = {
    "torch-pair": (X, Y),
    "numpy-pair": (X.numpy(), Y.numpy()),
    "mixed-pair": [X.numpy(), Y],
    "float64-pair": (X.double().numpy(), Y.numpy()),
    "big-endian-pair": (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    "strided-pair": (np.asfortranarray(X.numpy()), Y.numpy()[::-1][::-1]),
    "tensor-dataset": TensorDataset(X, Y),
    "dataset": Squares(),
    "dict-dataset": Records(),
    "loader": DataLoader(Squares(), batch_size=4),
    "list": list(generator()),
    "batches": [as_batch(pair) for pair in generator()],
    "iterable-dataset": Stream(),
    "sized-iterable-dataset": SizedStream(),
}


def inputs(batch: Batch) -> torch.Tensor:
    values = batch.inputs.values() if isinstance(batch.inputs, dict) else batch.inputs
    (only,) = values
    assert isinstance(only, torch.Tensor)
    return only


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(form: str) -> None:
    found = list(batches(FORMS[form], Plan(batch_size=4)))
    assert [batch.size for batch in found] == [4, 4, 2]
    assert torch.equal(torch.cat([inputs(b) for b in found]), X)
    assert torch.equal(torch.cat([b.target for b in found if b.target is not None]), Y)
    assert inputs(found[0]).dtype == torch.float32


def test_a_generator_is_walked_once() -> None:
    assert [b.size for b in batches(generator(), Plan(batch_size=99))] == [4, 4, 2]


@pytest.mark.parametrize("key", ["labels", "label", "y", "target"])
def test_a_dict_holds_its_label_under_a_known_key(key: str) -> None:
    batch = as_batch({"pixels": X, "mask": X > 3, key: Y})
    assert batch.target is not None
    assert torch.equal(batch.target, Y)
    assert isinstance(batch.inputs, dict)
    assert list(batch.inputs) == ["pixels", "mask"]
    assert forward(lambda pixels, mask: (pixels * mask).sum(), batch) == X[X > 3].sum()  # type: ignore[arg-type]


def test_several_inputs() -> None:
    batch = as_batch((X, X + 1, Y))
    assert len(batch.inputs) == 2
    assert torch.equal(forward(lambda a, b: b - a, batch), torch.ones(10, 3))  # type: ignore[arg-type]
    (whole,) = batches((X, X + 1, Y), Plan())
    assert len(whole.inputs) == 2


@pytest.mark.parametrize("raw", [X, X.numpy(), (X,), [X], {"pixels": X}])
def test_data_without_labels(raw: Any) -> None:
    batch = as_batch(raw)
    assert batch.target is None
    assert batch.size == 10
    assert torch.equal(inputs(batch), X)


@pytest.mark.parametrize("data", [X, X.numpy(), X.double().numpy()], ids=["torch", "f4", "f8"])
def test_one_array_alone_is_unlabelled_data(data: Any) -> None:
    found = list(batches(data, Plan(batch_size=4)))
    assert [(b.size, b.target) for b in found] == [(4, None), (4, None), (2, None)]
    assert inputs(found[0]).dtype == torch.float32


def test_labels_become_a_tensor() -> None:
    target = as_batch((X, list(range(10)))).target
    assert isinstance(target, torch.Tensor)
    assert torch.equal(target, Y)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, np.int32, np.bool_])
def test_labels_of_any_integer_type(kind: type) -> None:
    found = list(batches((X.numpy(), Y.numpy().astype(kind)), Plan(batch_size=4)))
    assert [b.size for b in found] == [4, 4, 2]


@pytest.mark.parametrize(
    "data, error, words",
    [
        ((X, Y[:9]), InputError, "different lengths: [9, 10]"),
        ((X[:0], Y[:0]), InputError, "empty"),
        ([], InputError, "empty"),
        (iter(()), InputError, "empty"),
        (7, UsageError, "expected a Dataset"),
        (None, UsageError, "NoneType"),
        (["words"], InputError, "a batch is a str"),
        ([("a", "b")], InputError, "no tensor"),
        ([{"label": Y}], InputError, "no tensor"),
        ((X.numpy(), np.array(["cat"] * 10)), InputError, ""),
        ((np.array([None] * 10), Y.numpy()), InputError, ""),
    ],
)
def test_what_cannot_be_a_batch_is_an_error(
    data: Any, error: type[EnsembleKitError], words: str
) -> None:
    with pytest.raises(error) as caught:
        list(batches(data, Plan()))
    assert words in caught.value.message


@pytest.mark.parametrize(
    "total, batch_size, sizes",
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),
        (4, 4, [4]),
        (1, 4, [1]),
        (5, 1, [1, 1, 1, 2]),
        (3, 128, [3]),
    ],
)
@pytest.mark.parametrize("dataset", [False, True])
def test_the_last_batch_is_never_one_sample(
    total: int, batch_size: int, sizes: list[int], dataset: bool
) -> None:
    pair = (X[:total], Y[:total])
    data = TensorDataset(*pair) if dataset else pair
    assert [b.size for b in batches(data, Plan(batch_size))] == sizes


def labels(data: Any, plan: Plan) -> list[int]:
    return [int(v) for b in batches(data, plan) for v in b.target]  # type: ignore[union-attr]


@pytest.mark.parametrize("data", [(X, Y), Squares()], ids=["arrays", "dataset"])
def test_order_and_subset_are_seeded(data: Any) -> None:
    shuffled = labels(data, Plan(4, shuffle_seed=5))
    assert sorted(shuffled) == list(range(10))
    assert shuffled == labels(data, Plan(4, shuffle_seed=5))
    assert shuffled != labels(data, Plan(4, shuffle_seed=6))
    assert labels(data, Plan(4)) == list(range(10))
    stored = labels(data, Plan(4, limit=6))
    assert stored == sorted(stored)
    assert stored != list(range(6))  # a sample of all, not the head: folders are sorted by class
    assert len(labels(data, Plan(4, shuffle_seed=5, limit=6))) == 6
    assert len(labels(data, Plan(4, limit=99))) == 10


@pytest.mark.parametrize("limit", [1, 4, 6, 99])
def test_a_limit_holds_for_iterables(limit: int) -> None:
    assert sum(b.size for b in batches(generator(), Plan(limit=limit))) == min(limit, 10)


def test_a_limit_reads_no_batch_too_many() -> None:
    stream = generator()
    list(batches(stream, Plan(limit=4)))
    assert len(list(stream)) == 2


@pytest.mark.parametrize(
    "data, limit, wanted",
    [
        ((X, Y), None, 10),
        ((X, Y), 4, 4),
        (Squares(), 99, 10),
        (DataLoader(Squares(), batch_size=4), None, 10),
        (DataLoader(Squares(), batch_size=4), 4, 4),
        (generator(), 4, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_count_foretells_the_samples(data: Any, limit: int | None, wanted: int | None) -> None:
    assert count(data, Plan(limit=limit)) == wanted


def test_empty_batches_in_a_stream_are_passed_over() -> None:
    found = list(batches([(X, Y), (X[:0], Y[:0])], Plan()))
    assert [b.size for b in found] == [10]


def test_workers() -> None:
    assert labels(Squares(), Plan(4, workers=1)) == list(range(10))


def test_moving_keeps_what_is_no_tensor() -> None:
    moved = as_batch({"pixels": X, "name": "a", "y": Y}).to(torch.device("meta"))
    assert isinstance(moved.inputs, dict)
    assert moved.inputs["name"] == "a"
    assert moved.inputs["pixels"].device.type == "meta"


def test_arrays_that_cannot_be_written_to() -> None:
    x = X.numpy().copy()
    x.flags.writeable = False  # as np.load(..., mmap_mode="r") gives
    assert [b.size for b in batches((x, Y.numpy()), Plan(4))] == [4, 4, 2]


class TestDigest:
    def test_it_stands_for_inputs_and_labels(self) -> None:
        base = as_batch((X, Y))
        assert digest(base) == digest(as_batch((X.clone(), Y.clone())))
        assert digest(base) == digest(as_batch((X.t().contiguous().t(), Y)))
        flipped, touched = Y.clone(), X.clone()
        flipped[7] += 1
        touched[-1, -1] += 1e-5
        others = [
            as_batch((touched, Y)),
            as_batch((X, flipped)),
            as_batch((X, Y.int())),
            as_batch((X.flip(0), Y)),
            as_batch((X.reshape(10, 1, 3), Y)),
            as_batch((X.double(), Y)),
            as_batch((X, X, Y)),
            as_batch((X,)),
            as_batch({"x": X, "y": Y}),
            as_batch({"z": X, "y": Y}),
            as_batch({"x": X, "text": ["a"] * 10, "y": Y}),
            as_batch({"x": X, "text": ["b"] * 10, "y": Y}),
        ]
        assert len({digest(other) for other in (base, *others)}) == len(others) + 1

    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.uint16, torch.float8_e5m2]
    )
    def test_every_element_type(self, dtype: torch.dtype) -> None:
        assert len(digest(Batch((X.to(dtype),), Y, 10))) == 16

    def test_it_looks_into_nested_inputs(self) -> None:
        """Lists and dicts of tensors are inputs too; their text is cut short, they are not."""
        long = torch.zeros(5000)
        other = long.clone()
        other[2500] = 1
        nested: list[Any] = [[long], [other], {"a": long}, {"a": other}]
        assert len({digest(Batch((X, one), Y, 10)) for one in nested}) == 4


class Noisy(Squares):
    """Random augmentation."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return X[index] + torch.randn(3), index


class Weird(Squares):
    """Random labels."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return X[index], int(torch.randint(10**9, ()))


class TestRepeatable:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form(self, form: str) -> None:
        first = check_repeatable(FORMS[form], lambda: FORMS[form], Plan(batch_size=4), what="val")
        assert torch.equal(inputs(first), X[:4])

    def test_a_generator_is_asked_for_anew(self) -> None:
        first = check_repeatable(generator(), generator, Plan(), what="val")
        assert first.size == 4

    def test_the_first_batch_is_the_first_of_all_on_every_process(self) -> None:
        plan = Plan(batch_size=4, part=(1, 2))
        first = check_repeatable((X, Y), lambda: (X, Y), plan, what="val")
        assert torch.equal(inputs(first), X[:4])

    @pytest.mark.parametrize(
        "data",
        [
            DataLoader(Squares(), batch_size=4, shuffle=True),
            DataLoader(Squares(), batch_size=4, drop_last=True),
            DataLoader(
                Squares(), batch_size=4, sampler=torch.utils.data.SubsetRandomSampler(range(10))
            ),
            DataLoader(Noisy(), batch_size=4),
            Noisy(),
            Weird(),
        ],
        ids=["shuffle", "drop-last", "random-sampler", "noisy-loader", "noisy", "labels"],
    )
    def test_what_is_not_the_same_twice(self, data: Any) -> None:
        torch.manual_seed(0)
        with pytest.raises(InputError) as caught:
            check_repeatable(data, lambda: data, Plan(batch_size=4), what="test")
        assert caught.value.exit_code == 3
        assert "the test data" in caught.value.message
        assert caught.value.hint

    def test_drop_last_that_drops_nothing(self) -> None:
        data = DataLoader(Squares(), batch_size=5, drop_last=True)
        assert check_repeatable(data, lambda: data, Plan(), what="val").size == 5

    @pytest.mark.parametrize("data", [[], (X[:0], Y[:0]), TensorDataset(X[:0], Y[:0])])
    def test_empty_data(self, data: Any) -> None:
        with pytest.raises(InputError, match="empty"):
            check_repeatable(data, lambda: data, Plan(), what="val")


class TestParts:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_processes_share_the_batches(self, form: str, size: int) -> None:
        """Batch n belongs to process n % size; together they are what one process would see."""
        whole = list(batches(FORMS[form], Plan(batch_size=4)))
        parts = [
            list(batches(FORMS[form], Plan(batch_size=4, part=(rank, size))))
            for rank in range(size)
        ]
        for place, batch in enumerate(whole):
            mine = parts[place % size][place // size]
            assert torch.equal(inputs(mine), inputs(batch))
            assert torch.equal(mine.target, batch.target)  # type: ignore[arg-type]
        assert sum(map(len, parts)) == len(whole)

    @pytest.mark.parametrize("form", ["torch-pair", "dataset", "loader", "list"])
    @pytest.mark.parametrize("limit", [1, 5, 9, 10, 99])
    def test_a_limit_holds_over_all_processes(self, form: str, limit: int) -> None:
        taken = [
            batches(FORMS[form], Plan(batch_size=4, limit=limit, part=(rank, 2)))
            for rank in range(2)
        ]
        labels = sorted(int(v) for part in taken for b in part for v in b.target)  # type: ignore[union-attr]
        whole = batches(FORMS[form], Plan(batch_size=4, limit=limit))
        assert labels == sorted(int(v) for b in whole for v in b.target)  # type: ignore[union-attr]
        assert len(labels) == min(limit, 10)

    def test_only_ones_own_share_is_loaded(self) -> None:
        loaded: list[int] = []

        class Told(Squares):
            def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
                loaded.append(index)
                return X[index], index

        list(batches(Told(), Plan(batch_size=4, part=(1, 2))))
        assert loaded == [4, 5, 6, 7]


class TestOnly:
    @pytest.mark.parametrize("keyed", [False, True])
    def test_some_of_the_samples(self, keyed: bool) -> None:
        raw: Any = {"x": X, "scale": torch.tensor(2.0), "y": Y} if keyed else (X, Y)
        batch = as_batch(raw)
        mask = Y % 3 == 0
        found = batch.only(mask)
        values = found.inputs["x"] if isinstance(found.inputs, dict) else found.inputs[0]
        assert torch.equal(values, X[mask])
        assert found.size == 4
        assert found.target is not None
        assert found.target.tolist() == [0, 3, 6, 9]
        assert batch.only(torch.ones(10, dtype=torch.bool)) is batch
        if isinstance(found.inputs, dict):
            assert found.inputs["scale"] == 2
