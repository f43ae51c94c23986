"""With the real tools: they write, ensemblekit averages, they load the average again.

Every test skips where its tool is not installed; `pip install` them beside the package, then
`pytest -m integration`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemblekit import Selection, average, discover

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore"),  # the tools' own, about themselves
]

State = dict[str, Tensor]


def net() -> nn.Module:
    """With all that matters: a convolution, BatchNorm with its counter, a bias."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 3


def move(module: nn.Module, seed: int) -> State:
    """A step away from where the module was; returns a copy of its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return copied(module.state_dict())


def copied(state: Any) -> State:
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def mean(members: Sequence[State]) -> State:
    """Uniform mean; counters as in the newest."""
    newest = members[-1]
    return {
        key: torch.stack([m[key].double() for m in members]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for key, tensor in newest.items()
    }


def assert_mean(loaded: Any, members: Sequence[State]) -> None:
    expected = mean(members)
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=1e-6, atol=1e-7)


def state_in(path: Path) -> State:
    return copied(torch.load(path, weights_only=True))


def averaged(run: Path) -> State:
    """The average, by way of a file."""
    load = pytest.importorskip("safetensors.torch").load_file
    average(run, run.with_suffix(".safetensors"))
    return copied(load(run.with_suffix(".safetensors")))


# ---------------------------------------------------------------------------------- transformers


def bert(transformers: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("size", ["10KB", "1GB"], ids=["sharded", "whole"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_transformers(make: Callable[[Any], Any], size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(transformers)
    members = []
    for step in (90, 200, 1000):
        members.append(move(model, step))
        model.save_pretrained(tmp_path / f"run/checkpoint-{step}", max_shard_size=size)
    found = discover(tmp_path / "run")
    assert [s.numbers[0] for s in found.snapshots] == [90, 200, 1000]
    assert {s.format.partition("/")[2] for s in found.snapshots} == {"transformers"}
    out = tmp_path / "out"
    out.mkdir()
    average(tmp_path / "run", out / "model.safetensors")
    shutil.copy(tmp_path / "run/checkpoint-90/config.json", out)
    loaded = type(model).from_pretrained(out)
    assert_mean(loaded.state_dict(), members)


def test_transformers_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    items = [{"input_ids": torch.arange(8) + n, "labels": torch.tensor(n % 2)} for n in range(16)]
    model = bert(transformers)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), num_train_epochs=3, per_device_train_batch_size=4,
        save_strategy="epoch", eval_strategy="epoch", logging_strategy="epoch", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=items, eval_dataset=items
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    found = discover(tmp_path / "run")
    assert [s.facts.step for s in found.snapshots] == [4, 8, 12]
    assert [s.facts.epoch for s in found.snapshots] == [1, 2, 3]
    assert all("eval_loss" in s.facts.metrics for s in found.snapshots)
    assert all(s.facts.lr is not None for s in found.snapshots)
    assert "same weights" in {i.name: i.reason for i in found.skipped}["model.safetensors"]
    out = tmp_path / "out"
    out.mkdir()
    average(tmp_path / "run", out / "model.safetensors")
    shutil.copy(tmp_path / "run/config.json", out)
    folders = [tmp_path / f"run/checkpoint-{step}" for step in (4, 8, 12)]
    members = [copied(type(model).from_pretrained(f).state_dict()) for f in folders]
    assert_mean(type(model).from_pretrained(out).state_dict(), members)


def test_peft(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = bert(transformers)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    members = []
    for step in (90, 200, 1000):
        move(model, step)
        members.append(copied(peft.get_peft_model_state_dict(model)))
        model.save_pretrained(tmp_path / f"run/checkpoint-{step}")
    out = tmp_path / "out"
    out.mkdir()
    result = average(tmp_path / "run", out / "adapter_model.safetensors")
    assert any("LoRA" in text for text in result.warnings)
    shutil.copy(tmp_path / "run/checkpoint-90/adapter_config.json", out)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)
    assert_mean(peft.get_peft_model_state_dict(loaded), members)


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate(safe: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    module = net()
    optimizer = torch.optim.AdamW(module.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    parts = accelerator.prepare(module, optimizer, loader, schedule)
    members = []
    for n in (9, 10, 11):
        members.append(move(parts[0], n))
        folder = tmp_path / f"run/checkpoints/checkpoint_{n}"
        accelerator.save_state(str(folder), safe_serialization=safe)
    name = "model.safetensors" if safe else "pytorch_model.bin"
    assert [s.path.name for s in discover(tmp_path / "run").snapshots] == [name] * 3
    out = tmp_path / "out/model.safetensors"
    out.parent.mkdir()
    average(tmp_path / "run", out)
    fresh = net()
    accelerate.utils.load_checkpoint_in_model(fresh, str(out))
    assert_mean(fresh.state_dict(), members)


# ------------------------------------------------------------------------------------- Lightning


def lightning_module(lightning: Any) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> Tensor:
            inputs, labels = batch
            return nn.functional.cross_entropy(self.net(inputs), labels)

        def validation_step(self, batch: Any, _: int) -> None:
            inputs, labels = batch
            self.log("val_loss", nn.functional.cross_entropy(self.net(inputs), labels))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.125)

    return Module()


def fit(lightning: Any, folder: Path, *callbacks: Any, epochs: int = 3) -> Any:
    module = lightning_module(lightning)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    return module


def load_lightning(lightning: Any, weights: State, template: Path) -> State:
    """Back through Lightning's own loader, in a checkpoint of its own."""
    checkpoint = torch.load(template, weights_only=False)
    path = template.with_name("averaged.ckpt")
    torch.save({**checkpoint, "state_dict": weights}, path)
    module = lightning_module(lightning)
    loaded = type(module).load_from_checkpoint(path, weights_only=False)
    return copied(loaded.state_dict())


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path / "run", monitor="val_loss", save_top_k=-1, save_last=True
    )
    fit(lightning, tmp_path, saver)
    found = discover(tmp_path / "run")
    assert [(s.facts.epoch, s.facts.step) for s in found.snapshots] == [(0, 3), (1, 6), (2, 9)]
    assert [s.facts.lr for s in found.snapshots] == [0.125] * 3
    assert all("val_loss" in s.facts.metrics for s in found.snapshots)
    assert [i.name for i in found.skipped] == ["last.ckpt"]
    paths = [s.path for s in found.snapshots]
    members = [copied(torch.load(p, weights_only=False)["state_dict"]) for p in paths]
    assert_mean(load_lightning(lightning, averaged(tmp_path / "run"), paths[0]), members)


