"""Owns what the exported graph is called with: names, types and open sizes of its inputs.

Input: an example batch, or what the user wrote after `--input`.
"""

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.errors import InputError, UsageError, one_of
from ensemblekit.graphs.template import Interface, Port

_SPEC = re.compile(r"^(?P<name>[^:\[\]]+):(?P<dtype>\w+)\[(?P<dims>[^\]]*)\]$")
_DTYPES = ("float32", "float16", "float64", "int64", "int32", "bool", "uint8")
_OPEN_SIZE = 8  # of an open dimension that nobody gave a size
_EXAMPLE = 3  # samples that are exported with: 0 and 1 are special to the exporters


@dataclass(frozen=True)
class Spec:
    """One `--input`.

    Attributes:
        port: Name, type and sizes.
        sizes: Of each open dimension in generated samples, by its name.
    """

    port: Port
    sizes: dict[str, int]


def parse_spec(text: str) -> Spec:
    """`name:float32[batch,3,32,32]`; an open dimension may have a size: `seq=16`.

    >>> parse_spec("ids:int64[batch,seq=16]").port
    Port(name='ids', dtype='int64', dims=('batch', 'seq'))

    Raises:
        UsageError: It is written in another way.
    """
    match = _SPEC.match(text.strip())
    if match is None:
        raise UsageError(
            f"--input {text}: expected NAME:TYPE[SIZES]",
            hint="--input 'image:float32[batch,3,32,32]', open sizes by a word",
        )
    dtype = one_of(match["dtype"], _DTYPES, what=f"type in --input {text}")
    dims: list[int | str] = []
    sizes = {}
    given = match["dims"].strip()
    for part in (p.strip() for p in given.split(",")) if given else ():
        word, equals, size = part.partition("=")
        if word.isdecimal() and int(word) > 0 and not equals:
            dims.append(int(word))
        elif word.isidentifier() and (not equals or (size.isdecimal() and int(size) > 0)):
            dims.append(word)
            if equals:
                sizes[word] = int(size)
        else:
            raise UsageError(
                f"--input {text}: '{part}' is no size; expected a number, a word, or word=number"
            )
    return Spec(Port(match["name"].strip(), dtype, tuple(dims)), sizes)


def interface_of(
    model: nn.Module, example: Batch | None, specs: Sequence[Spec], output: str
) -> Interface:
    """How the exported model is called.

    Without `--input` names are the keys of a dict batch; `input` where there is one input; or the
    names of the forward's parameters. The first axis is open, and called `batch`.

    Args:
        model: The model.
        example: A batch of data, where there are any.
        specs: What the user said; they win.
        output: Name of the output.

    Raises:
        UsageError: Neither data nor `--input`, or ones that do not fit the model.
        InputError: An input that is no tensor, or not what `--input` says.
    """
    parameters = _parameters(model)
    for name, count in Counter(spec.port.name for spec in specs).items():
        if count > 1:
            raise UsageError(f"--input names '{name}' {count} times")
    if example is None:
        if not specs:
            raise UsageError(
                "the model's inputs are not known",
                hint="--val-data TARGET, or --input 'input:float32[batch,3,32,32]'",
            )
        names = [spec.port.name for spec in specs]
        named = len(names) > 1 and set(names) <= set(parameters)
        return Interface(tuple(s.port for s in specs), tuple(names) if named else None, output)
    keywords = tuple(example.inputs) if isinstance(example.inputs, dict) else None
    values = list(example.inputs.values() if isinstance(example.inputs, dict) else example.inputs)
    if keywords is not None:
        names = list(keywords)
    elif len(values) == 1:
        names = ["input"]
    else:
        names = [p for p, _ in zip(parameters, values, strict=False)]
        names += [f"input_{n}" for n in range(len(names), len(values))]
    if specs and len(specs) != len(values):
        raise UsageError(
            f"{len(specs)} of --input, and the data have {len(values)} inputs: {', '.join(names)}"
        )
    ports = []
    ordered = _in_order(specs, keywords)
    for n, (name, value) in enumerate(zip(names, values, strict=True)):
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"input '{name}' is a {type(value).__name__}; an ONNX graph takes tensors",
                hint="leave it out of the batch, or give the model a default for it",
            )
        dtype = str(value.dtype).removeprefix("torch.")
        if ordered:
            port = ordered[n].port
            _check_fits(port, value, dtype)
        else:
            per_sample = value.ndim > 0 and len(value) == example.size
            rest = tuple(value.shape[1:]) if per_sample else tuple(value.shape)
            port = Port(name, dtype, ("batch", *rest) if per_sample else rest)
        ports.append(port)
    return Interface(tuple(ports), keywords, output)


