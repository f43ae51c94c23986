"""Processes of a real torchrun: the figures of one process, one result, and an end when one dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F

import ensemblekit
from ensemblekit import ModelOptions
from ensemblekit.commands.compare import CompareOptions, compare
from ensemblekit.commands.report_folder import read_statistics
from ensemblekit.distributed import World, rank, world
from ensemblekit.targets import _file, parse
from tests import helpers

torch.set_num_threads(1)

LONGEST_S = 30  # that a run may go on without one of its processes
# 300 samples: 5 batches of 64, 7 of 43, 9 of 37, or one of 512
CODE = '''
import os
import time
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

RANK = os.environ.get("RANK", "0")


def make(width=4):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(1, width, 3, bias=False), bn1=nn.BatchNorm2d(width), act=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(2), flat=nn.Flatten(), drop=nn.Dropout(0.3),
        fc1=nn.Linear(4 * width, 8), bn2=nn.BatchNorm1d(8), fc2=nn.Linear(8, 3)))


def other():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


def data(split):
    own = torch.Generator().manual_seed(["train", "val", "test"].index(split))
    centres = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, 3, (300,), generator=own)
    return centres[y] + 1.5 * torch.randn(300, 1, 6, 6, generator=own), y


def listed(split):
    x, y = data(split)
    return list(zip(x.split(43), y.split(43)))


def stream(split):
    x, y = data(split)
    yield from zip(x.split(37), y.split(37))


def in_order(split):
    x, y = data(split)
    order = y.argsort()
    return list(zip(x[order].split(150), y[order].split(150)))


def own_order(split):
    """Shuffled with a seed of each process."""
    x, y = data(split)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(int(RANK)))
    return x[order], y[order]


def own_labels(split):
    x, y = data(split)
    return x, (y + int(RANK)) % 3


def own_share(split):
    """A part of the data in each process, with the same first batch."""
    x, y = data(split)
    return x[: 300 - int(RANK)], y[: 300 - int(RANK)]


def note(pid):
    """Tell whoever waits for it that this process is in the middle of a pass."""
    Path(os.environ["NOTES"], RANK).write_text(str(pid))


def slow(split):
    x, y = data(split)
    for n, batch in enumerate(zip(x.split(4), y.split(4))):
        if n == 3:
            note(os.getpid())
        time.sleep(0.3)
        yield batch


class SlowSet(torch.utils.data.Dataset):
    """Loaded by workers, which must end as well."""

    def __init__(self, split):
        self.x, self.y = data(split)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in (40, 44):  # one in a batch of each process
            note(os.getppid())
        time.sleep(0.05)
        return self.x[index], self.y[index]


class Uneven(SlowSet):
    """One process is slow, and alive."""

    def __getitem__(self, index):
        time.sleep(0.035 if RANK == "1" else 0)
        return self.x[index], self.y[index]


def raises_once(split):
    for n, batch in enumerate(stream(split)):
        if n == 2 and RANK == "1":
            raise ValueError("no more data")
        yield batch


def hangs_once(split):
    for n, batch in enumerate(stream(split)):
        if n == 2 and RANK == "1":
            time.sleep(600)
        yield batch
'''
# What no option sets, for tests that would have to wait or to fill the memory.
DRIVER = """
import os
import time
from datetime import timedelta

from ensemblekit import distributed, snapshots, workbench
from ensemblekit.cli.main import main

if "PATIENCE" in os.environ:
    distributed.PATIENCE = timedelta(seconds=float(os.environ["PATIENCE"]))
if "ROOM" in os.environ:
    room = int(os.environ["ROOM"].split(",")[int(os.environ["RANK"])])
    workbench._free_memory = lambda device: room
if "HASHING" in os.environ:
    quick = snapshots.Snapshot.digest

    def digest(self):
        time.sleep(float(os.environ["HASHING"]))
        return quick(self)

    snapshots.Snapshot.digest = digest
main()
"""

# Several commands one after the other: a torchrun takes its time. The processes may be connected
# already, as they are in a training script.
SCRIPT = """
import contextlib
import json
import os
import sys
import time
from pathlib import Path

