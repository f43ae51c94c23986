"""Time and memory of `ensemblekit average` beside other tools, and beside the file work alone.

    python benchmarks/bench_average.py [--sets timm,mergekit,many,memory] [--scale 1.0] [--turns 3]
        [--timm-script avg_checkpoints.py --timm-python PYTHON] [--mergekit MERGEKIT-YAML]
        [--folder FOLDER] [--json FILE]

Needs torch and safetensors beside ensemblekit, and about 20 GB of disk at full scale. A table for
each set, the asked targets beside what was measured, and one JSON line at the end.

timm      Ten float32 zip checkpoints of ResNet-50's shapes (102 MB each), as timm's CheckpointSaver
          lays them out, without an optimizer. Rival: `avg_checkpoints.py` of timm's repository (its
          wheel does not have it), with `--no-sort`, because sorting reads every file once more.
mergekit  Eight snapshots of a Llama-like model in bfloat16, each a Hugging Face folder of three
          shards (1 GB each); a sharded folder comes out. Rival: `mergekit-yaml`, method linear.
many      1,000 safetensors files of 500 tensors of 64 float32 values.
memory    Only ours: 2, 8, 32 snapshots of one size, and 8 snapshots of three sizes; and 8 whose
          convolutions are stored channels last.

Beside them: the script that everybody writes (`naive`), and two floors in plain numpy with as many
threads as ours. Floor 1 reads each input byte once (`preadv`, 1 MB at a time) and writes as many
bytes as our output has. Floor 2 also takes SHA-256 of every input, calls fsync on the output, reads
it back and takes its SHA-256.

How it is measured: whole processes, one at a time, in turns, each turn beginning with another one; the
median of `--turns` runs. The page cache is hot: every input is read once before each run, because
some systems drop what was not used for a few seconds (not in `memory`, which is not about time).
Outputs are removed and written pages flushed before each run, too. Peak is the largest resident set
that the kernel saw (`ru_maxrss` of the process and the children it waited for; 1 MB = 1,000,000
bytes). It counts mapped pages of files, which the kernel could take back; so `anonymous`, read from
/proc every 20 ms, stands beside it. "start-up" is a tool that imports what it needs and does nothing;
ours also reads the descriptions of all tensors (`--dry-run`).
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ensemblekit

TOOL = Path(sys.executable).with_name("ensemblekit")
THREADS = min(4, os.cpu_count() or 1)
OURS = "ensemblekit"
FLOORS = ("floor 1: read, write", "floor 2: + SHA-256, fsync, read back")
MB = 1_000_000
PEAK_MB = 100.0  # asked of every run of ours, plus the largest tensor that is not contiguous

# Starts one process and waits for it. It is small and fresh because a process inherits the peak of
# the one that it was forked from.
WRAPPER = """
import os, sys, threading, time

log, *argv = sys.argv[1:]
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
actions = [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
start = time.perf_counter()
child = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions)
most = 0

def watch():
    global most
    try:
        while True:
            with open(f"/proc/{child}/status") as file:
                for line in file:
                    if line.startswith("RssAnon:"):
                        most = max(most, int(line.split()[1]))
            time.sleep(0.02)
    except OSError:
        pass

threading.Thread(target=watch, daemon=True).start()
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - start
print(os.waitstatus_to_exitcode(status), wall, usage.ru_maxrss, most, *usage[:2])
"""

FLOOR = """
import hashlib, os, threading
import numpy as np

INPUTS = {inputs!r}
OUTPUTS = {outputs!r}
CHECKED = {checked!r}
BLOCK = 1 << 20
lock = threading.Lock()

def read(path, buffer):
    digest = hashlib.sha256()
    file = os.open(path, os.O_RDONLY)
    place = 0
    while got := os.preadv(file, [buffer], place):
        if CHECKED:
            digest.update(buffer[:got])
        place += got
    os.close(file)

def write(path, size, buffer):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for place in range(0, size, BLOCK):
        os.pwrite(file, buffer[: min(BLOCK, size - place)], place)
    os.close(file)