def _in_order(specs: Sequence[Spec], keywords: tuple[str, ...] | None) -> Sequence[Spec]:
    """Specs in the order of the data's inputs."""
    if not specs or keywords is None:
        return specs
    by_name = {spec.port.name: spec for spec in specs}
    if set(by_name) != set(keywords):
        raise UsageError(
            f"--input names {', '.join(by_name)}, and the data's inputs are {', '.join(keywords)}"
        )
    return [by_name[name] for name in keywords]


def _check_fits(port: Port, value: torch.Tensor, dtype: str) -> None:
    shape = tuple(value.shape)
    fits = len(shape) == len(port.dims) and all(
        isinstance(want, str) or want == got for want, got in zip(port.dims, shape, strict=True)
    )
    if dtype != port.dtype or not fits:
        raise InputError(
            f"--input {port}: the data have {dtype}{list(shape)}",
            hint="sizes as the data have them, open ones by a word; or leave --input out",
        )


def _parameters(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(model.forward)
    return [name for name, p in signature.parameters.items() if p.kind in kinds]


def generated(
    model: nn.Module, interface: Interface, specs: Sequence[Spec], samples: int, *, seed: int = 0
) -> Batch:
    """A batch of random inputs: normal numbers, and indices that every embedding has.

    Args:
        model: Its embeddings bound whole numbers.
        interface: What it is called with.
        specs: Sizes of open dimensions.
        samples: Size of the dimension called `batch`, or of the first open one.
        seed: Of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    for spec in specs:
        sizes |= spec.sizes
    words = [d for port in interface.ports for d in port.dims if isinstance(d, str)]
    if words:
        sizes["batch" if "batch" in words else words[0]] = samples
    highest = min(
        (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2
    )
    sizes_of_tables = sorted(
        {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}, reverse=True
    )
    values: list[Any] = []
    for port in interface.ports:
        shape = [sizes.get(d, _OPEN_SIZE) if isinstance(d, str) else d for d in port.dims]
        dtype = getattr(torch, port.dtype)
        if dtype.is_floating_point:
            values.append(torch.randn(shape, generator=generator).to(dtype))
        elif dtype == torch.bool:
            mask = torch.rand(shape, generator=generator) < 0.5
            if mask.ndim > 1 and mask.shape[-1] > 1:  # no row that masks all or nothing
                mask[..., 0], mask[..., -1] = True, False
            values.append(mask)
        elif dtype == torch.uint8:
            values.append(torch.randint(0, 256, shape, generator=generator, dtype=dtype))
        else:
            values.append(torch.randint(0, highest, shape, generator=generator, dtype=dtype))
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    for place, port in enumerate(interface.ports):  # elsewhere a wrong index ends the process
        if not on_cpu or port.dtype not in ("int64", "int32"):
            continue
        own, shape = values[place], values[place].shape
        for bound in sizes_of_tables:
            drawn = torch.randint(0, bound, shape, generator=generator, dtype=own.dtype)
            values[place] = drawn
            if _runs(model, _batch_of(values, interface, samples)):
                break
            values[place] = own
    return _batch_of(values, interface, samples)


def _batch_of(values: Sequence[Any], interface: Interface, samples: int) -> Batch:
    if interface.keywords is not None:
        return Batch(dict(zip(interface.keywords, values, strict=True)), None, samples)
    return Batch(tuple(values), None, samples)


def _runs(model: nn.Module, batch: Batch) -> bool:
    try:
        with torch.inference_mode():
            forward(model, batch)
    except InputError:
        return False
    return True


def example_of(batch: Batch, interface: Interface) -> list[torch.Tensor]:
    """Tensors to export with, one a port."""
    few = batch.sized(_EXAMPLE)
    if isinstance(few.inputs, dict):
        assert interface.keywords is not None
        return [few.inputs[name] for name in interface.keywords]
    return list(few.inputs)


def inputs_of(batch: Batch, interface: Interface) -> dict[str, torch.Tensor]:
    """A batch as the file takes it, by the names of its inputs."""
    if isinstance(batch.inputs, dict):
        keys = interface.keywords or [port.name for port in interface.ports]
        values = [batch.inputs[key] for key in keys]
    else:
        values = list(batch.inputs)
    return {port.name: value for port, value in zip(interface.ports, values, strict=True)}
