"""Owns small networks of the kinds people train, and members of them that act like snapshots.

Each is written as its users write it, below 0.3 million parameters, 10 classes (the language model:
50 tokens). `members` gives neighbours of one another, with statistics and heads that are not
trivial: a network whose BatchNorm does nothing, or that always says the same, tests no exporter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 10
VOCABULARY = 50
Inputs = tuple[Any, ...] | dict[str, Any]

_SPREAD = 3.0  # standard deviation of the logits of one class
_LEAST = 5  # classes that every member predicts on 64 inputs
_CALIBRATION = 10_000  # seed of inputs that no test is likely to use


@dataclass(frozen=True)
class Architecture:
    """A kind of network, and what it takes.

    Attributes:
        name: In `ARCHITECTURES`.
        build: A fresh module.
        inputs: Of (batch, seed): positional tensors, or a dict of keywords.
        task: As `ensemblekit.tasks` calls it.
        head_prefixes: Of the state_dict keys of the last blocks and the head; everything else is
            the trunk. The last one names the layer whose weight and bias set the logits' scale.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    task: str
    head_prefixes: tuple[str, ...]


# ------------------------------------------------------------------------------ residual nets


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class PreActBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        if stride != 1 or inputs != width:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


def stage(block: type[nn.Module], inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(block(inputs, width, stride), block(width, width))


class ResNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(BasicBlock, width, width, 1)
        self.layer2 = stage(BasicBlock, width, 2 * width, 2)
        self.layer3 = stage(BasicBlock, 2 * width, 4 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)


class PreActResNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.layer1 = stage(PreActBlock, width, width, 1)
        self.layer2 = stage(PreActBlock, width, 2 * width, 2)
        self.layer3 = stage(PreActBlock, 2 * width, 4 * width, 2)
        self.bn = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x))
        x = F.avg_pool2d(x, 8)
        return self.fc(x.view(x.size(0), -1))


# ------------------------------------------------------------------ other convolutional nets


class VGG(nn.Module):
    """No BatchNorm; convolutions with biases, a classifier of three layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (16, 16, "M", 32, 32, "M", 48, "M"):
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 4, 96),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(96, 64),
            nn.ReLU(True),
            nn.Dropout(0.5),
            nn.Linear(64, CLASSES),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = conv3x3(2 * growth, growth)
        self.drop_rate = 0.1

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(list(features), 1)
        x = self.conv1(F.relu(self.norm1(x)))
        x = self.conv2(F.relu(self.norm2(x)))
        return F.dropout(x, p=self.drop_rate, training=self.training)


class DenseBlock(nn.ModuleDict):
    def __init__(self, inputs: int, growth: int, count: int = 3) -> None:
        super().__init__()
        for n in range(count):
            self[f"denselayer{n + 1}"] = DenseLayer(inputs + n * growth, growth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = conv3x3(3, 2 * growth)
        self.block1 = DenseBlock(2 * growth, growth)
        self.transition = nn.Sequential(
            nn.BatchNorm2d(5 * growth),
            nn.ReLU(inplace=True),
            nn.Conv2d(5 * growth, 2 * growth, 1, bias=False),
            nn.AvgPool2d(2, stride=2),
        )
        self.block2 = DenseBlock(2 * growth, growth)
        self.norm = nn.BatchNorm2d(5 * growth)
        self.classifier = nn.Linear(5 * growth, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = self.block2(self.transition(self.block1(x)))
        x = F.relu(self.norm(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.mean((2, 3), keepdim=True)
        scale = F.hardsigmoid(self.fc2(F.relu(self.fc1(scale))))
        return x * scale


class InvertedResidual(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, stride: int, activation: type[nn.Module], *, squeeze: bool
    ) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.use_residual = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden, eps=1e-3),
            activation(),
            nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, eps=1e-3),
            activation(),
            SqueezeExcite(hidden, hidden // 4) if squeeze else nn.Identity(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_residual:
            return x + self.block(x)
        return self.block(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(conv3x3(3, 12, 2), nn.BatchNorm2d(12, eps=1e-3), nn.Hardswish()),
            InvertedResidual(12, 12, 1, nn.ReLU6, squeeze=False),
            InvertedResidual(12, 20, 2, nn.ReLU6, squeeze=True),
            InvertedResidual(20, 20, 1, nn.Hardswish, squeeze=True),
            InvertedResidual(20, 28, 2, nn.Hardswish, squeeze=True),
            nn.Sequential(nn.Conv2d(28, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Hardswish()),
        )
        self.classifier = nn.Sequential(
            nn.Linear(64, 64), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(64, CLASSES)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.classifier(x.mean([2, 3]))


class DropPath(nn.Module):
    """Stochastic depth: whole samples skip a block, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(kept) / kept