def in_threads(tasks):
    def work():
        buffer = memoryview(np.ones(BLOCK, np.uint8))
        while True:
            with lock:
                if not tasks:
                    return
                call, *values = tasks.pop()
            call(*values, buffer)
    pool = [threading.Thread(target=work) for _ in range({threads})]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()

os.mkdir({folder!r})
in_threads([(write, *output) for output in OUTPUTS] + [(read, path) for path in INPUTS])
if CHECKED:
    for path, _ in OUTPUTS:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    in_threads([(read, path) for path, _ in OUTPUTS])
"""

NAIVE_TORCH = """
import sys
from pathlib import Path
import torch

paths = sorted(Path(sys.argv[1]).glob("*.pth.tar"))
states = [torch.load(p, map_location="cpu", weights_only=True)["state_dict"] for p in paths]
average = {}
for key, first in states[0].items():
    total = first.float()
    for state in states[1:]:
        total = total + state[key].float()
    average[key] = (total / len(states)).to(first.dtype)
torch.save({"state_dict": average}, sys.argv[2])
"""

# Files of one folder, or folders of shards; one snapshot at a time.
NAIVE_SAFETENSORS = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file

source, target = Path(sys.argv[1]), Path(sys.argv[2])
snapshots = sorted(source.iterdir())
total, files, dtypes = {}, {}, {}
for snapshot in snapshots:
    for path in sorted(snapshot.glob("*.safetensors")) if snapshot.is_dir() else [snapshot]:
        for key, value in load_file(path).items():
            if key in total:
                total[key] += value.float()
            else:
                total[key] = value.float()
                files[key], dtypes[key] = path.name, value.dtype
average = {key: (value / len(snapshots)).to(dtypes[key]) for key, value in total.items()}
target.mkdir()
for name in sorted(set(files.values())):
    save_file({k: v for k, v in average.items() if files[k] == name}, target / name)
"""


@dataclass
class Contender:
    """A command line, and what it writes."""

    name: str
    argv: list[str]
    output: Path | None = None
    script: str | None = None  # goes into a file, whose path takes the place of "SCRIPT"


class Run(NamedTuple):
    """What one run took."""

    wall_s: float
    user_s: float
    system_s: float
    peak_mb: float
    anonymous_mb: float


