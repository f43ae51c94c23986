"""Checkpoint folders as training tools leave them.

All of them are synthesised from the tools' saving code (`imitates` names the function), with small
weights; DCP alone is written by the real thing, since torch brings it along. A builder fills an
empty folder and returns what a right reader finds in it.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import types
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ..checkpoints import State, save, state


@dataclass(frozen=True)
class Expected:
    """What a right reader finds.

    Attributes:
        names: Snapshots in order.
        states: The weights that are taken by default.
        model: What `--weights model` takes, where several sets exist.
        ema: What `--weights ema` takes, likewise.
        facts: Values for each snapshot, by attribute of `Facts`.
        skipped: Parts of the reasons, by name.
        warnings: Parts of the warnings.
    """

    names: tuple[str, ...]
    states: tuple[State, ...]
    model: tuple[State, ...] = ()
    ema: tuple[State, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """An error, with parts of its message and of its hint."""

    message: str
    hint: str


@dataclass(frozen=True)
class Writer:
    """A tool's way of saving."""

    layout: str
    imitates: str
    build: Callable[[Path], Expected]


@dataclass(frozen=True)
class RefusedWriter:
    """A way of saving that leaves no weights that could be averaged."""

    imitates: str
    build: Callable[[Path], Refused]


WRITERS: dict[str, Writer] = {}
REFUSED: dict[str, RefusedWriter] = {}
SAME = "same weights as "


def writer(
    name: str, layout: str, imitates: str
) -> Callable[[Callable[[Path], Expected]], Callable[[Path], Expected]]:
    def register(build: Callable[[Path], Expected]) -> Callable[[Path], Expected]:
        WRITERS[name] = Writer(layout, imitates, build)
        return build

    return register


def refused(
    name: str, imitates: str
) -> Callable[[Callable[[Path], Refused]], Callable[[Path], Refused]]:
    def register(build: Callable[[Path], Refused]) -> Callable[[Path], Refused]:
        REFUSED[name] = RefusedWriter(imitates, build)
        return build

    return register


# ---------------------------------------------------------------- parts that tools have in common


def sgd(lr: float) -> dict[str, Any]:
    """The state of an optimizer that has taken a step."""
    return {
        "state": {0: {"momentum_buffer": torch.ones(16, 3, 3, 3)}},
        "param_groups": [{"lr": lr, "momentum": 0.9, "params": [0]}],
    }


def scheduler(lr: float, epoch: int) -> dict[str, Any]:
    return {"base_lrs": [lr], "last_epoch": epoch, "_step_count": epoch + 1, "_last_lr": [lr]}


def prefixed(prefix: str, weights: State) -> State:
    return {prefix + key: tensor for key, tensor in weights.items()}


def averaged_model(weights: State, count: int) -> State:
    """`state_dict()` of torch's AveragedModel."""
    return {"n_averaged": torch.tensor(count), **prefixed("module.", weights)}


def states(*steps: float) -> tuple[State, ...]:
    return tuple(state(step) for step in steps)


def mean_of(*members: State) -> State:
    """Uniform mean; counters as in the newest."""
    newest = members[-1]
    return {
        key: newest[key].clone()
        if not newest[key].is_floating_point()
        else (sum((m[key].double() for m in members), torch.zeros(())) / len(members)).to(
            newest[key].dtype
        )
        for key in newest
    }


# ------------------------------------------------------------------------------------------- timm


def _timm(folder: Path, *, ema: bool) -> tuple[State, ...]:
    for epoch in (9, 10, 11):
        value = {
            "epoch": epoch,
            "arch": "resnet18",
            "state_dict": state(epoch),
            "optimizer": sgd(0.5 / epoch),
            "version": 2,
            "args": Namespace(model="resnet18", num_classes=10, data_dir=Path("/data")),
            "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
            **({"state_dict_ema": state(epoch + 0.5)} if ema else {}),
            "metric": 70.0 + epoch,
        }
        save(value, folder / f"checkpoint-{epoch}.pth.tar")
    for name in ("last", "model_best"):
        (folder / f"{name}.pth.tar").hardlink_to(folder / "checkpoint-11.pth.tar")
    (folder / "summary.csv").write_text("epoch,train_loss,eval_top1\n9,1.0,79.0\n")
    (folder / "args.yaml").write_text("model: resnet18\n")
    return states(9.5, 10.5, 11.5) if ema else states(9, 10, 11)


TIMM_FACTS = {
    "epoch": [9, 10, 11],
    "lr": [0.5 / 9, 0.5 / 10, 0.5 / 11],
    "metrics": [{"metric": 79.0}, {"metric": 80.0}, {"metric": 81.0}],
    "model_hint": ["timm:resnet18?num_classes=10"] * 3,
}
TIMM_NAMES = tuple(f"checkpoint-{n}.pth.tar" for n in (9, 10, 11))
TIMM_SKIPPED = {
    "last.pth.tar": SAME + TIMM_NAMES[2],
    "model_best.pth.tar": SAME + TIMM_NAMES[2],
    "summary.csv": "not a checkpoint",
    "args.yaml": "not a checkpoint",
}


@writer("timm", "timm", "timm.utils.checkpoint_saver.CheckpointSaver._save, avg_checkpoints.py")
def timm(folder: Path) -> Expected:
    members = _timm(folder, ema=False)
    save(mean_of(*members), folder / "averaged.pth")
    skipped = {**TIMM_SKIPPED, "averaged.pth": "equals the mean of"}
    return Expected(TIMM_NAMES, members, facts=TIMM_FACTS, skipped=skipped)