from torch import distributed

from ensemblekit.cli.main import run

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
for name, args in json.loads((folder / "commands.json").read_text()).items():
    if "CONNECTED" in os.environ:
        store = distributed.FileStore(str(folder / f"{name}.store"), 2)
        distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
    with (folder / f"{name}.{rank}.out").open("w") as out, contextlib.redirect_stdout(out):
        code = run(args)
    (folder / f"{name}.{rank}.code").write_text(str(code))
    if code:
        os._exit(code)
    if "CONNECTED" in os.environ:
        (folder / f"{name}.{rank}.connected").write_text(str(distributed.is_initialized()))
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
    elif rank == "0":
        time.sleep(float(os.environ["PAUSE"]))  # the other one is early
"""


@dataclass(frozen=True)
class Project:
    """A folder with the code of a network, its snapshots, and nothing else."""

    folder: Path

    def target(self, name: str) -> str:
        return f"{self.folder / 'net.py'}:{name}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "ckpts"

    def flags(
        self, data: str, *, train: str | None = "same", model: str = "make", batch: int = 64
    ) -> list[str]:
        """The options of a command: both labelled splits, and training data unless it is None."""
        found = ["--model", self.target(model), "--device", "cpu", "--batch-size", str(batch)]
        found += ["--val-data", self.target(data), "--test-data", self.target(data)]
        if train is not None:
            found += ["--train-data", self.target(data if train == "same" else train)]
        return found

    def options(self, data: str, *, train: str | None = "same", batch: int = 64) -> ModelOptions:
        """What `flags` says, for one process: this one."""
        trained = None if train is None else self.target(data if train == "same" else train)
        return ModelOptions(
            model=self.target("make"),
            train_data=trained,
            val_data=self.target(data),
            test_data=self.target(data),
            batch_size=batch,
            device="cpu",
        )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    found = Project(tmp_path_factory.mktemp("project"))
    (found.folder / "net.py").write_text(CODE)
    found.checkpoints.mkdir()
    before = [*sys.path]
    net = _file(parse(found.target("make")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = net.make(), net.data("train")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(6):
            for rows in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            if epoch > 1:
                state = {"step": epoch, "state_dict": model.state_dict()}
                torch.save(state, found.checkpoints / f"snap_{epoch}.pt")
    yield found
    sys.path[:] = before


# ------------------------------------------------------------------------------- torchrun


@dataclass(frozen=True)
class Ran:
    """How a run ended, and what it said."""

    code: int
    out: str
    err: str


class Torchrun:
    """A torchrun that was started; whatever it leaves running ends with the test."""

    def __init__(
        self, *args: object, cwd: Path, processes: int = 2, driver: Path | None = None, **env: str
    ) -> None:
        self.marker = f"TORCHRUN_OF_A_TEST={uuid.uuid4().hex}"
        name, _, value = self.marker.partition("=")
        program = ["-m", "ensemblekit"] if driver is None else [str(driver)]
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line += ["--nproc-per-node", str(processes), *program, *map(str, args)]
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            line,
            cwd=cwd,
            env=helpers.environment(OMP_NUM_THREADS="1", **env, **{name: value}),
            stdin=subprocess.DEVNULL,
            stdout=self.out,
            stderr=self.err,
        )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.out.close()
        self.err.close()

    def end(self, timeout_s: float = 60) -> Ran:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"still running after {timeout_s} s:\n{self._said(self.err)}")
        return Ran(code, self._said(self.out), self._said(self.err))

    def running(self) -> list[int]:
        """Its processes, by the variable that all of them inherit."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.marker.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def kill(self) -> None:
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @staticmethod
    def _said(file: Any) -> str:
        file.seek(0)
        text: str = file.read().decode()
        return text


def torchrun(*args: object, cwd: Path, **options: Any) -> Ran:
    with Torchrun(*args, cwd=cwd, **options) as started:
        return started.end()


