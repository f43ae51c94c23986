"""Runs every fault case through the installed command: one clear error, and nothing else.

Its input is the registry in `cases`, filled by the modules beside it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import content, damaged, hostile, others, usage  # noqa: F401 (they fill the registry)
from .cases import CASES, Case, Site

BUDGET_S = 2.0
SLACK = float(os.environ.get("FAULTS_SLACK", "4"))  # for a loaded machine; 1 holds the budget
HANG_S = 20.0
MEMORY_OVER_FILES_BYTES = 200 << 20
LONGEST_ERROR = 10_000
WORKERS = int(os.environ.get("FAULTS_WORKERS", str(min(4, os.cpu_count() or 1))))
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "COLUMNS": "1000", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Outcome:
    """What a case's run left, for its test to judge."""

    exit: int | None  # None: killed as hanging
    stdout: str
    stderr: str
    duration_s: float
    peak_memory_bytes: int
    files_bytes: int
    executed: bool
    changed: list[str]


def command(args: list[str], file_size_limit: int | None) -> list[str]:
    """The installed script, else the module."""
    script = Path(sys.executable).with_name("ensemblekit")
    line = [str(script)] if script.exists() else [sys.executable, "-m", "ensemblekit"]
    if file_size_limit is None:
        return [*line, *args]
    limited = "import os, resource, sys; n = int(sys.argv[1]); "
    limited += (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-c", limited, str(file_size_limit), *line, *args]


def peak_memory(pid: int, known: int) -> int:
    """The largest resident size seen so far; 0 where /proc is missing."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return known
    return max(known, int(found[1]) * 1024) if found else known


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below `root`: kind, size, time of change, inode, link target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        info = path.lstat()
        target = path.readlink() if stat.S_ISLNK(info.st_mode) else None
        # a folder's own size and time change when a temporary file comes and goes
        own = (0, 0) if stat.S_ISDIR(info.st_mode) else (info.st_size, info.st_mtime_ns)
        found[str(path)] = (info.st_mode, *own, info.st_ino, target)
    return found


@contextmanager
def built(case: Case) -> Iterator[Site]:
    """The case in a folder of its own, with a short path (a socket's has at most 107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="fault-") as root:
        site = Site(Path(root).resolve())
        for folder in (site.folder, site.out, site.victim, site.cwd):
            folder.mkdir()
        (site.victim / "precious").write_text("precious")
        case.build(site)
        yield site
        site.out.chmod(0o755)


def execute(case: Case, *, as_json: bool) -> Outcome:
    """Builds a case and runs the command on it in an empty folder; kills it when it hangs."""
    with built(case) as site:
        args = [a.format(folder=site.folder, out=site.out) for a in case.args]
        args = ["average", *args, *(["--json"] if as_json else [])]
        before = listing(site.root)
        # what the files take on disk: a sparse giant counts little
        files_bytes = sum(path.lstat().st_blocks * 512 for path in site.folder.rglob("*"))
        start = time.perf_counter()
        with subprocess.Popen(
            command(args, case.file_size_limit),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=site.cwd,
            env=ENVIRONMENT,
            start_new_session=True,
        ) as process:
            peak, hangs = 0, False
            while True:
                try:
                    stdout, stderr = process.communicate(timeout=0.02)
                    break
                except subprocess.TimeoutExpired:
                    peak = peak_memory(process.pid, peak)
                    if not hangs and time.perf_counter() - start > HANG_S:
                        os.killpg(process.pid, signal.SIGKILL)
                        hangs = True
        duration_s = time.perf_counter() - start
        after = listing(site.root)
        changed = sorted(k for k in before.keys() | after if before.get(k) != after.get(k))
        return Outcome(
            exit=None if hangs else process.returncode,
            stdout=stdout.decode(errors="backslashreplace"),
            stderr=stderr.decode(errors="backslashreplace"),
            duration_s=duration_s,
            peak_memory_bytes=peak,
            files_bytes=files_bytes,
            executed=site.marker.exists() or str(site.victim / "precious") in changed,
            changed=[k.removeprefix(f"{site.root}/") for k in changed],
        )


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Callable[[Case, bool], Outcome]]:
    """Runs the selected cases a few at a time, ahead of their tests (under xdist: one by one)."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield lambda case, as_json: execute(case, as_json=as_json)
        return
    wanted: dict[tuple[Case, bool], None] = {}
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        if parameters and "as_json" in parameters.params:
            wanted[parameters.params["case"], parameters.params["as_json"]] = None
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {
            key: pool.submit(execute, key[0], as_json=key[1]) for key in wanted if allowed(key[0])
        }
        yield lambda case, as_json: futures[case, as_json].result()
        pool.shutdown(cancel_futures=True)


def allowed(case: Case) -> bool:
    """Root reads and writes what others may not."""
    return not (case.unless_root and os.geteuid() == 0)


def error_text(stdout: str) -> str:
    """What the one JSON object on stdout says went wrong."""
    document = json.loads(stdout)
    assert document["schema_version"] == 1
    error = document["error"]
    hint = error.get("hint") or ""
    for part in (error["kind"], error["message"]):
        assert isinstance(part, str)
        assert part
    assert isinstance(hint, str)
    return f"{error['kind']}: {error['message']}\n{hint}"


FIRST = {case.group: case for case in reversed(CASES)}
IN_WORDS = [case for case in CASES if case.group == "name" or case is FIRST[case.group]]
RUNS = [(case, True) for case in CASES] + [(case, False) for case in IN_WORDS]


@pytest.mark.parametrize(
    "case, as_json", RUNS, ids=[f"{case}{'' if j else '-in-words'}" for case, j in RUNS]
)
def test_fault(
    case: Case,
    as_json: bool,
    outcomes: Callable[[Case, bool], Outcome],
    record_property: Callable[[str, object], None],
) -> None:
    if not allowed(case):
        pytest.skip("root may do everything")
    outcome = outcomes(case, as_json)
    record_property("duration_s", round(outcome.duration_s, 3))
    record_property("peak_memory_mib", outcome.peak_memory_bytes >> 20)

    said = outcome.stdout + outcome.stderr
    assert outcome.exit is not None, f"still running after {HANG_S:.0f} s"
    assert not outcome.executed, "a payload did its work"
    assert "Traceback" not in said, said
    assert outcome.exit in case.exits, f"exit {outcome.exit}\n{said[:3000]}"
    assert "\x1b" not in said, "an escape sequence reaches the terminal"
    assert outcome.peak_memory_bytes <= outcome.files_bytes + MEMORY_OVER_FILES_BYTES
    assert outcome.duration_s <= BUDGET_S * SLACK
    new = [path for path in outcome.changed if outcome.exit or path.split("/")[0] != "out"]
    assert not new, "the command changed files"
    if outcome.exit == 0:
        return
    text = error_text(outcome.stdout) if as_json else outcome.stderr
    assert text.strip()
    assert len(text) <= LONGEST_ERROR
    if not as_json:
        assert not outcome.stdout
    for wanted in case.mention:
        assert any(w.lower() in text.lower() for w in wanted.split("|")), f"{wanted} not in: {text}"


# --- the generator itself ----------------------------------------------------------------------

PLAIN_LOAD = """
import pickle, sys
class Plain(pickle.Unpickler):
    def persistent_load(self, pid):
        return pid
    def find_class(self, module, name):
        if module.partition(".")[0] == "torch":
            return lambda *args: args
        return super().find_class(module, name)
with open(sys.argv[1], "rb") as file:
    Plain(file).load()
"""


@pytest.mark.parametrize("case", [c for c in CASES if c.armed], ids=str)
def test_payload_is_live(case: Case) -> None:
    """To refuse a dud would prove nothing: plain unpickling does run this payload."""
    with built(case) as site:
        with zipfile.ZipFile(site.folder / "snap_3.pt") as archive:
            (site.root / "data.pkl").write_bytes(archive.read("archive/data.pkl"))
        subprocess.run(
            [sys.executable, "-c", PLAIN_LOAD, str(site.root / "data.pkl")],
            cwd=site.cwd,
            capture_output=True,
            timeout=HANG_S,
            check=False,
        )
        assert site.marker.exists()


def test_registry() -> None:
    names = Counter(map(str, CASES))
    assert not [name for name, count in names.items() if count > 1]
    groups = Counter(case.group for case in CASES)
    assert min(groups.values()) >= 6
    assert sum(groups.values()) >= 120