@writer("timm-ema", "timm", "timm.utils.checkpoint_saver.CheckpointSaver._save, model_ema")
def timm_ema(folder: Path) -> Expected:
    members = _timm(folder, ema=True)
    return Expected(
        TIMM_NAMES, members, states(9, 10, 11), members, TIMM_FACTS, skipped=TIMM_SKIPPED
    )


@writer("timm-ema-averaged", "timm", "timm's avg_checkpoints.py --use-ema, run in the same folder")
def timm_ema_averaged(folder: Path) -> Expected:
    members = _timm(folder, ema=True)
    save(mean_of(*members), folder / "averaged.pth")
    return Expected(TIMM_NAMES, members, skipped={"averaged.pth": "equals the mean of"})


# ------------------------------------------------------------------------- torchvision references


def _torchvision(folder: Path, *, ema: bool) -> None:
    for epoch in (8, 9, 10):
        value = {
            "model": state(epoch),
            "optimizer": sgd(0.5),
            "lr_scheduler": scheduler(0.5, epoch + 1),
            "epoch": epoch,
            "args": Namespace(model="shufflenet_v2_x0_5", data_path="/data", lr=0.5),
            **({"model_ema": averaged_model(state(epoch + 0.5), epoch)} if ema else {}),
        }
        save(value, folder / f"model_{epoch}.pth")
    save(value, folder / "checkpoint.pth")


TORCHVISION = {
    "epoch": [8, 9, 10],
    "lr": [0.5] * 3,
    "metrics": [{}] * 3,
    "model_hint": ["torchvision:shufflenet_v2_x0_5"] * 3,
}
TORCHVISION_NAMES = tuple(f"model_{n}.pth" for n in (8, 9, 10))


@writer("torchvision", "torchvision", "torchvision references/classification/train.py main")
def torchvision(folder: Path) -> Expected:
    _torchvision(folder, ema=False)
    skipped = {"checkpoint.pth": SAME + "model_10.pth"}
    return Expected(TORCHVISION_NAMES, states(8, 9, 10), facts=TORCHVISION, skipped=skipped)


@writer("torchvision-ema", "torchvision", "the same with --model-ema: ExponentialMovingAverage")
def torchvision_ema(folder: Path) -> Expected:
    _torchvision(folder, ema=True)
    averages = states(8.5, 9.5, 10.5)
    skipped = {"checkpoint.pth": SAME + "model_10.pth"}
    return Expected(
        TORCHVISION_NAMES, averages, states(8, 9, 10), averages, TORCHVISION, skipped=skipped
    )


# -------------------------------------------------------------------------------------- Lightning


def _lightning(epoch: int, weights: State, callbacks: Any, **more: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "global_step": 19 * (epoch + 1),
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict(prefixed("net.", weights)),
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": epoch + 1}}}},
        "callbacks": callbacks,
        "optimizer_states": [sgd(0.25)],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 8, "path": Path("/data")},
        **more,
    }


def _model_checkpoint(epoch: int, monitor: str | None) -> dict[str, Any]:
    score = torch.tensor(0.5 + epoch / 64) if monitor else None
    name = f"ModelCheckpoint{{'monitor': {monitor!r}, 'mode': 'max', 'every_n_epochs': 1}}"
    return {
        name: {
            "monitor": monitor,
            "best_model_score": score,
            "best_model_path": f"/run/epoch={epoch}.ckpt",
            "current_score": score,
            "dirpath": "/run",
            "best_k_models": {},
            "kth_best_model_path": "",
            "kth_value": torch.tensor(float("-inf")),
            "last_model_path": "",
        }
    }


EPOCHS = (8, 9, 10)
LIGHTNING_NAMES = tuple(f"epoch={n}-step={19 * (n + 1)}.ckpt" for n in EPOCHS)
NETS = tuple(prefixed("net.", weights) for weights in states(*EPOCHS))
LIGHTNING_FACTS = {"epoch": [8, 9, 10], "step": [171, 190, 209], "lr": [0.25] * 3}


@writer("lightning", "lightning", "lightning CheckpointConnector.dump_checkpoint")
def lightning(folder: Path) -> Expected:
    for epoch, name in zip(EPOCHS, LIGHTNING_NAMES, strict=True):
        save(_lightning(epoch, state(epoch), _model_checkpoint(epoch, None)), folder / name)
    shutil.copy(folder / name, folder / "last.ckpt")
    (folder / "hparams.yaml").write_text("width: 8\n")
    (folder / "events.out.tfevents.1.host.1.0").write_bytes(b"\x18\0\0\0\0\0\0\0")
    skipped = {"last.ckpt": SAME + name, "hparams.yaml": "not a checkpoint"}
    facts = {**LIGHTNING_FACTS, "metrics": [{}] * 3}
    return Expected(LIGHTNING_NAMES, NETS, facts=facts, skipped=skipped)


@writer("lightning-monitor", "lightning", "the same with ModelCheckpoint(monitor=...).state_dict")
def lightning_monitor(folder: Path) -> Expected:
    for epoch, name in zip(EPOCHS, LIGHTNING_NAMES, strict=True):
        save(_lightning(epoch, state(epoch), _model_checkpoint(epoch, "val_acc")), folder / name)
    scores = [{"val_acc": 0.5 + epoch / 64} for epoch in EPOCHS]
    return Expected(LIGHTNING_NAMES, NETS, facts={**LIGHTNING_FACTS, "metrics": scores})