class LayerNorm2d(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's own name
        x = input.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = (self.gamma * x).permute(0, 3, 1, 2)
        return shortcut + self.drop_path(x)


class ConvNeXt(nn.Module):
    def __init__(self, dims: tuple[int, int] = (24, 48)) -> None:
        super().__init__()
        first, second = dims
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, stride=4), LayerNorm2d(first, eps=1e-6))
        self.stage1 = nn.Sequential(*(ConvNeXtBlock(first, 0.1) for _ in range(2)))
        self.downsample = nn.Sequential(
            LayerNorm2d(first, eps=1e-6), nn.Conv2d(first, second, 2, stride=2)
        )
        self.stage2 = nn.Sequential(*(ConvNeXtBlock(second, 0.2) for _ in range(2)))
        self.norm = nn.LayerNorm(second, eps=1e-6)
        self.head = nn.Linear(second, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage1(self.stem(x))
        x = self.stage2(self.downsample(x))
        return self.head(self.norm(x.mean([-2, -1])))


# --------------------------------------------------------------------- attention, recurrence


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, dim: int = 48, depth: int = 3, heads: int = 4, patch: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (32 // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat((cls, x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class CausalSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(dim, 3 * dim)
        self.c_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.size()
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = CausalSelfAttention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The head is the token embedding, so it belongs to the trunk: what is last is `ln_f`."""

    def __init__(self, dim: int = 48, depth: int = 2, heads: int = 4, block_size: int = 24) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, dim)
        self.wpe = nn.Embedding(block_size, dim)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([GPTBlock(dim, heads) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        pos = torch.arange(idx.shape[1], device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class GRUClassifier(nn.Module):
    def __init__(self, dim: int = 24, hidden: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.gru = nn.GRU(dim, hidden, num_layers=2, batch_first=True, dropout=0.2)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(hidden, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        _, h_n = self.gru(self.embedding(tokens))
        return self.fc(self.dropout(h_n[-1]))


# ---------------------------------------------------------------------------- other inputs


class MLP(nn.Module):
    def __init__(self, inputs: int = 20, hidden: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
        )
        self.out = nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.net(x))


class ImageAndTable(nn.Module):
    """Two positional inputs; the image is normalised inside, by constants."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, columns: int = 8) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.48, 0.45, 0.41]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.23, 0.22, 0.24]).view(1, 3, 1, 1))
        self.image_net = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.table_net = nn.Sequential(
            nn.Linear(columns, 32), nn.LayerNorm(32), nn.SiLU(), nn.Linear(32, 32)
        )
        self.head = nn.Sequential(nn.Linear(96 + 32, 48), nn.ReLU(), nn.Linear(48, CLASSES))

    def forward(self, image: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        seen = self.image_net((image - self.mean) / self.std)
        return self.head(torch.cat([seen, torch.tanh(self.table_net(table))], dim=1))


class TextClassifier(nn.Module):
    """Called with keywords, returns a dict; padding is masked and does not count."""

    position_ids: torch.Tensor

    def __init__(self, dim: int = 32, length: int = 16) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(length, dim)
        self.register_buffer("position_ids", torch.arange(length).expand((1, -1)).clone())
        layer = nn.TransformerEncoderLayer(
            dim, nhead=4, dim_feedforward=64, dropout=0.1, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.pooler = nn.Linear(dim, dim)
        self.classifier = nn.Linear(dim, CLASSES)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        positions = self.position_ids[:, : input_ids.shape[1]]
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        hidden = self.encoder(hidden, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        pooled = torch.tanh(self.pooler(pooled))
        return {"features": pooled, "logits": self.classifier(pooled)}


# ---------------------------------------------------------------------------------- inputs


def _pictures(batch: int, seed: int) -> torch.Tensor:
    """Smooth pictures (N, 3, 32, 32) of different colour, contrast, stripes and grain."""
    own = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, 4, 4, generator=own)
    smooth = F.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    contrast, grain, stripes = torch.rand(3, batch, 1, 1, 1, generator=own)
    pitch_N2 = 2 * torch.randn(batch, 2, generator=own)
    y, x = torch.meshgrid(torch.linspace(-3, 3, 32), torch.linspace(-3, 3, 32), indexing="ij")
    waves = torch.sin(pitch_N2[:, :1, None] * y + pitch_N2[:, 1:, None] * x)[:, None]
    tint = 0.7 * torch.randn(batch, 3, 1, 1, generator=own)
    noise = torch.randn(batch, 3, 32, 32, generator=own)
    return (0.3 + contrast) * smooth + tint + 1.5 * stripes * waves + 0.7 * grain * noise


def _pixels(batch: int, seed: int) -> torch.Tensor:
    """Pictures as a decoder gives them: 0 to 1."""
    return torch.sigmoid(_pictures(batch, seed))


def _points(batch: int, seed: int, columns: int = 20) -> torch.Tensor:
    """Rows (N, columns) around ten centres."""
    own = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(10, columns, generator=torch.Generator().manual_seed(7))
    near = torch.randint(0, 10, (batch,), generator=own)
    return centres[near] + torch.randn(batch, columns, generator=own)


def _texts(batch: int, seed: int, length: int = 12) -> torch.Tensor:
    """Token ids (N, length), each a function of the one before, with exceptions."""
    own = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, 1), generator=own)
    step = torch.randint(1, 9, (batch, 1), generator=own)
    for _ in range(length - 1):
        wild = torch.randint(0, VOCABULARY, (batch, 1), generator=own)
        odd = torch.rand(batch, 1, generator=own) < 0.3
        follows = torch.where(odd, wild, ids[:, -1:] + step) % (VOCABULARY - 1) + 1
        ids = torch.cat([ids, follows], dim=1)
    return ids


def _padded_texts(batch: int, seed: int) -> dict[str, torch.Tensor]:
    ids = _texts(batch, seed)
    own = torch.Generator().manual_seed(seed + 1)
    sizes = torch.randint(3, ids.shape[1] + 1, (batch, 1), generator=own)
    mask = (torch.arange(ids.shape[1]) < sizes).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _picture_inputs(batch: int, seed: int) -> Inputs:
    return (_pictures(batch, seed),)


def _text_inputs(batch: int, seed: int) -> Inputs:
    return (_texts(batch, seed),)


def _point_inputs(batch: int, seed: int) -> Inputs:
    return (_points(batch, seed),)


def _picture_and_point_inputs(batch: int, seed: int) -> Inputs:
    return _pixels(batch, seed), _points(batch, seed + 1, columns=8)


_CLASSES = "classification"
ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(name, build, inputs, task, head_prefixes)
    for name, build, inputs, task, head_prefixes in (
        ("resnet", ResNet, _picture_inputs, _CLASSES, ("layer3.1.", "fc.")),
        ("preact_resnet", PreActResNet, _picture_inputs, _CLASSES, ("layer3.1.", "bn.", "fc.")),
        ("vgg", VGG, _picture_inputs, _CLASSES, ("classifier.3.", "classifier.6.")),
        ("densenet", DenseNet, _picture_inputs, _CLASSES, ("block2.", "norm.", "classifier.")),
        ("mobilenet", MobileNet, _picture_inputs, _CLASSES, ("features.5.", "classifier.0.", "classifier.3.")),
        ("convnext", ConvNeXt, _picture_inputs, _CLASSES, ("stage2.1.", "norm.", "head.")),
        ("vit", VisionTransformer, _picture_inputs, _CLASSES, ("blocks.2.", "norm.", "head.")),
        ("gpt", GPT, _text_inputs, "tokens", ("blocks.1.", "ln_f.")),
        ("gru", GRUClassifier, _text_inputs, _CLASSES, ("fc.",)),
        ("mlp", MLP, _point_inputs, _CLASSES, ("out.",)),
        ("multi_input", ImageAndTable, _picture_and_point_inputs, _CLASSES, ("head.0.", "head.2.")),
        ("dict_input", TextClassifier, _padded_texts, _CLASSES, ("encoder.layers.1.", "pooler.", "classifier.")),
    )
}  # fmt: skip


# --------------------------------------------------------------------------------- members


def logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What the model says: (N, C), or (N, T, V) of a language model."""
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    made: torch.Tensor = found["logits"] if isinstance(found, Mapping) else found
    return made


def members(
    architecture: Architecture, count: int, *, seed: int = 0, frozen: bool = False
) -> list[nn.Module]:
    """Modules in eval mode, near one another as the snapshots of a run are.

    Args:
        architecture: One of `ARCHITECTURES`.
        count: How many.
        seed: Of all their weights.
        frozen: The trunk is the same in all of them, bit by bit.

    Raises:
        AssertionError: One predicts too few classes to test anything with.
    """
    base = architecture.build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _randomise(base, generator)
        _calibrate(base, architecture.inputs(256, _CALIBRATION), generator)
        made = [copy.deepcopy(base) for _ in range(count)]  # what is tied stays tied
        for model in made:
            _move(model, architecture.head_prefixes if frozen else ("",), generator)
            _settle(model, architecture)
            _check(model, architecture)
    return made


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter anew; nothing stays zero or one."""
    for module in model.modules():
        norm = isinstance(module, _BatchNorm | nn.LayerNorm)
        for name, own in module.named_parameters(recurse=False):
            if name == "gamma" or (norm and name == "weight"):
                own.uniform_(0.5, 1.5, generator=generator)
            elif own.ndim == 1:
                own.normal_(0, 0.2 if norm else 0.1, generator=generator)
            elif isinstance(module, nn.Embedding) or name in ("cls_token", "pos_embed"):
                own.normal_(0, 0.7, generator=generator)
            else:
                gain = 2.0 if isinstance(module, nn.Conv2d | nn.Linear) else 1.0
                own.normal_(0, (gain / own[0].numel()) ** 0.5, generator=generator)


def _calibrate(model: nn.Module, inputs: Inputs, generator: torch.Generator) -> None:
    """BatchNorm statistics of the inputs, and then a little beside."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    logits(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        mean += 0.1 * variance.sqrt() * torch.randn(mean.shape, generator=generator)
        variance *= 0.6 + 0.8 * torch.rand(variance.shape, generator=generator)


def _move(model: nn.Module, prefixes: tuple[str, ...], generator: torch.Generator) -> None:
    """Add noise of 5 to 10 per cent to parameters and statistics below the prefixes."""

    def noise(like: torch.Tensor) -> torch.Tensor:
        rate = 0.05 + 0.05 * torch.rand((), generator=generator)
        return rate * torch.randn(like.shape, generator=generator)

    for name, own in model.named_parameters():  # of what is tied, under its first name
        if name.startswith(prefixes):
            own.add_(own.square().mean().sqrt() * noise(own))
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and f"{name}.".startswith(prefixes):
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            mean.add_(variance.sqrt() * noise(mean))
            variance.mul_(noise(variance).exp())


def _settle(model: nn.Module, architecture: Architecture) -> None:
    """Give the logits a spread of a few units; a linear head: around zero, in every class."""
    said = logits(model, architecture.inputs(256, _CALIBRATION)).flatten(0, -2)
    mean_C, spread_C = said.mean(0), said.std(0)
    last = model.get_submodule(architecture.head_prefixes[-1].removesuffix("."))
    weight, bias = last.get_parameter("weight"), last.get_parameter("bias")
    if isinstance(last, nn.Linear):
        bias.sub_(mean_C).mul_(_SPREAD / spread_C)
        weight.mul_(_SPREAD / spread_C[:, None])
    else:
        bias.mul_(_SPREAD / spread_C.mean())
        weight.mul_(_SPREAD / spread_C.mean())


def _check(model: nn.Module, architecture: Architecture) -> None:
    for seed in range(2):
        said = logits(model, architecture.inputs(64, seed))
        found = len(set(said.argmax(-1).flatten().tolist()))
        assert bool(said.isfinite().all()), f"{architecture.name}: logits that are not finite"
        assert found >= _LEAST, f"{architecture.name} predicts {found} classes of 64 inputs"