@dataclass
class Row:
    """What the runs of one contender gave."""

    runs: list[Run] = field(default_factory=list)

    def median(self) -> Run:
        """Of each figure by itself."""
        return Run(*(statistics.median(values) for values in zip(*self.runs, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """Medians and all runs."""
        found: dict[str, Any] = {k: round(v, 4) for k, v in self.median()._asdict().items()}
        for name in ("wall_s", "peak_mb"):
            found[f"{name}_runs"] = [round(getattr(run, name), 4) for run in self.runs]
        return found


@dataclass
class Bench:
    """Where files lie, what was asked for, and what was found so far."""

    folder: Path
    options: argparse.Namespace
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    absent: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)

    def data(self, name: str) -> Path:
        """Folder of one generated set."""
        return self.folder / f"{name}_{self.options.scale:g}"

    def out(self, name: str) -> Path:
        """Path of an output; nothing lies there."""
        path = self.folder / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)
        return path

    def shown(self, contender: Contender) -> list[str]:
        """The command line without the place where the files lie."""
        return [Path(part).name if os.sep in part else part for part in contender.argv]

    def run(self, contender: Contender) -> Run:
        """One run, which must succeed."""
        if contender.output is not None:
            remove(contender.output)
        argv = list(contender.argv)
        if contender.script is not None:
            script = self.folder / "script.py"
            script.write_text(contender.script, encoding="utf-8")
            argv = [str(script) if part == "SCRIPT" else part for part in argv]
        log = self.folder / "log.txt"
        os.sync()
        line = [sys.executable, "-I", "-S", "-c", WRAPPER, str(log), *argv]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(  # noqa: S603
            line, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        fields = done.stdout.split()
        if done.returncode or fields[0] != "0":
            said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            sys.exit(f"{contender.name} failed: {' '.join(argv[:6])} ...\n{done.stderr}{said}")
        unit = 1 if sys.platform == "darwin" else 1024
        wall_s, user_s, system_s = (float(fields[n]) for n in (1, 4, 5))
        return Run(wall_s, user_s, system_s, int(fields[2]) * unit / MB, int(fields[3]) * 1024 / MB)

    def measure(self, name: str, inputs: list[Path], contenders: list[Contender]) -> dict[str, Row]:
        """All of them in turns, with the inputs in the page cache."""
        rows = self.rows.setdefault(name, {})
        for turn in range(self.options.turns):
            first = turn % len(contenders)  # nobody always runs behind the same one
            for contender in contenders[first:] + contenders[:first]:
                read_once(inputs)
                run = self.run(contender)
                rows.setdefault(contender.name, Row()).runs.append(run)
                took = f"{run.wall_s:.2f} s, {run.peak_mb:.0f} MB"
                note(f"{name}, turn {turn + 1}: {contender.name}: {took}")
        return rows

    def floors(self, inputs: list[Path], output: Path) -> list[Contender]:
        """The two floors for these inputs and an output as large as this one."""
        files = sorted(output.iterdir()) if output.is_dir() else [output]
        sizes = [file.stat().st_size for file in files if file.suffix != ".json"]
        target = self.out("floor")  # a folder
        contenders = []
        for name, checked in zip(FLOORS, (False, True), strict=True):
            script = FLOOR.format(
                inputs=[str(path) for path in inputs],
                folder=str(target),
                outputs=[(str(target / str(n)), size) for n, size in enumerate(sizes)],
                checked=checked,
                threads=THREADS,
            )
            contenders.append(Contender(name, [sys.executable, "SCRIPT"], target, script))
        return contenders

    def target(self, name: str, asked: float, measured: float | None, unit: str = "x") -> None:
        """A limit that was asked for, beside what was found (None: not measured)."""
        passed = None if measured is None else measured <= asked
        found = None if measured is None else round(measured, 4)
        self.targets.append(
            {"target": name, "asked": asked, "measured": found, "unit": unit, "passed": passed}
        )

    def target_peak(self, name: str, row: Row, extra_bytes: int = 0) -> None:
        """The limit of memory, plus the largest tensor not contiguous; the worst run counts."""
        label = f"{name}: peak memory"
        self.target(label, PEAK_MB + extra_bytes / MB, max(run.peak_mb for run in row.runs), "MB")


def note(text: str) -> None:
    """Progress, to stderr."""
    sys.stderr.write(text + "\n")


def remove(path: Path) -> None:
    """A file or a folder, and the manifest beside it."""
    if path.is_dir():
        shutil.rmtree(path)
    for file in (path, path.with_name(path.name + ".json")):
        file.unlink(missing_ok=True)


def read_once(paths: list[Path]) -> None:
    """Into the page cache."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


@contextlib.contextmanager
def fresh(folder: Path, made_of: dict[str, Any]) -> Iterator[bool]:
    """Whether files have to be made; a folder that holds what is wanted is used again."""
    marker = folder.with_name(folder.name + ".done")
    text = json.dumps(made_of)
    if marker.exists() and marker.read_text(encoding="utf-8") == text:
        yield False
        return
    remove(folder)
    marker.unlink(missing_ok=True)
    folder.mkdir(parents=True)
    note(f"writing {folder.name}")
    yield True
    marker.write_text(text, encoding="utf-8")


# Shapes, and files of them


def resnet50(scale: float) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of ResNet-50's state dict; parameters grow with `scale`."""
    width = max(4, round(64 * math.sqrt(scale)))
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, inside: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, inside, kernel, kernel)

    def norm(name: str, channels: int) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{key}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", width, 3, 7)
    norm("bn1", width)
    inside = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle = width << stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            for n, (o, i, k) in enumerate(
                ((middle, inside, 1), (middle, middle, 3), (4 * middle, middle, 1)), 1
            ):
                conv(f"{name}.conv{n}", o, i, k)
                norm(f"{name}.bn{n}", o)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * middle, inside, 1)
                norm(f"{name}.downsample.1", 4 * middle)
            inside = 4 * middle
    shapes["fc.weight"] = (1000, inside)
    shapes["fc.bias"] = (1000,)
    return shapes


