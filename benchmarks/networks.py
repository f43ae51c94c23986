"""Networks that the benchmarks measure, in plain torch."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, section 4.2, option A)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        missing = out.shape[1] - short.shape[1]
        return torch.relu(out + nn.functional.pad(short, (0, 0, 0, 0, 0, missing)))


def resnet20() -> nn.Sequential:
    """19 convolutions, 19 BatchNorm layers, one linear layer."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for number in range(3):
            layers.append(Block(inside, width, stride if number == 0 else 1))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Residual(nn.Module):
    """A body and a shortcut, as in ResNet-18 and larger ones (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(*normed(inputs, outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        return torch.relu(self.body(x) + self.short(x))


def normed(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """A convolution and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def basic(inputs: int, outputs: int, stride: int) -> Residual:
    """The block of ResNet-18."""
    body = [
        *normed(inputs, outputs, 3, stride),
        nn.ReLU(inplace=True),
        *normed(outputs, outputs, 3),
    ]
    return Residual(inputs, outputs, stride, nn.Sequential(*body))


def bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """The block of ResNet-50."""
    width = outputs // 4
    body = [*normed(inputs, width, 1), nn.ReLU(inplace=True)]
    body += [*normed(width, width, 3, stride), nn.ReLU(inplace=True), *normed(width, outputs, 1)]
    return Residual(inputs, outputs, stride, nn.Sequential(*body))


def resnet(
    block: Callable[[int, int, int], Residual], blocks: Sequence[int], width: int
) -> nn.Sequential:
    """A ResNet for large images whose first stage has `width` channels."""
    layers = [*normed(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(blocks):
        for place in range(count):
            layers.append(block(inputs, width << stage, 2 if stage and not place else 1))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def resnet18() -> nn.Sequential:
    """ResNet-18's shape: 11.7 million parameters."""
    return resnet(basic, (2, 2, 2, 2), 64)


def resnet50() -> nn.Sequential:
    """ResNet-50's shape: 25.6 million parameters, 224 x 224 images."""
    return resnet(bottleneck, (3, 4, 6, 3), 256)


class Encoder(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        n, t, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-Ti's width on 32 x 32 images in patches of 4: 65 tokens."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the class token."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])