def test_lightning_ema(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    callbacks = lightning.pytorch.callbacks
    averaging = getattr(callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no EMAWeightAveraging")
    saver = callbacks.ModelCheckpoint(tmp_path / "run", save_top_k=-1, filename="{epoch}")
    fit(lightning, tmp_path, saver, averaging(decay=0.9))
    files = [tmp_path / f"run/epoch={n}.ckpt" for n in range(3)]
    saved = [torch.load(f, weights_only=False) for f in files]
    for wanted, key in (("auto", "state_dict"), ("model", "current_model_state")):
        made = average(tmp_path / "run", selection=Selection(weights=wanted)).state
        assert made is not None
        own = {name: torch.from_numpy(array.copy()) for name, array in made.items()}
        assert_mean(own, [copied(s[key]) for s in saved])


def test_lightning_swa(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    callbacks = lightning.pytorch.callbacks
    saver = callbacks.ModelCheckpoint(tmp_path / "run", save_top_k=-1, filename="{epoch}")
    swa = callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    fit(lightning, tmp_path, saver, swa, epochs=4)
    found = discover(tmp_path / "run")
    assert {s.variant for s in found.snapshots} == {"state_dict"}
    assert "average_model_state" in found.snapshots[-1].available


# -------------------------------------------------------------------------------- ignite, skorch


def test_ignite(tmp_path: Path) -> None:
    ignite = pytest.importorskip("ignite.engine")
    handlers = pytest.importorskip("ignite.handlers")
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.125)
    members: list[State] = []
    trainer = ignite.Engine(lambda engine, _: move(module, engine.state.iteration))
    saver = handlers.Checkpoint(
        {"model": module, "optimizer": optimizer, "trainer": trainer},
        handlers.DiskSaver(str(tmp_path / "run"), create_dir=True), n_saved=None,
        global_step_transform=handlers.global_step_from_engine(trainer),
    )  # fmt: skip
    completed = ignite.Events.EPOCH_COMPLETED
    trainer.add_event_handler(completed, lambda _: members.append(copied(module.state_dict())))
    trainer.add_event_handler(completed, saver)
    trainer.run([0, 1], max_epochs=11)
    found = discover(tmp_path / "run")
    assert [s.facts.step for s in found.snapshots] == list(range(2, 23, 2))
    fresh = net()
    handlers.Checkpoint.load_objects({"model": fresh}, averaged(tmp_path / "run"))
    assert_mean(fresh.state_dict(), members)


def test_skorch(tmp_path: Path) -> None:
    skorch = pytest.importorskip("skorch")
    callbacks = pytest.importorskip("skorch.callbacks")
    saver = callbacks.Checkpoint(
        dirname=str(tmp_path / "run"), monitor=None, f_params="params_{last_epoch[epoch]}.pt"
    )
    given = {"max_epochs": 10, "lr": 0.125, "verbose": 0, "train_split": None}
    model = skorch.NeuralNetClassifier(
        net, criterion=nn.CrossEntropyLoss, callbacks=[saver], **given
    )
    inputs, labels = data()
    model.fit(inputs.numpy(), labels.numpy())
    paths = [tmp_path / f"run/params_{n}.pt" for n in range(1, 11)]
    members = [state_in(path) for path in paths]
    found = discover(tmp_path / "run")
    assert [s.path.name for s in found.snapshots] == [path.name for path in paths]
    torch.save(averaged(tmp_path / "run"), tmp_path / "params.pt")
    model.load_params(f_params=str(tmp_path / "params.pt"))
    assert_mean(model.module_.state_dict(), members)


# ------------------------------------------------------------------ timm, torchvision, ultralytics


@pytest.mark.parametrize("ema", [False, True])
def test_timm(ema: bool, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    utils = pytest.importorskip("timm.utils")
    model = timm.create_model("resnet18", num_classes=3)
    moving = utils.ModelEmaV2(model, decay=0.5) if ema else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    (tmp_path / "run").mkdir()
    saver = utils.CheckpointSaver(
        model, optimizer, model_ema=moving, checkpoint_dir=str(tmp_path / "run"), max_history=9
    )
    members = []
    for epoch in (8, 9, 10):
        raw = move(model, epoch)
        if moving is not None:
            moving.update(model)
        members.append(copied(moving.module.state_dict()) if moving is not None else raw)
        saver.save_checkpoint(epoch, metric=70.0 + epoch)
    found = discover(tmp_path / "run")
    assert [s.facts.epoch for s in found.snapshots] == [8, 9, 10]
    assert [dict(s.facts.metrics) for s in found.snapshots] == [{"metric": 70.0 + n} for n in (8, 9, 10)]  # fmt: skip
    out = tmp_path / "out.safetensors"
    average(tmp_path / "run", out)
    fresh = timm.create_model("resnet18", num_classes=3)
    timm.models.load_checkpoint(fresh, str(out))
    assert_mean(fresh.state_dict(), members)


def test_torchvision(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.shufflenet_v2_x0_5(num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    (tmp_path / "run").mkdir()
    members = []
    for epoch in (8, 9, 10):  # as references/classification/train.py does
        members.append(move(model, epoch))
        parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
        value = {**{k: v.state_dict() for k, v in parts.items()}, "epoch": epoch, "args": {}}
        torch.save(value, tmp_path / f"run/model_{epoch}.pth")
    fresh = models.shufflenet_v2_x0_5(num_classes=3)
    fresh.load_state_dict(averaged(tmp_path / "run"))
    assert_mean(fresh.state_dict(), members)


def test_ultralytics(tmp_path: Path) -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model = tasks.ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False)
    (tmp_path / "run").mkdir()
    members = []
    for epoch in (8, 9, 10):  # as BaseTrainer.save_model does
        move(model, epoch)
        half = copy.deepcopy(model).half()
        members.append(copied(half.state_dict()))
        value = {"epoch": epoch, "model": None, "ema": half, "train_args": {}, "version": "8"}
        torch.save(value, tmp_path / f"run/epoch{epoch}.pt")
    fresh = copy.deepcopy(model).half()
    fresh.load_state_dict(averaged(tmp_path / "run"))
    assert_mean(fresh.state_dict(), members)