@writer("lightning-ema", "lightning", "lightning WeightAveraging.on_save_checkpoint")
def lightning_ema(folder: Path) -> Expected:
    for epoch, name in zip(EPOCHS, LIGHTNING_NAMES, strict=True):
        more = {
            "current_model_state": prefixed("net.", state(epoch + 0.5)),
            "averaging_state": {"n_averaged": torch.tensor(epoch)},
        }
        callbacks = {"EMAWeightAveraging": {"latest_update_step": 19 * (epoch + 1)}}
        save(_lightning(epoch, state(epoch), callbacks, **more), folder / name)
    raw = tuple(prefixed("net.", weights) for weights in states(8.5, 9.5, 10.5))
    return Expected(LIGHTNING_NAMES, NETS, raw, NETS, LIGHTNING_FACTS)


@writer("lightning-swa", "lightning", "lightning StochasticWeightAveraging.state_dict")
def lightning_swa(folder: Path) -> Expected:
    for count, (epoch, name) in enumerate(zip(EPOCHS, LIGHTNING_NAMES, strict=True)):
        running = mean_of(*NETS[: count + 1])
        callback = {
            "n_averaged": count + 1,
            "latest_update_epoch": epoch,
            "scheduler_state": None,
            "average_model_state": running,
        }
        save(
            _lightning(epoch, state(epoch), {"StochasticWeightAveraging": callback}), folder / name
        )
    final = _lightning(11, mean_of(*states(*EPOCHS)), {})
    save(final, folder / "swa_final.ckpt")
    skipped = {"swa_final.ckpt": "equals the mean of"}
    return Expected(LIGHTNING_NAMES, NETS, NETS, facts=LIGHTNING_FACTS, skipped=skipped)


# ----------------------------------------------------------------------------------- Hugging Face

HF_STEPS = (90, 1000, 200)  # sorts wrongly as text
HF_ORDER = (90, 200, 1000)


def _trainer_state(step: int, folder: Path) -> None:
    logs = [
        {"epoch": step / 100, "learning_rate": 0.5 / step, "loss": 1.5, "step": step},
        {"epoch": step / 100, "eval_loss": 1 / step, "eval_accuracy": step / 1024, "step": step},
    ]
    earlier = [{"epoch": 0.1, "learning_rate": 0.5, "step": 1}, {"eval_loss": 9.0, "step": 1}]
    value = {
        "best_metric": 0.1,
        "best_model_checkpoint": f"out/checkpoint-{step}",
        "epoch": step / 100,
        "global_step": step,
        "is_world_process_zero": True,
        "log_history": [*earlier, *logs],
        "max_steps": 1000,
    }
    (folder / "trainer_state.json").write_text(json.dumps(value, indent=2))


def _trainer_folder(step: int, folder: Path) -> Path:
    """What lies beside the weights."""
    folder.mkdir(parents=True)
    config = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("[PAD]\n")
    save(sgd(0.5), folder / "optimizer.pt")
    save(scheduler(0.5, step), folder / "scheduler.pt")
    rng = {"python": (3, (1, 2), None), "numpy": np.random.default_rng(0).bytes(8), "cpu": None}
    save(rng, folder / "rng_state.pth")
    save(Namespace(output_dir="out", learning_rate=0.5), folder / "training_args.bin")
    _trainer_state(step, folder)
    return folder


def _shards(folder: Path, weights: State, stem: str, ending: str) -> None:
    parts: list[State] = [{}, {}]
    for k, (key, tensor) in enumerate(weights.items()):
        parts[k % 2][key] = tensor
    places = {}
    for k, part in enumerate(parts, start=1):
        name = f"{stem}-{k:05}-of-00002.{ending}"
        if ending == "bin":
            save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))


def _hf(folder: Path, how: str) -> Expected:
    file = {"single": "/model.safetensors", "bin": "/pytorch_model.bin"}.get(how, "")
    for step in HF_STEPS:
        own = _trainer_folder(step, folder / f"checkpoint-{step}")
        if how == "single":
            save_file(state(step), own / "model.safetensors", metadata={"format": "pt"})
        elif how == "bin":
            save(state(step), own / "pytorch_model.bin")
        else:
            stem = "model" if how == "safetensors" else "pytorch_model"
            _shards(own, state(step), stem, how.removeprefix("sharded-"))
    facts = {
        "step": list(HF_ORDER),
        "epoch": [step / 100 for step in HF_ORDER],
        "lr": [0.5 / step for step in HF_ORDER],
        "metrics": [{"eval_loss": 1 / s, "eval_accuracy": s / 1024} for s in HF_ORDER],
    }
    names = tuple(f"checkpoint-{step}{file}" for step in HF_ORDER)
    files = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "config.json")
    skipped = {f"checkpoint-90/{name}": "not a checkpoint" for name in files}
    return Expected(names, states(*HF_ORDER), facts=facts, skipped=skipped)


@writer("hf-trainer", "transformers", "transformers Trainer._save_checkpoint, save_model after it")
def hf_trainer(folder: Path) -> Expected:
    found = _hf(folder, "single")
    last = folder / "checkpoint-1000"
    for name in ("model.safetensors", "config.json", "training_args.bin"):
        shutil.copy(last / name, folder / name)
    skipped = {**found.skipped, "model.safetensors": SAME + "checkpoint-1000/model.safetensors"}
    return Expected(found.names, found.states, facts=found.facts, skipped=skipped)


