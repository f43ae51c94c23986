"""The serving example of docs/deploying.md, run as it stands on a file that `export` made."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit.cli.main import run

ROOT = Path(__file__).parents[2]
MODEL = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 4))
"""


def test_the_serving_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/deploying.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- run in tests: serving -->\n```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    code = match[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    Path("net.py").write_text(MODEL)
    Path("names.txt").write_text("cat\ndog\nhorse\nship\n")
    Path("ckpts").mkdir()
    torch.manual_seed(0)
    models = []
    for k in range(3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))
        torch.save({"state_dict": model.state_dict(), "epoch": k}, f"ckpts/model_{k}.pt")
        models.append(model.eval())
    argv = ["export", "ckpts", "--ensemble", "-o", "model.onnx", "--model", "net.py:net"]
    argv += ["--input", "input:float32[batch,3,8,8]", "--class-names", "names.txt"]
    assert run(argv) == 0
    names: dict[str, object] = {}
    exec(code, names)  # our own documentation
    images = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    with torch.inference_mode():
        mean = sum(torch.softmax(m(torch.from_numpy(images)), 1) for m in models)
    assert isinstance(mean, torch.Tensor)
    expected = [["cat", "dog", "horse", "ship"][k] for k in mean.argmax(1).tolist()]
    assert names["classify"](images) == expected  # type: ignore[operator]