def resnet_files(
    folder: Path, scale: float, count: int, *, channels_last: bool = False
) -> list[Path]:
    """`count` neighbours, as snapshots of one run are."""
    paths = [folder / f"checkpoint-{n}.pth.tar" for n in range(count)]
    made_of = {"shapes": "resnet50", "scale": scale, "count": count, "last": channels_last}
    with fresh(folder, made_of) as wanted:
        if not wanted:
            return paths
        generator = torch.Generator().manual_seed(0)
        shapes = resnet50(scale)
        first = {
            key: torch.randn(shape, generator=generator) * 0.05
            for key, shape in shapes.items()
            if not key.endswith("num_batches_tracked")
        }
        for n, path in enumerate(paths):
            state: dict[str, torch.Tensor] = {}
            for key in shapes:
                if key.endswith("num_batches_tracked"):
                    state[key] = torch.tensor(1000 * (n + 1))
                    continue
                value = first[key] + 0.01 * torch.randn(first[key].shape, generator=generator)
                if key.endswith("running_var"):
                    value = value.abs() + 0.5
                if channels_last and value.dim() == 4:
                    value = value.contiguous(memory_format=torch.channels_last)
                state[key] = value
            saved = {"epoch": n, "arch": "resnet50", "version": 2, "state_dict": state}
            torch.save({**saved, "metric": 70 + n / 10}, path)
    return paths