@writer(
    "hf-sharded", "transformers", "transformers PreTrainedModel.save_pretrained, max_shard_size"
)
def hf_sharded(folder: Path) -> Expected:
    return _hf(folder, "safetensors")


@writer("hf-bin", "transformers", "transformers 4 save_pretrained(safe_serialization=False)")
def hf_bin(folder: Path) -> Expected:
    return _hf(folder, "bin")


@writer("hf-sharded-bin", "transformers", "the same, max_shard_size")
def hf_sharded_bin(folder: Path) -> Expected:
    return _hf(folder, "sharded-bin")


def _adapter(step: int) -> State:
    key = "base_model.model.encoder.layer.0.attention.query"
    full = state(step)
    return {
        f"{key}.lora_A.weight": full["fc.weight"][:4].clone(),
        f"{key}.lora_B.weight": full["fc.weight"].T[:, :4].contiguous(),
    }


@writer("peft", "peft", "peft PeftModel.save_pretrained, below a Trainer")
def peft(folder: Path) -> Expected:
    for step in HF_STEPS:
        own = folder / f"checkpoint-{step}"
        own.mkdir()
        save_file(_adapter(step), own / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "bert"}
        (own / "adapter_config.json").write_text(json.dumps(config))
        (own / "README.md").write_text("---\nbase_model: bert\n---\n")
        _trainer_state(step, own)
    names = tuple(f"checkpoint-{step}/adapter_model.safetensors" for step in HF_ORDER)
    warnings = ("the mean of A times the mean of B is not the mean of the products",)
    facts = {"step": list(HF_ORDER)}
    return Expected(names, tuple(map(_adapter, HF_ORDER)), facts=facts, warnings=warnings)


@writer("accelerate", "state-dict", "accelerate.checkpointing.save_accelerator_state")
def accelerate(folder: Path) -> Expected:
    for n in EPOCHS:
        own = folder / "checkpoints" / f"checkpoint_{n}"
        own.mkdir(parents=True)
        save_file(state(n), own / "model.safetensors", metadata={"format": "pt"})
        save(sgd(0.5), own / "optimizer.bin")
        save(scheduler(0.5, n), own / "scheduler.bin")
        save({"scale": 65536.0, "growth_factor": 2.0}, own / "scaler.pt")
        save({"step": n, "random_state": (3, (1, 2), None)}, own / "random_states_0.pkl")
        save({"shadow": torch.full((2,), float(n))}, own / "custom_checkpoint_0.pkl")
    names = tuple(f"checkpoints/checkpoint_{n}/model.safetensors" for n in EPOCHS)
    side = ("optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_0.pkl")
    skipped = dict.fromkeys((f"checkpoints/checkpoint_8/{name}" for name in side), "")
    return Expected(names, states(*EPOCHS), skipped=skipped)


# --------------------------------------------------------------------------- torch.distributed, ZeRO


def _dcp(
    folder: Path, wrap: Callable[[int], dict[str, Any]], name: str = "step-{}"
) -> tuple[str, ...]:
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    for step in HF_STEPS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is one process only
            dcp_save(wrap(step), checkpoint_id=folder / name.format(step))
    return tuple(name.format(step) for step in HF_ORDER)


@writer("dcp", "torch-dict", "torch.distributed.checkpoint.save (the real one)")
def dcp(folder: Path) -> Expected:
    names = _dcp(folder, lambda n: {"model": state(n), "optimizer": sgd(0.5), "step": n})
    return Expected(names, states(*HF_ORDER), facts={"step": list(HF_ORDER)})


@writer("dcp-app", "torch-dict", "the same, with the tutorial's AppState")
def dcp_app(folder: Path) -> Expected:
    names = _dcp(folder, lambda n: {"app": {"model": state(n), "optim": sgd(0.5)}})
    return Expected(names, states(*HF_ORDER))


@writer("dcp-root", "state-dict", "the same, with a bare model")
def dcp_root(folder: Path) -> Expected:
    return Expected(_dcp(folder, state), states(*HF_ORDER))


@writer("accelerate-fsdp", "torch-dict", "accelerate.utils.fsdp_utils, SHARDED_STATE_DICT")
def accelerate_fsdp(folder: Path) -> Expected:
    _dcp(folder, lambda n: {"model": state(n)}, "checkpoint_{}/pytorch_model_fsdp_0")
    _dcp(folder, lambda n: {"optimizer": sgd(0.5)}, "checkpoint_{}/optimizer_0")
    names = tuple(f"checkpoint_{n}/pytorch_model_fsdp_0" for n in HF_ORDER)
    skipped = {"checkpoint_90/optimizer_0": "holds no model weights"}
    return Expected(names, states(*HF_ORDER), skipped=skipped)


def _deepspeed(step: int, weights: State) -> dict[str, Any]:
    return {
        "module": weights,
        "buffer_names": ["bn.running_mean", "bn.running_var"],
        "optimizer": None,
        "param_shapes": [OrderedDict((key, tensor.shape) for key, tensor in weights.items())],
        "frozen_param_shapes": None,
        "shared_params": {},
        "lr_scheduler": scheduler(0.5, step),
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": step * 8,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.16.4",
    }


