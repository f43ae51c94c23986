"""Outputs opened by the real tools: `from_pretrained`, `load_from_checkpoint`, offline and small."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemblekit import average

from .test_real_tools import State, copied, mean, move

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # the tools' own, about themselves
]


# ---------------------------------------------------------------------------------- transformers


def bert(transformers: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config), transformers.BertModel


def gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=50,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config), transformers.GPT2Model


def t5(transformers: Any) -> Any:
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), transformers.T5EncoderModel


MAKERS: list[Callable[[Any], Any]] = [bert, gpt2, t5]


def written(transformers: Any, make: Callable[[Any], Any], run: Path, *, safe: bool) -> Any:
    """A run of three checkpoints with a tokenizer; the model, its body's class, the weights."""
    torch.manual_seed(0)
    model, body = make(transformers)
    members = []
    for step in (90, 200, 1000):
        members.append(move(model, step))
        folder = run / f"checkpoint-{step}"
        model.save_pretrained(folder)
        if not safe:  # as older versions wrote it, tied tensors under each key
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", f"{step}"])
        )
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return model, body, members


def logits(model: Any) -> Tensor:
    ids = torch.arange(12).reshape(2, 6)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, **more).logits
    return found


def from_pretrained(kind: Any, folder: Path, **options: Any) -> Any:
    """The model, after a look at what the loader says was missing or too much."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("size", [10_000, 10**9], ids=["sharded", "whole"])
@pytest.mark.parametrize("make", MAKERS)
def test_from_pretrained(
    make: Callable[[Any], Any], size: int, tmp_path: Path, *, safe: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    model, _, members = written(transformers, make, tmp_path / "run", safe=safe)
    out = tmp_path / "out"
    average(tmp_path / "run", out, shard_bytes=size)
    assert (out / "model.safetensors.index.json").exists() == (size == 10_000)
    loaded = from_pretrained(type(model), out)
    expected = mean(members)
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    model.load_state_dict(expected)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    newest = tmp_path / "run/checkpoint-1000"
    assert (out / "vocab.txt").read_text() == (newest / "vocab.txt").read_text()
    assert (out / "config.json").read_bytes() == (newest / "config.json").read_bytes()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("make", MAKERS)
def test_the_body_alone(make: Callable[[Any], Any], tmp_path: Path, *, safe: bool) -> None:
    """Of tied tensors that one is kept which the body knows, as `save_pretrained` does."""
    transformers = pytest.importorskip("transformers")
    _, body, members = written(transformers, make, tmp_path / "run", safe=safe)
    average(tmp_path / "run", tmp_path / "out")
    found, info = body.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "pooler" not in key]
    table = found.get_input_embeddings().weight
    assert any(torch.equal(table, value) for value in mean(members).values())


@pytest.mark.parametrize("make", MAKERS)
def test_another_type(make: Callable[[Any], Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, _, members = written(transformers, make, tmp_path / "run", safe=True)
    average(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    loaded = from_pretrained(type(model), tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    exact = {k: torch.stack([m[k].double() for m in members]).mean(0) for k in members[0]}
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, exact[key].bfloat16()), key


def test_averages_of_averages(tmp_path: Path) -> None:
    """An output is a checkpoint like those it is made of."""
    transformers = pytest.importorskip("transformers")
    model, _, members = written(transformers, bert, tmp_path / "run", safe=True)
    for step in (90, 200):
        average(tmp_path / f"run/checkpoint-{step}", tmp_path / f"soup-{step}")
    average([tmp_path / "soup-90", tmp_path / "soup-200"], tmp_path / "out")
    loaded = from_pretrained(type(model), tmp_path / "out").state_dict()
    expected = mean(members[:2])
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


# ------------------------------------------------------------------------------------- Lightning


def module_class(lightning: Any) -> Any:
    """A module that is made out of its hyper-parameters."""

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, width: int, rates: dict[str, float], name: str = "x") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.body = nn.Linear(4, width)
            self.head = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.body(x).relu())
            return found

        def training_step(self, batch: Any, _: int) -> Tensor:
            inputs, labels = batch
            return nn.functional.cross_entropy(self(inputs), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.hparams["rates"]["lr"])

    Module.__qualname__ = "Module"
    return Module


def trained(lightning: Any, folder: Path, module: Any) -> list[State]:
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.utils.data.TensorDataset(inputs, torch.arange(24) % 3)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[saver], logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
    paths = [folder / f"epoch={n}.ckpt" for n in range(3)]
    return [copied(torch.load(p, weights_only=False)["state_dict"]) for p in paths]


def test_load_from_checkpoint(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    kind = module_class(lightning)
    members = trained(lightning, tmp_path / "run", kind(8, {"lr": 0.125}, name="net"))
    result = average(tmp_path / "run", tmp_path / "out.ckpt")
    assert result.warnings == ()
    loaded = kind.load_from_checkpoint(tmp_path / "out.ckpt", weights_only=True)
    assert dict(loaded.hparams) == {"width": 8, "rates": {"lr": 0.125}, "name": "net"}
    expected = mean(members)
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    other = kind.load_from_checkpoint(tmp_path / "out.ckpt", name="mine", weights_only=True)
    assert other.hparams["name"] == "mine"


def test_a_namespace_of_hyperparameters(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, args: argparse.Namespace) -> None:
            super().__init__()
            self.save_hyperparameters(args)
            self.layer = nn.Linear(4, args.width)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trained(lightning, tmp_path / "run", Module(argparse.Namespace(width=3, path=Path("x"))))
    average(tmp_path / "run", tmp_path / "out.ckpt")
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert found["hyper_parameters"]["width"] == 3


def test_odd_hyperparameters_are_named(tmp_path: Path) -> None:
    """A class of a module that is gone when the average is opened."""
    lightning = pytest.importorskip("lightning")
    module = types.ModuleType("their_code")
    exec("class Choice:\n    pass\n", module.__dict__)
    sys.modules["their_code"] = module
    try:
        made = module_class(lightning)(8, {"lr": 0.1, "choice": module.Choice()})
        trained(lightning, tmp_path / "run", made)
    finally:
        del sys.modules["their_code"]
    [warning] = average(tmp_path / "run", tmp_path / "out.ckpt").warnings
    assert "hyper_parameters.rates.choice" in warning
    kind = module_class(lightning)
    loaded = kind.load_from_checkpoint(tmp_path / "out.ckpt", weights_only=True)
    assert loaded.hparams["rates"] == {"lr": 0.1}


def test_hyperparameters_that_are_not_plain_at_all(tmp_path: Path) -> None:
    """The module is still opened, by whoever gives what is missing."""
    lightning = pytest.importorskip("lightning")
    kind = module_class(lightning)
    trained(lightning, tmp_path / "run", kind(8, {"lr": 0.1}))
    for path in (tmp_path / "run").glob("*.ckpt"):
        value = torch.load(path, weights_only=False)
        value["hyper_parameters"] = argparse.Namespace(width=8)
        torch.save(value, path)
    result = average(tmp_path / "run", tmp_path / "out.ckpt")
    assert any("hyper_parameters" in warning for warning in result.warnings)
    loaded = kind.load_from_checkpoint(
        tmp_path / "out.ckpt", width=8, rates={"lr": 0.1}, weights_only=True
    )
    assert loaded.body.weight.shape == (8, 4)
