"""Models of real libraries, exported and verified: skipped where the library is not installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ensemblekit import ModelOptions
from ensemblekit.commands.export import ExportOptions, export

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # the tools' own, about themselves
]

TRANSFORMERS = """
import torch, transformers
from torch import nn

def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, num_labels=8))

def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32, use_cache=False))

def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=8))

def resnet():
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=8))

def text(split):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (96, 12), generator=g)
    mask = (torch.arange(12) < torch.randint(4, 13, (96, 1), generator=g)).long()
    labels = torch.randint(0, 8, (96,), generator=g)
    return [{"input_ids": ids[n:n+32], "attention_mask": mask[n:n+32], "labels": labels[n:n+32]}
            for n in range(0, 96, 32)]

def tokens(split):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (96, 12), generator=g)
    return [{"input_ids": ids[n:n+32], "labels": ids[n:n+32]} for n in range(0, 96, 32)]

def images(split):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(96, 3, 32, 32, generator=g), torch.randint(0, 8, (96,), generator=g)
    return [{"pixel_values": x[n:n+32], "labels": y[n:n+32]} for n in range(0, 96, 32)]
"""

TIMM = """
import timm, torch

def make(name):
    return timm.create_model(name, pretrained=False, num_classes=8)

def images(split):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(48, 3, 64, 64, generator=g), torch.randint(0, 8, (48,), generator=g))
"""


def snapshots(model: nn.Module, folder: Path) -> None:
    """Three neighbours, with every parameter and statistic away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)

    def shake(target: nn.Module, size: float) -> None:
        with torch.no_grad():
            for tensor in (*target.parameters(), *target.buffers()):
                if tensor.is_floating_point():
                    noise = torch.rand(tensor.shape, generator=generator)
                    tensor.mul_(1 + size * noise).add_(size * 0.1 * noise)

    shake(model, 0.5)
    folder.mkdir()
    for k in range(3):
        other = copy.deepcopy(model)
        shake(other, 0.05)
        torch.save({"state_dict": other.state_dict(), "epoch": k}, folder / f"model_{k}.pt")


def check(tmp_path: Path, code: str, make: str, data: str, **arguments: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(code)
    names: dict[str, object] = {}
    exec(code, names)
    build = names[make]
    assert callable(build)
    torch.manual_seed(0)
    snapshots(build(**arguments), tmp_path / "ckpts")
    model = ModelOptions(
        model=f"{script}:{make}", model_args=arguments, val_data=f"{script}:{data}"
    )
    for ensemble in (False, True):
        options = ExportOptions(ensemble=ensemble, bn="average")
        found = export(
            tmp_path / "ckpts", tmp_path / "m.onnx", model=model, options=options, force=True
        )
        assert found.verification["passed"]
        assert found.verification["decision_flips"] == 0
        assert found.verification["max_rel_diff"] < 1e-4


@pytest.mark.parametrize(
    "name, data",
    [("bert", "text"), ("gpt2", "tokens"), ("vit", "images"), ("resnet", "images")],
)
def test_transformers(name: str, data: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    check(tmp_path, TRANSFORMERS, name, data)


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"]
)
def test_timm(name: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    code = TIMM.replace("num_classes=8)", "num_classes=8, img_size=64)") if "vit" in name else TIMM
    check(tmp_path, code, "make", "images", name=name)