def llama(scale: float) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Configuration and shapes of a model of about 0.5 billion parameters times `scale`."""
    heads = max(2, round(16 * math.sqrt(scale)))
    hidden, inner, layers = 64 * heads, 176 * heads, 34
    words = max(1000, round(32_000 * math.sqrt(scale)))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": words,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part in "qkvo":
            shapes[f"{name}.self_attn.{part}_proj.weight"] = (hidden, hidden)
        shapes[f"{name}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{name}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (words, hidden)
    return config, shapes


def llama_folders(folder: Path, scale: float, count: int) -> tuple[list[Path], int]:
    """Snapshots, each a folder of three shards; and the bytes of a shard."""
    config, shapes = llama(scale)
    nbytes = {key: 2 * math.prod(shape) for key, shape in shapes.items()}
    shard_bytes = math.ceil(0.4 * sum(nbytes.values()))
    shards: list[list[str]] = [[]]
    for key in shapes:
        if shards[-1] and sum(nbytes[k] for k in shards[-1]) + nbytes[key] > shard_bytes:
            shards.append([])
        shards[-1].append(key)
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    paths = [folder / f"checkpoint-{100 * (n + 1)}" for n in range(count)]
    with fresh(folder, {"shapes": "llama", "scale": scale, "count": count}) as wanted:
        if not wanted:
            return paths, shard_bytes
        generator = torch.Generator().manual_seed(0)
        first = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for path in paths:
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            where: dict[str, str] = {}
            for name, keys in zip(names, shards, strict=True):
                state = {}
                for key in keys:
                    noise = torch.randn(first[key].shape, generator=generator)
                    state[key] = noise.mul_(0.1).add_(first[key]).mul_(0.02).bfloat16()
                save_file(state, path / name, metadata={"format": "pt"})
                where |= dict.fromkeys(keys, name)
            index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": where}
            text = json.dumps(index, indent=2)
            (path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return paths, shard_bytes


def small_files(folder: Path, count: int) -> list[Path]:
    """Many files of many small tensors."""
    paths = [folder / f"step_{n:05}.safetensors" for n in range(count)]
    with fresh(folder, {"shapes": "500 x 64", "count": count}) as wanted:
        if wanted:
            generator = torch.Generator().manual_seed(0)
            first = torch.randn(500, 64, generator=generator)
            for path in paths:
                values = first + 0.1 * torch.randn(500, 64, generator=generator)
                save_file({f"layer.{n}.weight": values[n].clone() for n in range(500)}, path)
    return paths


# Comparing weights


class Weights:
    """Tensors of a checkpoint, a safetensors file or a folder of them, one at a time."""

    def __init__(self, path: Path) -> None:
        self.own: dict[str, torch.Tensor] = {}
        self.files: dict[str, Path] = {}
        if path.is_dir() or path.suffix == ".safetensors":
            for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
                with safe_open(file, "pt") as opened:
                    self.files |= dict.fromkeys(opened.keys(), file)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.own = loaded.get("state_dict", loaded)
        self.names = sorted(self.own or self.files)

    def __getitem__(self, key: str) -> torch.Tensor:
        if self.own:
            return self.own[key]
        with safe_open(self.files[key], "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(key)
            return tensor


def ulps(one: torch.Tensor, other: torch.Tensor) -> int:
    """The largest distance in steps of the element type (float32, bfloat16)."""

    def place(value: torch.Tensor) -> torch.Tensor:
        bits, least = {4: (torch.int32, -(2**31)), 2: (torch.int16, -(2**15))}[value.itemsize]
        number = value.contiguous().view(bits).long()
        return torch.where(number < 0, least - number, number)

    return int((place(one) - place(other)).abs().max()) if one.numel() else 0


def difference(ours: Path, theirs: Path) -> dict[str, Any]:
    """All floating-point tensors that both hold in one element type."""
    one, other = Weights(ours), Weights(theirs)
    assert one.names == other.names
    worst, unequal, values, largest = 0, 0, 0, 0.0
    for key in one.names:
        a, b = one[key], other[key]
        if a.dtype == b.dtype and a.is_floating_point():
            worst = max(worst, ulps(a, b))
            unequal += int((a != b).sum())
            largest = max(largest, float((a.float() - b.float()).abs().max()))
            values += a.numel()
    share = unequal / values
    return {"max_ulps": worst, "max": largest, "unequal_share": share, "values": values}


def check(inputs: list[Path], output: Path, name: str) -> int:
    """Largest error of ours in ulps, on some tensors, beside the mean in float64."""
    result, sources = Weights(output), [Weights(path) for path in inputs]
    keys = [key for key in result.names if result[key].is_floating_point()]
    worst = 0
    for key in keys[:: max(1, len(keys) // 6)]:
        mean = torch.zeros(result[key].shape, dtype=torch.float64)
        for source in sources:
            mean += source[key].double()
        worst = max(worst, ulps(result[key], (mean / len(sources)).to(result[key].dtype)))
    if worst > 1:
        sys.exit(f"{name}: our result is {worst} ulps away from the mean in float64")
    return worst


def start_up(own: Contender) -> Contender:
    """All that our command line does before it looks at weights."""
    return Contender(f"{OURS}: start-up", [*own.argv, "--dry-run"])


def ours(source: Path | list[Path], output: Path, *more: str, name: str = OURS) -> Contender:
    """Our command line."""
    paths = [str(path) for path in ([source] if isinstance(source, Path) else source)]
    line = [str(TOOL), "-q", "average", *paths, "-o", str(output)]
    return Contender(name, [*line, "--force", "--bn", "average", *more], output)


# The sets


def timm_set(bench: Bench) -> None:
    """Ten checkpoints of a ResNet-50."""
    data, options = bench.data("timm"), bench.options
    inputs = resnet_files(data, options.scale, 10)
    script, python = options.timm_script, options.timm_python
    plain = script is None or "--safetensors" in script.read_text(encoding="utf-8")
    ending = ".safetensors" if plain else ".pth"  # an early version of the script knows no other
    out = bench.out("timm_ours" + ending)
    own = ours(data, out)
    bench.run(own)
    contenders = [own, start_up(own)]
    rival, flags = "timm avg_checkpoints.py", ["--no-sort", *(["--safetensors"] if plain else [])]
    if script is not None and python is not None:
        theirs = bench.out("timm_theirs" + ending)
        line = [str(python), str(script), "--input", str(data), "--output", str(theirs)]
        line += flags
        idle = [str(python), "-c", "import torch, timm.models, safetensors.torch"]
        contenders += [Contender(rival, line, theirs), Contender("timm: start-up", idle)]
    else:
        bench.absent["timm"] = [rival]
    simple = bench.out("timm_naive.pth")
    line = [sys.executable, "SCRIPT", str(data), str(simple)]
    contenders += [Contender("naive: torch.load all", line, simple, NAIVE_TORCH)]
    contenders += bench.floors(inputs, out)
    rows = bench.measure("timm", inputs, contenders)
    facts = bench.facts["timm"] = {
        "inputs": len(inputs),
        "input_bytes": sum(path.stat().st_size for path in inputs),
        "tensors": len(resnet50(options.scale)),
        "command": bench.shown(own),
        "ulps_from_float64_mean": check(inputs, out, "timm"),
        "naive_difference": difference(out, simple),
    }
    wall, memory = None, None
    if rival in rows:
        facts["rival_difference"] = difference(out, bench.folder / "out" / f"timm_theirs{ending}")
        facts["rival_flags"] = flags
        wall, memory = ratios(rows[OURS], rows[rival])
    bench.target("timm: time over avg_checkpoints.py", 0.15, wall)
    bench.target("timm: peak memory over avg_checkpoints.py", 0.05, memory)
    bench.target_peak("timm", rows[OURS])


def mergekit_set(bench: Bench) -> None:
    """Eight folders of a language model."""
    data, options = bench.data("mergekit"), bench.options
    folders, shard_bytes = llama_folders(data, options.scale, 8)
    inputs = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    out = bench.out("mergekit_ours")
    own = ours(data, out, "--max-shard-size", str(shard_bytes))
    bench.run(own)
    contenders = [own, start_up(own)]
    rival, theirs = "mergekit-yaml linear", bench.out("mergekit_theirs")
    flags: list[str] = []
    if options.mergekit is not None:
        config = {
            "merge_method": "linear",
            "models": [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders],
            "dtype": "bfloat16",
        }
        recipe = bench.folder / "mergekit.yaml"
        recipe.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        flags = ["--no-cuda", "--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card"]
        flags += ["--quiet", "--out-shard-size", str(shard_bytes)]
        flags += options.mergekit_flags.split()
        line = [str(options.mergekit), str(recipe), str(theirs), *flags]
        idle = [str(options.mergekit), "--help"]
        contenders += [Contender(rival, line, theirs), Contender("mergekit: start-up", idle)]
    else:
        bench.absent["mergekit"] = [rival]
    simple = bench.out("mergekit_naive")
    line = [sys.executable, "SCRIPT", str(data), str(simple)]
    contenders += [Contender("naive: load_file each", line, simple, NAIVE_SAFETENSORS)]
    contenders += bench.floors(inputs, out)
    rows = bench.measure("mergekit", inputs, contenders)
    facts = bench.facts["mergekit"] = {
        "inputs": len(folders),
        "input_bytes": sum(path.stat().st_size for path in inputs),
        "tensors": len(llama(options.scale)[1]),
        "shards": len(list(out.glob("*.safetensors"))),
        "command": bench.shown(own),
        "ulps_from_float64_mean": check(folders, out, "mergekit"),
        "naive_difference": difference(out, simple),
    }
    wall, memory = None, None
    if rival in rows:
        facts["rival_difference"] = difference(out, theirs)
        facts["rival_flags"] = flags
        wall, memory = ratios(rows[OURS], rows[rival])
    bench.target("mergekit: time over mergekit-yaml", 0.25, wall)
    bench.target("mergekit: peak memory over mergekit-yaml", 0.03, memory)
    bench.target("mergekit: time over floor 2", 1.6, ratios(rows[OURS], rows[FLOORS[1]])[0])
    bench.target_peak("mergekit", rows[OURS])


def many_set(bench: Bench) -> None:
    """A thousand small snapshots."""
    data = bench.data("many")
    inputs = small_files(data, max(20, round(1000 * bench.options.scale)))
    out, simple = bench.out("many_ours.safetensors"), bench.out("many_naive")
    own = ours(data, out)
    bench.run(own)
    line = [sys.executable, "SCRIPT", str(data), str(simple)]
    naive = Contender("naive: load_file each", line, simple, NAIVE_SAFETENSORS)
    rows = bench.measure("many", inputs, [own, naive, *bench.floors(inputs, out)])
    bench.facts["many"] = {
        "inputs": len(inputs),
        "input_bytes": sum(path.stat().st_size for path in inputs),
        "tensors": 500,
        "command": bench.shown(own),
        "ulps_from_float64_mean": check(inputs, out, "many"),
        "naive_difference": difference(out, simple),
    }
    bench.target_peak("many", rows[OURS])


def memory_set(bench: Bench) -> None:
    """What the peak grows with."""
    scale = bench.options.scale
    data = bench.data("memory")
    middle = resnet_files(data / "middle", scale, 32)
    small = resnet_files(data / "small", scale / 4, 8)
    large = resnet_files(data / "large", scale * 4, 8)
    last = resnet_files(data / "channels_last", scale, 8, channels_last=True)
    cases = [middle[:2], middle[:8], middle, small, large, last]
    contenders: list[Contender] = []
    for inputs in cases:
        size = inputs[0].stat().st_size / MB
        name = f"{len(inputs)} x {size:.3g} MB" + (", channels last" * (inputs is last))
        out = bench.out(f"memory_{len(contenders)}.safetensors")
        contenders.append(ours(inputs, out, name=name))
    rows = bench.measure("memory", [], contenders)
    bench.facts["memory"] = {}
    for contender, inputs in zip(contenders, cases, strict=True):
        assert contender.output is not None
        found = check(inputs, contender.output, contender.name)
        bench.facts["memory"][contender.name] = {"ulps_from_float64_mean": found}
        shapes = [shape for shape in resnet50(scale).values() if len(shape) == 4]
        extra = 4 * max(map(math.prod, shapes)) if inputs is last else 0
        bench.target_peak(f"memory, {contender.name}", rows[contender.name], extra)


SETS = {"timm": timm_set, "mergekit": mergekit_set, "many": many_set, "memory": memory_set}


# Output


def ratios(one: Row, other: Row) -> tuple[float, float]:
    """Time and peak memory of one over those of another."""
    mine, theirs = one.median(), other.median()
    return mine.wall_s / theirs.wall_s, mine.peak_mb / theirs.peak_mb


def show(bench: Bench) -> None:
    """Tables, then targets."""
    for name, rows in bench.rows.items():
        base = rows.get(OURS, next(iter(rows.values()))).median()
        heads = f"{'seconds':>9}{'ratio':>8}{'user':>8}{'system':>8}"
        print(f"\n{name:38}{heads}{'peak MB':>10}{'ratio':>8}{'anonymous':>11}")  # noqa: T201
        for label, row in rows.items():
            run = row.median()
            time = f"{run.wall_s:9.3f}{run.wall_s / base.wall_s:8.2f}"
            time += f"{run.user_s:8.2f}{run.system_s:8.2f}"
            memory = f"{run.peak_mb:10.1f}{run.peak_mb / base.peak_mb:8.2f}"
            memory += f"{run.anonymous_mb:11.1f}"
            print(f"{label:38}{time}{memory}")  # noqa: T201
        for label in bench.absent.get(name, []):
            print(f"{label:38}  not measured")  # noqa: T201
        facts = bench.facts[name]
        for key, words in (("rival_difference", "rival"), ("naive_difference", "naive")):
            if key in facts:
                found = facts[key]
                most = f"{found['max_ulps']} ulps or {found['max']:.2g} at most"
                print(f"  ours and {words} differ in {found['unequal_share']:.2%}, by {most}")  # noqa: T201
        if "rival_flags" in facts:
            print(f"  rival's flags: {' '.join(facts['rival_flags'])}")  # noqa: T201
    if bench.options.scale != 1:
        print("\nThe targets are meant for --scale 1.")  # noqa: T201
    print(f"\n{'target':66}{'asked':>10}{'measured':>10}")  # noqa: T201
    for one in bench.targets:
        verdict = {None: "not measured", True: "yes", False: "NO"}[one["passed"]]
        found = "" if one["measured"] is None else f"{one['measured']:.3g}"
        print(f"{one['target']:66}{one['asked']:7.4g} {one['unit']:2}{found:>10}  {verdict}")  # noqa: T201


def processor() -> str:
    """Model of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(python: Path, packages: str) -> dict[str, str | None]:
    """What a rival's environment holds."""
    code = """
import importlib.metadata as m, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1].split():
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
    line = [str(python), "-c", code, packages]
    done = subprocess.run(line, capture_output=True, text=True, check=True)  # noqa: S603
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def report(bench: Bench) -> dict[str, Any]:
    """The JSON line."""
    options = bench.options
    peers = {}
    if options.timm_python is not None:
        peers["timm"] = versions(options.timm_python, "timm torch safetensors numpy")
    if options.mergekit is not None:
        python = options.mergekit.with_name("python")
        peers["mergekit"] = versions(python, "mergekit torch transformers safetensors numpy")
    return {
        "benchmark": "bench_average",
        "scale": options.scale,
        "turns": options.turns,
        "page_cache": "hot",
        "threads": THREADS,
        "sets": {
            name: {
                "rows": {label: row.to_json() for label, row in rows.items()},
                "not_measured": bench.absent.get(name, []),
                "facts": bench.facts[name],
            }
            for name, rows in bench.rows.items()
        },
        "targets": bench.targets,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "system": f"{sys.platform} {platform.release()}",
        },
        "versions": {
            "ensemblekit": ensemblekit.__version__,
            "python": platform.python_version(),
            **{
                name: importlib.metadata.version(name) for name in ("numpy", "torch", "safetensors")
            },
        },
        "rivals": peers,
    }


def place(text: str) -> Path:
    """An absolute path. Links stay: the Python of a virtual environment is one."""
    return Path(os.path.abspath(text))  # noqa: PTH100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", default=",".join(SETS), help="which, with commas")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of parameters")
    parser.add_argument("--turns", type=int, default=3, help="runs of each")
    parser.add_argument("--timm-script", type=place, help="avg_checkpoints.py of timm's repository")
    parser.add_argument("--timm-python", type=place, help="a Python that has timm")
    parser.add_argument("--mergekit", type=place, help="mergekit-yaml in its environment")
    parser.add_argument("--mergekit-flags", default="", help="more flags of it, in one word")
    parser.add_argument("--folder", type=place, help="keep generated files here, for the next time")
    parser.add_argument("--json", type=place, help="write the JSON line here too")
    options = parser.parse_args()
    sets = options.sets.split(",")
    if unknown := set(sets) - set(SETS):
        parser.error(f"no such set: {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    if not TOOL.exists():
        parser.error(f"{TOOL} is missing: install ensemblekit into this environment")
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, options)
        try:
            for name in sets:
                SETS[name](bench)
                if options.folder is None:  # room for the next one
                    remove(bench.data(name))
        finally:
            remove(folder / "out")
        line = json.dumps(report(bench))
        show(bench)
        print(line)  # noqa: T201
        if options.json is not None:
            options.json.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
