"""Owns the proof that what a graph is called with is what the data or `--input` say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.errors import InputError, UsageError
from ensemblekit.graphs.interface import (
    Spec,
    example_of,
    generated,
    inputs_of,
    interface_of,
    parse_spec,
)
from ensemblekit.graphs.template import Interface, Port

# ------------------------------------------------------------------------------ --input


@pytest.mark.parametrize(
    "text, port, sizes",
    [
        ("x:float32[batch,3,32,32]", Port("x", "float32", ("batch", 3, 32, 32)), {}),
        ("ids:int64[batch,seq=16]", Port("ids", "int64", ("batch", "seq")), {"seq": 16}),
        (" a b :bool[ n , 2 ] ", Port("a b", "bool", ("n", 2)), {}),
        ("scale:float64[]", Port("scale", "float64", ()), {}),
        ("model.input/0:uint8[N]", Port("model.input/0", "uint8", ("N",)), {}),
        ("x:float16[batch=4]", Port("x", "float16", ("batch",)), {"batch": 4}),
    ],
)
def test_good_specs(text: str, port: Port, sizes: dict[str, int]) -> None:
    assert parse_spec(text) == Spec(port, sizes)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "expected NAME:TYPE"),
        ("x", "expected NAME:TYPE"),
        ("x:float32", "expected NAME:TYPE"),
        ("x[3]", "expected NAME:TYPE"),
        (":float32[3]", "expected NAME:TYPE"),
        ("x:float32[3", "expected NAME:TYPE"),
        ("x:float32[3]]", "expected NAME:TYPE"),
        ("x:y:float32[3]", "expected NAME:TYPE"),
        ("x:float[3]", "float32"),
        ("x:complex64[3]", "type"),
        ("x:float32[0]", "'0' is no size"),
        ("x:float32[-1]", "'-1' is no size"),
        ("x:float32[3.5]", "'3.5' is no size"),
        ("x:float32[a b]", "'a b' is no size"),
        ("x:float32[batch=0]", "'batch=0' is no size"),
        ("x:float32[batch=n]", "'batch=n' is no size"),
        ("x:float32[3=4]", "'3=4' is no size"),
        ("x:float32[batch=]", "no size"),
        ("x:float32[batch,,3]", "no size"),
        ("x:float32[²]", "no size"),
    ],
)
def test_bad_specs(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_spec(text)
    assert words in caught.value.message
    assert "--input" in caught.value.message


names = st.from_regex(r"[A-Za-z_][\w.]{0,8}", fullmatch=True).filter(str.isascii)
sizes = st.one_of(st.integers(1, 10_000), st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=names,
    dtype=st.sampled_from(["float32", "int64", "bool", "uint8"]),
    dims=st.lists(sizes, max_size=5),
)
def test_a_port_reads_as_it_is_written(name: str, dtype: str, dims: list[Any]) -> None:
    port = Port(name, dtype, tuple(dims))
    assert parse_spec(str(port)) == Spec(port, {})


# ------------------------------------------------------------------------------ from data


class Two(nn.Module):
    """Two arguments."""

    def forward(self, image: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return image.flatten(1).sum(1) + table.sum(1)


class Texts(nn.Module):
    """Embeddings of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 4), nn.Embedding(3, 4)

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        made: torch.Tensor = self.words(input_ids).sum((1, 2))
        return made if token_type_ids is None else made + self.kinds(token_type_ids).sum((1, 2))


IMAGE, TABLE = torch.zeros(4, 3, 8, 8), torch.zeros(4, 5)


def test_one_input_is_called_input() -> None:
    found = interface_of(nn.ReLU(), Batch((IMAGE,), None, 4), [], "logits")
    assert found == Interface((Port("input", "float32", ("batch", 3, 8, 8)),), None, "logits")


def test_several_are_called_like_the_arguments() -> None:
    found = interface_of(Two(), Batch((IMAGE, TABLE), None, 4), [], "logits")
    assert [port.name for port in found.ports] == ["image", "table"]
    assert found.ports[1].dims == ("batch", 5)
    assert found.keywords is None