def _deepspeed_optimizer(folder: Path, name: str) -> None:
    inner = {"single_partition_of_fp32_groups": [torch.ones(9)], "zero_stage": 2}
    value = {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.16.4"}
    save(value, folder / name)


@writer("deepspeed", "deepspeed", "deepspeed DeepSpeedEngine._save_checkpoint, ZeRO-1/2")
def deepspeed(folder: Path) -> Expected:
    for step in HF_STEPS:
        own = folder / f"global_step{step}"
        save(_deepspeed(step, state(step)), own / "mp_rank_00_model_states.pt")
        _deepspeed_optimizer(own, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step1000")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit\n")
    names = tuple(f"global_step{step}/mp_rank_00_model_states.pt" for step in HF_ORDER)
    optimizer = "global_step90/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    skipped = {optimizer: "", "latest": "not a checkpoint", "zero_to_fp32.py": "not a checkpoint"}
    facts = {"step": list(HF_ORDER)}
    return Expected(names, states(*HF_ORDER), facts=facts, skipped=skipped)


@refused("deepspeed-zero3", "deepspeed DeepSpeedEngine._save_zero_checkpoint, stage 3")
def deepspeed_zero3(folder: Path) -> Refused:
    for step in (10, 20):
        own = folder / f"global_step{step}"
        kept = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
        hollow = {k: v if k in kept else torch.empty(0) for k, v in state(step).items()}
        for rank in (0, 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            save(_deepspeed(step, hollow), own / f"{name}_model_states.pt")
            _deepspeed_optimizer(own, f"{name}_optim_states.pt")
    return Refused("ZeRO-3", "zero_to_fp32")


@refused("fsdp-rank-shards", "torch.save of an FSDP local or sharded state dict: ShardedTensor")
def fsdp_rank_shards(folder: Path) -> Refused:
    """As torch wrote it before its class became a tensor's; buffers are whole on each rank."""

    def sharded(local: torch.Tensor) -> Any:
        return _Sharded(([local], {"size": torch.Size((2 * len(local),))}, (0, 2), None, False))

    for rank in (0, 1):
        parts = {k: v if k.startswith("bn.") else sharded(v) for k, v in state(rank).items()}
        with _PickledAs("torch.distributed._shard.sharded_tensor.api", "ShardedTensor", _Sharded):
            save({"model": parts}, folder / f"rank_{rank}.pt")
    return Refused("shard", "full_state_dict=True")


@refused("fsdp2-rank-shards", "torch.save of a state dict with DTensor leaves: _rebuild_wrapper")
def fsdp2_rank_shards(folder: Path) -> Refused:
    for rank in (0, 1):
        leaves = {key: _Hollow() for key in state(0)}
        with _PickledAs("torch._utils", "_rebuild_wrapper_subclass", _Hollow):
            save({"model": leaves}, folder / f"rank_{rank}.pt")
    return Refused("shard", "full_state_dict=True")


class _Sharded:
    """Stands for an object that is pickled as class and state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return self.state


class _Hollow:
    """Stands for a DTensor: pickled as a call with neither storage nor values."""

    def __reduce__(self) -> Any:
        return _Hollow, (torch.float32, torch.Size((4,)), (1,), 0, None, "cpu", False)


class _PickledAs:
    """Lets a class be pickled under another's name."""

    def __init__(self, module: str, name: str, cls: type) -> None:
        self.module, self.name, self.cls = module, name, cls

    def __enter__(self) -> None:
        self.place = import_module(self.module)
        self.old = (getattr(self.place, self.name), self.cls.__module__, self.cls.__qualname__)
        setattr(self.place, self.name, self.cls)
        self.cls.__module__, self.cls.__qualname__ = self.module, self.name
        self.cls.__name__ = self.name

    def __exit__(self, *_: object) -> None:
        setattr(self.place, self.name, self.old[0])
        self.cls.__module__, self.cls.__qualname__ = self.old[1:]


# -------------------------------------------------------------------------- one file, one dialect


def _series(
    folder: Path,
    name: str,
    make: Callable[[int], Any],
    *,
    numbers: tuple[int, ...] = EPOCHS,
) -> tuple[str, ...]:
    """One file for each number."""
    names = tuple(name.format(n) for n in numbers)
    for n, own in zip(numbers, names, strict=True):
        save(make(n), folder / own)
    return names


def _mmengine(epoch: int, **more: Any) -> dict[str, Any]:
    meta = {"epoch": epoch, "iter": 100 * epoch, "cfg": "model = dict()", "seed": 1}
    hub = {"log_scalars": OrderedDict(), "runtime_info": OrderedDict(epoch=epoch, max_epochs=12)}
    return {
        "meta": meta,
        "state_dict": state(epoch),
        "message_hub": hub,
        "optimizer": sgd(0.25),
        "param_schedulers": [scheduler(0.25, epoch)],
        **more,
    }


MMENGINE = {"epoch": list(EPOCHS), "step": [800, 900, 1000], "lr": [0.25] * 3}


@writer("mmengine", "mmengine", "mmengine Runner.save_checkpoint, CheckpointHook save_best")
def mmengine(folder: Path) -> Expected:
    names = _series(folder, "epoch_{}.pth", _mmengine)
    shutil.copy(folder / "epoch_9.pth", folder / "best_coco_bbox_mAP_epoch_9.pth")
    (folder / "last_checkpoint").write_text("/run/epoch_10.pth")
    (folder / "config.py").write_text("model = dict()\n")
    skipped = {
        "best_coco_bbox_mAP_epoch_9.pth": SAME + "epoch_9.pth",
        "last_checkpoint": "not a checkpoint",
        "config.py": "not a checkpoint",
    }
    return Expected(names, states(*EPOCHS), facts=MMENGINE, skipped=skipped)


@writer("mmengine-ema", "mmengine", "mmengine EMAHook.before_save_checkpoint, which swaps the two")
def mmengine_ema(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        raw = {"steps": torch.tensor(epoch), **prefixed("module.", state(epoch + 0.5))}
        return _mmengine(epoch, ema_state_dict=raw)

    names = _series(folder, "epoch_{}.pth", make)
    return Expected(names, states(*EPOCHS), states(8.5, 9.5, 10.5), states(*EPOCHS), facts=MMENGINE)


@writer("detectron2", "detectron2", "fvcore Checkpointer.save, PeriodicCheckpointer.step")
def detectron2(folder: Path) -> Expected:
    def make(step: int) -> dict[str, Any]:
        own = {"model": state(step), "optimizer": sgd(0.25), "scheduler": scheduler(0.25, step)}
        return {**own, "iteration": step}

    names = _series(folder, "model_{:07}.pth", make, numbers=(4999, 9999, 14999))
    shutil.copy(folder / names[2], folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    (folder / "metrics.json").write_text('{"iteration": 19, "lr": 0.01}\n{"iteration": 39}\n')
    skipped = {"model_final.pth": SAME + names[2], "metrics.json": "not a checkpoint"}
    facts = {"step": [4999, 9999, 14999], "lr": [0.25] * 3, "metrics": [{}] * 3}
    return Expected(names, states(4999, 9999, 14999), facts=facts, skipped=skipped)


def _fairseq(epoch: int) -> dict[str, Any]:
    history = {"criterion_name": "Loss", "optimizer_name": "Adam", "num_updates": 100 * epoch}
    return {
        "args": None,
        "cfg": {"model": Namespace(arch="transformer")},
        "model": state(epoch),
        "criterion": None,
        "optimizer_history": [{**history, "num_updates": 1}, history],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": epoch, "iterations_in_epoch": 0},
            "val_loss": 8.0 - epoch / 4,
            "best": 5.5,
            "previous_training_time": 12.5,
        },
        "last_optimizer_state": sgd(0.125),
    }


@writer("fairseq", "fairseq", "fairseq.checkpoint_utils.save_checkpoint, Trainer.state_dict")
def fairseq(folder: Path) -> Expected:
    names = _series(folder, "checkpoint{}.pt", _fairseq)
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        shutil.copy(folder / names[2], folder / name)
    skipped = dict.fromkeys(("checkpoint_last.pt", "checkpoint_best.pt"), SAME + names[2])
    metrics = [{"val_loss": 8.0 - n / 4, "best": 5.5} for n in EPOCHS]
    facts = {"epoch": [8, 9, 10], "step": [800, 900, 1000], "lr": [0.125] * 3, "metrics": metrics}
    return Expected(names, states(*EPOCHS), facts=facts, skipped=skipped)


@writer("fairseq-ema", "fairseq", "the same with --store-ema")
def fairseq_ema(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        value = _fairseq(epoch)
        value["extra_state"]["ema"] = state(epoch + 0.5)
        return value

    names = _series(folder, "checkpoint_{}_1.pt", make)
    averages = states(8.5, 9.5, 10.5)
    return Expected(names, averages, states(*EPOCHS), averages)


@writer("nanogpt", "nanogpt", "nanoGPT train.py, with --compile and tied embeddings")
def nanogpt(folder: Path) -> Expected:
    def weights(step: int) -> State:
        own = state(step)
        table = own["fc.weight"]
        return {"transformer.wte.weight": table, "ln.weight": own["fc.bias"], "head.weight": table}

    def make(step: int) -> dict[str, Any]:
        return {
            "model": prefixed("_orig_mod.", weights(step)),
            "optimizer": sgd(0.125),
            "model_args": {"n_layer": 6, "bias": False},
            "iter_num": step,
            "best_val_loss": torch.tensor(2.5),
            "config": {"out_dir": "out", "learning_rate": 6e-4},
        }

    names = _series(folder, "ckpt{}.pt", make, numbers=HF_ORDER)
    metrics = [{"best_val_loss": 2.5}] * 3
    facts = {"step": list(HF_ORDER), "lr": [0.125] * 3, "metrics": metrics}
    return Expected(names, tuple(map(weights, HF_ORDER)), facts=facts)


@writer("open-clip", "open-clip", "open_clip_train.main, --save-most-recent")
def open_clip(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        weights = prefixed("module.", state(epoch))
        own = {"epoch": epoch, "name": "2024-ViT-B-32", "state_dict": weights}
        return {**own, "optimizer": sgd(0.125), "scaler": {"scale": 1.0, "growth_factor": 2.0}}

    names = _series(folder, "checkpoints/epoch_{}.pt", make)
    shutil.copy(folder / names[2], folder / "checkpoints/epoch_latest.pt")
    (folder / "out.log").write_text("Start epoch 0\n")
    (folder / "params.txt").write_text("name: x\n")
    skipped = {"checkpoints/epoch_latest.pt": SAME + names[2], "out.log": "not a checkpoint"}
    facts = {"epoch": [8, 9, 10], "lr": [0.125] * 3, "metrics": [{}] * 3}
    return Expected(names, states(*EPOCHS), facts=facts, skipped=skipped)


@writer("wenet", "state-dict", "wenet.utils.checkpoint.save_checkpoint, tools/average_model.py")
def wenet(folder: Path) -> Expected:
    names = _series(folder, "{}.pt", state)
    for n in EPOCHS:
        (folder / f"{n}.yaml").write_text(f"cv_loss: 3.0\nepoch: {n}\nlr: 0.001\nstep: {n}00\n")
    save(mean_of(*states(*EPOCHS)), folder / "avg_3.pt")
    (folder / "final.pt").symlink_to("avg_3.pt")
    skipped = {"avg_3.pt": "", "final.pt": "", "8.yaml": "not a checkpoint"}
    return Expected(names, states(*EPOCHS), skipped=skipped)


@writer("espnet", "state-dict", "espnet2.train.trainer.Trainer.run, average_nbest_models")
def espnet(folder: Path) -> Expected:
    names = _series(folder, "{}epoch.pth", state)
    save(mean_of(*states(*EPOCHS)), folder / "valid.acc.ave_3best.pth")
    for link in ("valid.acc.best.pth", "latest.pth"):
        (folder / link).symlink_to(names[2])
    (folder / "valid.acc.ave.pth").symlink_to("valid.acc.ave_3best.pth")
    whole = {"model": state(10), "optimizers": [sgd(0.5)], "schedulers": [None], "reporter": {}}
    save({**whole, "scaler": None}, folder / "checkpoint.pth")
    links = ("valid.acc.best.pth", "latest.pth", "checkpoint.pth")
    average = dict.fromkeys(("valid.acc.ave_3best.pth", "valid.acc.ave.pth"), "")
    skipped = {**dict.fromkeys(links, SAME + names[2]), **average}
    return Expected(names, states(*EPOCHS), skipped=skipped)


@writer("ignite", "ignite", "ignite.handlers.Checkpoint._setup_checkpoint")
def ignite(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        trainer = {"epoch_length": 19, "iteration": 19 * epoch, "max_epochs": 12}
        return {"model": state(epoch), "optimizer": sgd(0.25), "trainer": trainer}

    names = _series(folder, "checkpoint_{}.pt", make)
    save(make(9), folder / "best_checkpoint_9_accuracy=0.9100.pt")
    skipped = {"best_checkpoint_9_accuracy=0.9100.pt": SAME + names[1]}
    facts = {"step": [152, 171, 190], "lr": [0.25] * 3}
    return Expected(names, states(*EPOCHS), facts=facts, skipped=skipped)


@writer("skorch", "state-dict", "skorch.callbacks.Checkpoint.save_model, all its files")
def skorch(folder: Path) -> Expected:
    names = _series(folder, "params_{}.pt", state)
    save(sgd(0.5), folder / "optimizer.pt")
    save(OrderedDict(), folder / "criterion.pt")
    (folder / "history.json").write_text('[{"epoch": 8, "valid_loss": 0.4}]')
    side = ("optimizer.pt", "criterion.pt", "history.json")
    return Expected(names, states(*EPOCHS), skipped=dict.fromkeys(side, ""))


@writer("fastai", "fastai", "fastai.learner.save_model, SaveModelCallback(every_epoch=True)")
def fastai(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        opt = {"state": [{"mom": torch.ones(2)}], "hypers": [{"lr": 0.125, "wd": 0.01}]}
        return {"model": state(epoch), "opt": opt}

    names = _series(folder, "models/model_{}.pth", make)
    return Expected(names, states(*EPOCHS))


@writer("composer", "composer", "composer.utils.checkpoint.save_checkpoint, State.state_dict")
def composer(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        stamp = {"epoch": epoch, "batch": 100 * epoch, "sample": 800 * epoch, "token": 0}
        inner = {
            "model": prefixed("module.", state(epoch)),
            "optimizers": {"DecoupledAdamW": sgd(0.125)},
            "schedulers": {"LambdaLR": scheduler(0.125, epoch)},
            "timestamp": {"Timestamp": stamp},
            "rank_zero_seed": 17,
        }
        return {"state": inner, "rng": [{"python": (3, (1,), None), "torch": torch.zeros(8)}]}

    names = tuple(f"ep{n}-ba{100 * n}-rank0.pt" for n in EPOCHS)
    for n, name in zip(EPOCHS, names, strict=True):
        save(make(n), folder / name)
    (folder / "latest-rank0.pt").symlink_to(names[2])
    facts = {"epoch": [8, 9, 10], "step": [800, 900, 1000]}
    skipped = {"latest-rank0.pt": SAME + names[2]}
    return Expected(names, states(*EPOCHS), facts=facts, skipped=skipped)


# ------------------------------------------------------------------------------------ ultralytics


def _yolo(folder: Path, name: str, weights: State, **facts: Any) -> State:
    """A file with a half-precision module of a class that cannot be imported when it is read."""
    module = types.ModuleType("ultralytics_that_is_not_here")

    class DetectionModel(nn.Module):
        def __init__(self, own: State) -> None:
            super().__init__()
            self.names = {0: "cat"}
            for key, tensor in own.items():
                part, leaf = key.split(".")
                if part not in self._modules:
                    self.add_module(part, nn.Module())
                target = getattr(self, part)
                if leaf in ("weight", "bias"):
                    target.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
                else:
                    target.register_buffer(leaf, tensor)

    DetectionModel.__module__ = module.__name__
    DetectionModel.__qualname__ = "DetectionModel"
    module.DetectionModel = DetectionModel  # type: ignore[attr-defined]
    net = DetectionModel(weights).half()
    sys.modules[module.__name__] = module
    try:
        save({key: net if item == "net" else item for key, item in facts.items()}, folder / name)
    finally:
        del sys.modules[module.__name__]
    return {key: tensor.detach().clone() for key, tensor in net.state_dict().items()}


def _ultralytics(epoch: int, fitness: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "best_fitness": fitness,
        "model": None,
        "ema": "net",
        "updates": 19 * epoch,
        "optimizer": sgd(0.125),
        "train_args": {"task": "classify", "epochs": 12, "lr0": 0.01},
        "train_metrics": {"metrics/accuracy_top1": fitness, "fitness": fitness},
        "train_results": {"epoch": [epoch]},
        "date": "2024-01-01T00:00:00",
        "version": "8.3.0",
        "license": "AGPL-3.0",
    }


@writer("ultralytics", "ultralytics", "ultralytics BaseTrainer.save_model, while it trains")
def ultralytics(folder: Path) -> Expected:
    names = tuple(f"weights/epoch{n}.pt" for n in EPOCHS)
    halves = tuple(
        _yolo(folder, name, state(n), **_ultralytics(n, n / 16))
        for n, name in zip(EPOCHS, names, strict=True)
    )
    for name in ("last", "best"):
        shutil.copy(folder / names[2], folder / f"weights/{name}.pt")
    (folder / "results.csv").write_text("epoch,metrics/accuracy_top1\n8,0.5\n")
    skipped = {f"weights/{name}.pt": SAME + names[2] for name in ("last", "best")}
    metrics = [{"fitness": n / 16, "best_fitness": n / 16} for n in EPOCHS]
    facts = {"epoch": [8, 9, 10], "lr": [0.125] * 3, "metrics": metrics}
    return Expected(names, halves, ema=halves, facts=facts, skipped=skipped)


@writer(
    "ultralytics-done", "ultralytics", "ultralytics.utils.torch_utils.strip_optimizer, at the end"
)
def ultralytics_done(folder: Path) -> Expected:
    """`last` and `best` hold the average under `model`, and epoch -1."""
    found = ultralytics(folder)
    gone = dict.fromkeys(("optimizer", "best_fitness", "ema", "updates"))
    for name, n in (("last", 10), ("best", 9)):
        value = {**_ultralytics(n, n / 16), **gone, "epoch": -1, "model": "net"}
        _yolo(folder, f"weights/{name}.pt", state(n), **value)
    skipped = {"weights/last.pt": SAME + found.names[2], "weights/best.pt": SAME + found.names[1]}
    return Expected(found.names, found.states, facts=found.facts, skipped=skipped)


# --------------------------------------------------------------------- scripts of the SWA authors


@writer("swa-repo", "swa-repo", "timgaripov/swa utils.save_checkpoint, train.py --swa")
def swa_repo(folder: Path) -> Expected:
    def make(epoch: int) -> dict[str, Any]:
        running = mean_of(*states(*range(8, epoch + 1)))
        fresh = {
            "bn.running_mean": torch.zeros(16),
            "bn.running_var": torch.ones(16),
            "bn.num_batches_tracked": torch.tensor(0),
        }
        value = {"epoch": epoch, "state_dict": state(epoch), "swa_n": epoch - 7}
        return {**value, "swa_state_dict": {**running, **fresh}, "optimizer": sgd(0.05)}

    names = _series(folder, "checkpoint-{}.pt", make)
    facts = {"epoch": [8, 9, 10], "lr": [0.05] * 3, "metrics": [{}] * 3}
    return Expected(names, states(*EPOCHS), states(*EPOCHS), facts=facts)


@writer("fge", "torch-dict", "dnn-mode-connectivity utils.save_checkpoint, fge.py")
def fge(folder: Path) -> Expected:
    """Every half cycle: at the lowest rate, then at the highest."""
    rates = {10: 5e-4, 12: 1e-2, 14: 5e-4, 16: 1e-2, 18: 5e-4}

    def make(epoch: int) -> dict[str, Any]:
        own = {"epoch": epoch, "model_state": state(epoch)}
        return {**own, "optimizer_state": sgd(rates[epoch])}

    names = _series(folder, "fge-{}.pt", make, numbers=tuple(rates))
    warning = "2 of 5 snapshots were saved at a high learning rate"
    facts = {"epoch": list(rates), "lr": list(rates.values())}
    return Expected(names, states(*rates), facts=facts, warnings=(warning, "fge-12.pt, fge-16.pt"))


# ----------------------------------------------------------------------------- NeMo, and programs


@writer("nemo", "state-dict", "nemo SaveRestoreConnector.save_to")
def nemo(folder: Path) -> Expected:
    for n in EPOCHS:
        buffer = io.BytesIO()
        torch.save(state(n), buffer)
        with tarfile.open(folder / f"model_{n}.nemo", "w:") as archive:
            for name, data in (
                ("./model_config.yaml", b"target: nemo.Model\n"),
                ("./model_weights.ckpt", buffer.getvalue()),
                ("./0a1b_tokenizer.model", b"\x0a\x0e"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return Expected(tuple(f"model_{n}.nemo" for n in EPOCHS), states(*EPOCHS))


@refused("torchscript", "torch.jit.save (the real one)")
def torchscript(folder: Path) -> Refused:
    for n in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it old
            torch.jit.save(torch.jit.script(nn.Linear(3, 2)), folder / f"scripted_{n}.pt")
    return Refused("TorchScript", "torch.jit.load(path).state_dict()")


@refused("pt2", "torch.export.save (the real one)")
def pt2(folder: Path) -> Refused:
    for n in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),))
            torch.export.save(program, folder / f"program_{n}.pt2")
    return Refused("torch.export", "state_dict")
