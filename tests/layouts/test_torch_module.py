"""Whole pickled modules, of classes that do not exist here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ensemblekit.containers import TensorSpec

from ..checkpoints import assert_same_tensors, reading_of, save

WRITER = """
import sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "vanishing.py").write_text('''
import torch
from torch import nn
class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, bias=False)
        self.bn = nn.BatchNorm2d(n)
        self.scale = nn.Parameter(torch.ones(1))
        self.activation = torch.relu
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(3), Block(3)])
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        self.heads["b"].weight = self.heads["a"].weight
        self.extra = nn.ParameterList([torch.ones(2), torch.zeros(3)])
        self.lstm = nn.LSTM(3, 4)
        self.register_buffer("table", torch.arange(4))
        self.register_buffer("cache", torch.ones(5), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("none", None)
        self.shared = self.blocks[0]
        self.config = {"depth": 2}
''')
sys.path.insert(0, str(folder))
from vanishing import Net
torch.manual_seed(0)
net = Net()
torch.save(net.state_dict(), folder / "state.pt")
for protocol in (2, 5):
    options = {"pickle_protocol": protocol}
    torch.save(net, folder / f"module-{protocol}.pt", **options)
    torch.save(torch.nn.DataParallel(net), folder / f"parallel-{protocol}.pt", **options)
net.half()
for protocol in (2, 5):
    value = {"model": net, "epoch": 3}
    torch.save(value, folder / f"inside-{protocol}.pt", pickle_protocol=protocol)
torch.save(net.state_dict(), folder / "half.pt")
(folder / "vanishing.py").unlink()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("modules")
    subprocess.run([sys.executable, "-c", WRITER, str(made)], check=True)
    return made


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "name, expected", [("module", "state"), ("parallel", "state"), ("inside", "half")]
)
def test_class_that_is_gone(folder: Path, name: str, expected: str, protocol: int) -> None:
    path = folder / f"{name}-{protocol}.pt"
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    weights = reading_of(path).weights["model"]
    tensors = torch.load(folder / f"{expected}.pt")
    assert set(weights.tensors) == set(tensors)
    assert_same_tensors({key: weights.tensors[key] for key in tensors}, tensors)
    assert ("heads.a.weight", "heads.b.weight") in weights.ties
    assert "vanishing" not in sys.modules


def test_class_is_the_hint(folder: Path) -> None:
    assert reading_of(folder / "module-2.pt").facts.model_hint == "vanishing.Net"


def test_order_is_that_of_state_dict(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2)))
    weights = reading_of(save(net, tmp_path / "net.pt")).weights["model"]
    assert_same_tensors(weights.tensors, net.state_dict())


def test_averaged_model(tmp_path: Path) -> None:
    average = AveragedModel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    weights = reading_of(save(average, tmp_path / "net.pt")).weights["model"]
    assert_same_tensors(weights.tensors, average.module.state_dict())


def test_very_deep_module(tmp_path: Path) -> None:
    net: nn.Module = nn.Linear(1, 1)
    for _ in range(60):
        net = nn.Sequential(net)
    weights = reading_of(save(net, tmp_path / "net.pt")).weights["model"]
    assert_same_tensors(weights.tensors, net.state_dict())


def test_module_on_the_meta_device_is_described(tmp_path: Path) -> None:
    net = nn.Linear(3, 2, device="meta")
    weights = reading_of(save(net, tmp_path / "net.pt")).weights["model"]
    assert not any(isinstance(spec, TensorSpec) for spec in weights.tensors.values())