def test_more_inputs_than_arguments_are_numbered() -> None:
    class Any_(nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return args[0]

    found = interface_of(Any_(), Batch((IMAGE, TABLE), None, 4), [], "logits")
    assert [port.name for port in found.ports] == ["input_0", "input_1"]


def test_a_dict_gives_its_keys() -> None:
    ids = torch.zeros(4, 7, dtype=torch.long)
    batch = Batch({"input_ids": ids, "token_type_ids": ids}, None, 4)
    found = interface_of(Texts(), batch, [], "logits")
    assert found.keywords == ("input_ids", "token_type_ids")
    assert found.ports[0] == Port("input_ids", "int64", ("batch", 7))
    assert list(inputs_of(batch, found)) == ["input_ids", "token_type_ids"]
    assert [len(tensor) for tensor in example_of(batch, found)] == [3, 3]


def test_what_is_not_per_sample_has_no_batch() -> None:
    batch = Batch((IMAGE, torch.tensor(2.0)), None, 4)
    found = interface_of(Two(), batch, [], "logits")
    assert found.ports[1].dims == ()


def test_input_wins_over_the_data() -> None:
    specs = [parse_spec("picture:float32[n,3,height,width]")]
    found = interface_of(nn.ReLU(), Batch((IMAGE,), None, 4), specs, "logits")
    assert found.ports[0] == Port("picture", "float32", ("n", 3, "height", "width"))


def test_specs_of_a_dict_are_put_in_its_order() -> None:
    ids = torch.zeros(4, 7, dtype=torch.long)
    batch = Batch({"input_ids": ids, "token_type_ids": ids}, None, 4)
    specs = [parse_spec(f"{n}:int64[batch,seq]") for n in ("token_type_ids", "input_ids")]
    found = interface_of(Texts(), batch, specs, "logits")
    assert [port.name for port in found.ports] == ["input_ids", "token_type_ids"]
    assert found.ports[0].dims == ("batch", "seq")


@pytest.mark.parametrize(
    "texts, kind, words",
    [
        (["a:float32[batch,3,8,8]", "b:float32[n]"], UsageError, "2 of --input"),
        (["a:float64[batch,3,8,8]"], InputError, "the data have float32[4, 3, 8, 8]"),
        (["a:float32[batch,3,8,9]"], InputError, "the data have float32[4, 3, 8, 8]"),
        (["a:float32[batch,3,8]"], InputError, "the data have float32[4, 3, 8, 8]"),
    ],
)
def test_specs_that_do_not_fit_the_data(
    texts: list[str], kind: type[Exception], words: str
) -> None:
    specs = [parse_spec(text) for text in texts]
    with pytest.raises(kind) as caught:
        interface_of(nn.ReLU(), Batch((IMAGE,), None, 4), specs, "logits")
    assert words in str(caught.value)


def test_specs_of_other_names_than_the_dict() -> None:
    ids = torch.zeros(4, 7, dtype=torch.long)
    with pytest.raises(UsageError, match="the data's inputs are input_ids"):
        interface_of(
            Texts(), Batch({"input_ids": ids}, None, 4), [parse_spec("ids:int64[b,s]")], "logits"
        )


def test_something_that_is_no_tensor() -> None:
    with pytest.raises(InputError, match="input 'b' is a str"):
        interface_of(nn.ReLU(), Batch({"a": IMAGE, "b": "text"}, None, 4), [], "logits")


# ------------------------------------------------------------------------------ without data


def test_nothing_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="inputs are not known"):
        interface_of(nn.ReLU(), None, [], "logits")


def test_names_of_arguments_are_keywords() -> None:
    specs = [parse_spec(f"{n}:float32[batch,5]") for n in ("table", "image")]
    assert interface_of(Two(), None, specs, "logits").keywords == ("table", "image")
    specs = [parse_spec(f"{n}:float32[batch,5]") for n in ("a", "b")]
    assert interface_of(Two(), None, specs, "logits").keywords is None


def test_the_same_name_twice_is_refused() -> None:
    specs = [parse_spec("image:float32[batch,5]")] * 2
    with pytest.raises(UsageError):
        interface_of(Two(), None, specs, "logits")


def test_generated_samples_fit_the_model() -> None:
    specs = [
        parse_spec("input_ids:int64[batch,seq=6]"),
        parse_spec("token_type_ids:int64[batch,seq]"),
    ]
    interface = interface_of(Texts(), None, specs, "logits")
    batch = generated(Texts(), interface, specs, 64)
    assert isinstance(batch.inputs, dict)
    assert batch.size == 64
    ids = batch.inputs["input_ids"]
    assert ids.shape == (64, 6)
    assert int(ids.max()) > 2  # of its own table, not of the smallest
    assert int(batch.inputs["token_type_ids"].max()) == 2
    assert int(ids.min()) == 0
    assert Texts()(**batch.inputs).shape == (64,)
    again = generated(Texts(), interface, specs, 64)
    assert isinstance(again.inputs, dict)
    assert torch.equal(again.inputs["input_ids"], ids)
    other = generated(Texts(), interface, specs, 64, seed=1)
    assert isinstance(other.inputs, dict)
    assert not torch.equal(other.inputs["input_ids"], ids)


def test_generated_samples_of_every_type() -> None:
    texts = [
        "a:float32[batch,1000]", "b:bool[batch,4]", "c:uint8[batch,3]", "d:float16[batch]",
        "e:float64[]", "f:int32[2,n]",
    ]  # fmt: skip
    specs = [parse_spec(text) for text in texts]
    interface = Interface(tuple(spec.port for spec in specs), None, "logits")
    batch = generated(nn.ReLU(), interface, specs, 5)
    assert isinstance(batch.inputs, tuple)
    shapes = [tuple(value.shape) for value in batch.inputs]
    assert shapes == [(5, 1000), (5, 4), (5, 3), (5,), (), (2, 8)]
    types = [torch.float32, torch.bool, torch.uint8, torch.float16, torch.float64, torch.int32]
    assert [value.dtype for value in batch.inputs] == types
    normal = batch.inputs[0]
    assert abs(float(normal.mean())) < 0.05
    assert float(normal.std()) == pytest.approx(1, abs=0.05)


def test_the_first_open_size_is_the_samples_where_none_is_called_batch() -> None:
    specs = [parse_spec("x:float32[n,m=3]")]
    interface = Interface((specs[0].port,), None, "logits")
    inputs = generated(nn.ReLU(), interface, specs, 11).inputs
    assert isinstance(inputs, tuple)
    (value,) = inputs
    assert value.shape == (11, 3)