def sound(done: Ran) -> Ran:
    """A run that went well on all processes."""
    assert done.code == 0, done.err
    assert "Traceback" not in done.err, done.err
    return done


def one_object(text: str) -> dict[str, Any]:
    """The one JSON object that stdout is."""
    found: dict[str, Any] = json.loads(text)
    assert text.count("\n") == 1
    assert found["schema_version"] == 1
    return found


def assert_failed(done: Ran) -> None:
    """It failed with words: torchrun shows a traceback of its own, never one of ours."""
    assert done.code != 0
    assert "error: " in done.err
    assert "bug in ensemblekit" not in done.err, done.err
    ours = f'File "{helpers.ROOT / "ensemblekit"}'
    assert ours not in done.err, done.err


def assert_nothing_written(folder: Path) -> None:
    left = [path.name for path in folder.iterdir()]
    assert [name for name in left if name not in ("cache", "__pycache__")] == []


# ----------------------------------------------------------------------- the same figures

FEW = "singles,last-2*,*-soup*"
COMPARED: dict[str, tuple[str, int]] = {  # data, batch size; besides map-style data of 5 batches
    "iterable": ("listed", 64),
    "generator": ("stream", 64),
    "one-batch": ("data", 512),  # fewer than there are processes
}


@pytest.fixture(scope="module")
def map_style(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """`compare --json` of two processes: its folder, in it `two` and `cache`."""
    work = tmp_path_factory.mktemp("map-style")
    args = ["compare", project.checkpoints, "-o", "two", "--cache-dir", "cache", "--json"]
    return work, sound(torchrun(*args, *project.flags("data"), cwd=work))


def in_a_row(commands: dict[str, list[object]], work: Path, told: Path, **env: str) -> None:
    """Run all of them in one torchrun of two; what each prints is put into `told`."""
    (told / "script.py").write_text(SCRIPT)
    plain = {name: [str(word) for word in args] for name, args in commands.items()}
    (told / "commands.json").write_text(json.dumps(plain))
    done = sound(torchrun(told, cwd=work, driver=told / "script.py", **env))
    assert done.out == ""
    codes = {path.name: path.read_text() for path in told.glob("*.code")}
    assert codes == {f"{name}.{place}.code": "0" for name in commands for place in (0, 1)}, done.err


@pytest.fixture(scope="module")
def script(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Commands that two processes ran in a row: where they worked, and what each printed."""
    work, told = tmp_path_factory.mktemp("script"), tmp_path_factory.mktemp("told")
    commands: dict[str, list[object]] = {}
    shared = ["--cache-dir", "cache", "--candidates", FEW]
    for name, (data, batch) in COMPARED.items():
        flags = [*shared, *project.flags(data, batch=batch)]
        commands[name] = ["compare", project.checkpoints, "-o", name, "--json", *flags]
    for train in ("data", "in_order"):
        args = ["average", project.checkpoints, "-o", f"{train}.safetensors", "--bn", "recompute"]
        commands[f"average-{train}"] = [*args, "--json", *project.flags("data", train=train)]
    ours = ["compare", project.checkpoints, "-o", "reused", *shared]
    flags = project.flags("data", batch=100)
    ours[ours.index("cache")] = "cache-of-one"
    commands["reused"] = [*ours, *flags]
    commands["again"] = [*ours, *flags]
    compare(
        project.checkpoints,
        work / "one",
        model=project.options("data", batch=100),
        options=CompareOptions(candidates=FEW, cache_dir=work / "cache-of-one"),
    )
    in_a_row(commands, work, told, CONNECTED="1")
    return work, told


def alone(project: Project, data: str, batch: int = 64, **options: Any) -> dict[str, Any]:
    """What one process finds: this one."""
    result = compare(
        project.checkpoints,
        options.pop("output", None),
        model=project.options(data, batch=batch),
        options=CompareOptions(**{"cache_bytes": 0} | options),
    )
    assert result is not None
    return result.comparison


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    return found


def assert_same_rows(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for a, b in zip(one, two, strict=True):
        for key in ("kind", "members", "snapshots", "combiner", "batch_norm", "chosen_on"):
            assert a[key] == b[key], (a["name"], key)
        for x, y in zip(a["evaluations"], b["evaluations"], strict=True):
            assert (x["split"], x["samples"]) == (y["split"], y["samples"])
            assert x["accuracy"] == y["accuracy"], a["name"]
            assert x.get("nll") == pytest.approx(y.get("nll"), abs=1e-6), a["name"]
        left, right = (np.hstack([np.ravel(c) for c in row["coefficients"]]) for row in (a, b))
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6, err_msg=a["name"])


def of_the_run(warnings: list[str]) -> list[str]:
    """Without what is said of how busy the machine was."""
    return [text for text in warnings if not text.startswith("this machine had")]


def assert_same(one: Path, two: Path) -> None:
    """The same candidates, figures, statistics and decision in two folders of reports."""
    first, second = read(one), read(two)
    assert_same_rows(first["candidates"], second["candidates"])
    for key in ("ship", "best", "enough_data", "samples_needed", "real"):
        assert first["decision"][key] == second["decision"][key], key
    for key in ("baseline", "data", "passes"):
        assert first[key] == second[key], key
    assert of_the_run(first["warnings"]) == of_the_run(second["warnings"])
    assert second["data"]["train"] == {"samples": 300}
    left, right = read_statistics(one, first), read_statistics(two, second)
    assert left.keys() == right.keys() != set()
    for key, value in left.items():
        arrays = value.view(np.float32), right[key].view(np.float32)
        np.testing.assert_allclose(*arrays, rtol=1e-6, atol=1e-6, err_msg=key)


def test_compare_finds_what_one_process_finds(
    project: Project, map_style: tuple[Path, Ran], tmp_path: Path
) -> None:
    work, done = map_style
    assert one_object(done.out) == read(work / "two")
    assert sorted(path.name for path in work.iterdir()) == ["cache", "two"]
    alone(project, "data", output=tmp_path / "one")
    assert_same(tmp_path / "one", work / "two")


@pytest.mark.parametrize("name", COMPARED)
def test_other_data_give_what_one_process_finds(
    project: Project, script: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    work, told = script
    assert one_object((told / f"{name}.0.out").read_text()) == read(work / name)
    assert (told / f"{name}.1.out").read_text() == ""
    alone(project, *COMPARED[name], output=tmp_path / "one", candidates=FEW)
    assert_same(tmp_path / "one", work / name)


def test_one_process_reuses_what_two_have_kept(
    project: Project, map_style: tuple[Path, Ran], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(map_style[0] / "cache", cache)
    found = alone(project, "data", cache_dir=cache, cache_bytes=10**9)
    assert_same_rows(found["candidates"], read(map_style[0] / "two")["candidates"])
    assert (found["passes"]["forward"], found["passes"]["batch_norm"]) == (0, 0)


def test_two_processes_reuse_what_one_has_kept(script: tuple[Path, Path]) -> None:
    work, told = script
    one, two = read(work / "one"), read(work / "reused")
    assert one["passes"]["forward"] > 0
    assert_same_rows(one["candidates"], two["candidates"])
    assert (two["passes"]["forward"], two["passes"]["batch_norm"]) == (0, 0)
    text = (told / "reused.0.out").read_text()
    assert text.count("report: reused/report.html") == 1
    assert text.count("<- ship") == 1
    assert (told / "reused.1.out").read_text() == ""


def test_a_comparison_that_is_there_is_shown_once(script: tuple[Path, Path]) -> None:
    assert (script[1] / "again.0.out").read_text().count("up to date: reused/report.html") == 1
    assert (script[1] / "again.1.out").read_text() == ""


@pytest.mark.parametrize("train", ["data", "in_order"])
def test_average_writes_what_one_process_writes(
    project: Project, script: tuple[Path, Path], tmp_path: Path, train: str
) -> None:
    work, told = script
    assert (told / f"average-{train}.1.out").read_text() == ""
    two = one_object((told / f"average-{train}.0.out").read_text())
    one = ensemblekit.average(
        project.checkpoints,
        tmp_path / "one.safetensors",
        model=project.options("data", train=train),
        bn="recompute",
    ).to_json()
    assert two["batch_norm"] == one["batch_norm"]
    assert two["batch_norm"]["samples"] == 300
    for a, b in zip(one["evaluation"], two["evaluation"], strict=True):
        assert a | {"nll": 0} == b | {"nll": 0}
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-6)
    left, right = load_file(tmp_path / "one.safetensors"), load_file(work / f"{train}.safetensors")
    assert left.keys() == right.keys()
    for key, value in left.items():
        np.testing.assert_allclose(value, right[key], rtol=1e-6, atol=1e-6, err_msg=key)
    assert two["warnings"] == list(one["warnings"])
    written = {path.name for path in work.iterdir() if path.is_file()}
    averages = [f"{name}.safetensors" for name in ("data", "in_order")]
    assert written == {*averages, *(f"{name}.json" for name in averages)}


def test_the_callers_connection_is_left_to_the_caller(script: tuple[Path, Path]) -> None:
    assert {path.read_text() for path in script[1].glob("*.connected")} == {"True"}


def test_a_script_may_call_again(project: Project, tmp_path: Path) -> None:
    work, told = tmp_path / "work", tmp_path / "told"
    work.mkdir()
    told.mkdir()
    flags = ["--candidates", "singles", "--cache-size", "0", *project.flags("data", train=None)]
    names = ("first", "second")
    commands = {n: ["compare", project.checkpoints, "-o", n, *flags] for n in names}
    in_a_row(commands, work, told, PAUSE="3")
    assert sorted(path.name for path in work.iterdir()) == sorted(names)


def test_processes_with_different_memory_go_on_together(project: Project, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    work = tmp_path / "work"
    work.mkdir()
    args = ["average", project.checkpoints, "-o", "out.safetensors"]
    flags = project.flags("data", train=None)
    room = f"{1 << 30},0"  # one takes all members at a time, the other one after the other
    sound(torchrun(*args, *flags, cwd=work, driver=tmp_path / "driver.py", ROOM=room))
    assert (work / "out.safetensors").exists()


# ------------------------------------------------------------- processes that die, or are slow


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "dead, data, workers", [(1, "slow", 0), (0, "SlowSet", 1)], ids=["other", "first"]
)
def test_a_killed_process_ends_the_run(
    project: Project, tmp_path: Path, dead: int, data: str, workers: int
) -> None:
    work, notes = tmp_path / "work", tmp_path / "notes"
    work.mkdir()
    notes.mkdir()
    args = ["compare", project.checkpoints, "-o", "out", "--cache-dir", "cache"]
    flags = [*project.flags(data, train=None, batch=4), "--workers", workers]
    with Torchrun(*args, *flags, cwd=work, NOTES=str(notes)) as started:
        pids: dict[str, int] = {}
        until = time.monotonic() + 60
        while len(pids) < 2 and started.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
            pids = {p.name: int(p.read_text()) for p in notes.iterdir() if p.read_text()}
        assert sorted(pids) == ["0", "1"], started.end(1).err
        os.kill(pids[str(dead)], signal.SIGKILL)
        done = started.end(LONGEST_S)
        assert done.code != 0
        assert done.out == ""
        assert "SIGKILL" in done.err  # torchrun names it
        assert "bug in ensemblekit" not in done.err, done.err
        assert f'File "{helpers.ROOT / "ensemblekit"}' not in done.err, done.err
        assert_nothing_written(work)
        until = time.monotonic() + 10  # workers look for their parent every five seconds
        while started.running() and time.monotonic() < until:
            time.sleep(0.1)
        assert started.running() == []


def test_an_error_in_one_process_ends_the_run(project: Project, tmp_path: Path) -> None:
    args = ["compare", project.checkpoints, "-o", "out", "--cache-dir", "cache", "--json"]
    began = time.monotonic()
    flags = project.flags("raises_once", train=None)
    done = torchrun(*args, *flags, cwd=tmp_path)
    assert time.monotonic() - began < LONGEST_S
    assert_failed(done)
    assert "ValueError: no more data" in done.err
    assert 'net.py", line' in done.err
    if done.out:  # process 0 notices by itself, unless torchrun ends it before
        assert one_object(done.out)["error"]["kind"] == "machine"
    assert_nothing_written(tmp_path)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(project: Project, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    work = tmp_path / "work"
    work.mkdir()
    args = ["compare", project.checkpoints, "-o", "out", "--cache-dir", "cache"]
    flags = project.flags("hangs_once", train=None)
    done = torchrun(*args, *flags, cwd=work, driver=tmp_path / "driver.py", PATIENCE="3")
    assert_failed(done)
    assert "another process of this run is gone" in done.err
    assert done.out == ""
    assert_nothing_written(work)


def test_a_wrong_model_is_named(project: Project, tmp_path: Path) -> None:
    args = ["compare", project.checkpoints, "-o", "out", "--cache-dir", "cache", "--json"]
    flags = project.flags("data", model="other")
    done = torchrun(*args, *flags, cwd=tmp_path)
    assert_failed(done)
    error = one_object(done.out)["error"]
    assert error["kind"] == "incompatible"
    assert "conv.weight" in error["message"]
    assert "conv.weight" in done.err  # the other process: its words are marked
    assert "[rank 1]" in done.err
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    "command, target",
    [("compare", "own_order"), ("compare", "own_share"), ("average", "own_labels")],
)
def test_data_that_differ_between_processes_are_refused(
    project: Project, tmp_path: Path, command: str, target: str
) -> None:
    output = {"compare": ["-o", "out", "--cache-dir", "cache"], "average": ["-o", "a.safetensors"]}
    args = [command, project.checkpoints, *output[command], "--json"]
    flags = [*project.flags("data", train=None), "--val-data", project.target(target)]
    began = time.monotonic()
    done = torchrun(*args, *flags, cwd=tmp_path)
    assert time.monotonic() - began < LONGEST_S
    assert done.code != 0
    assert "bug in ensemblekit" not in done.err, done.err
    assert f'File "{helpers.ROOT / "ensemblekit"}' not in done.err, done.err
    codes = set(re.findall(r"exitcode +: (-?\d+)", done.err))
    assert "3" in codes, done.err
    assert codes <= {"3", "-15"}, done.err  # 15: the first to end has the other ended
    said = "the val data are not the same in all processes"
    errors = [line for line in done.err.splitlines() if "error: " in line]
    assert all(line.startswith(f"[rank 1] error: {said}") for line in errors), done.err
    assert len(errors) <= 1
    assert errors or done.out
    if done.out:
        error = one_object(done.out)["error"]
        assert error["kind"] == "bad-input"
        assert error["message"].startswith(said)
        assert "seed the data target" in error["hint"]
    assert_nothing_written(tmp_path)


# -------------------------------------------------------------------------- without torchrun


def test_one_process_exchanges_nothing() -> None:
    alone = World()
    value = object()
    assert (alone.rank, alone.size, alone.local_rank) == (0, 1, 0)
    assert alone.gather(value) == [value]
    assert alone.to_first(value) == [value]
    assert alone.from_first(value) is value
    numbers = np.array([[0.1, 1e300], [-0.0, 3.0]])
    total = alone.sum(numbers)
    assert total.dtype == np.float64
    np.testing.assert_array_equal(total, numbers)
    assert not np.shares_memory(total, numbers)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "4", "RANK": "2"},  # of something else than torchrun
    ],
    ids=["none", "one process", "no address"],
)
def test_nothing_is_connected_without_others(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rank() == 0
    with world() as here:
        assert here == World()
        assert not torch.distributed.is_initialized()


def test_the_rank_is_known_before_anything_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert rank() == 2


def test_an_error_comes_out_of_the_context_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="theirs"), world():
        raise RuntimeError("theirs")
