"""How long the command line takes to answer, beside an interpreter that does nothing.

Run it: python benchmarks/bench_startup.py [--runs 5]. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIMIT = 8.0  # times `python -c pass`, for --help and --version


def best_s(line: list[str], *, cwd: Path, runs: int) -> float:
    """The shortest of `runs` wall times: noise only adds."""
    times = []
    for _ in range(runs + 1):  # the first one warms the page cache
        start = time.perf_counter()
        subprocess.run(line, cwd=cwd, check=True, capture_output=True)  # noqa: S603
        times.append(time.perf_counter() - start)
    return min(times[1:])


def write_checkpoint(path: Path, seed: int) -> None:
    """A safetensors file of one small tensor."""
    data = np.random.default_rng(seed).normal(size=64).astype(np.float32).tobytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    script = Path(sys.executable).with_name("ensemblekit")
    tool = [str(script)] if script.exists() else [sys.executable, "-m", "ensemblekit"]
    lines = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "ensemblekit --help": [*tool, "--help"],
        "ensemblekit --version": [*tool, "--version"],
        "ensemblekit inspect (3 small files)": [*tool, "inspect", "ckpts"],
        "ensemblekit average (3 small files)": [*tool, "average", "ckpts", "--force"],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ckpts").mkdir()
        for k in range(3):
            write_checkpoint(folder / "ckpts" / f"snap_{k}.safetensors", k)
        times_s = {label: best_s(line, cwd=folder, runs=runs) for label, line in lines.items()}
    floor_s = times_s["python -c pass"]
    rows = {
        label: {"best_ms": round(1000 * t, 1), "ratio": round(t / floor_s, 2)}
        for label, t in times_s.items()
    }
    print(f"{'command':40} {'best of ' + str(runs):>12} {'ratio':>7}")  # noqa: T201
    for label, row in rows.items():
        print(f"{label:40} {row['best_ms']:9.1f} ms {row['ratio']:7.2f}")  # noqa: T201
    slow = [f"ensemblekit {flag}" for flag in ("--help", "--version")]
    passed = all(rows[label]["ratio"] <= LIMIT for label in slow)
    machine = {"python": platform.python_version(), "machine": platform.platform()}
    report = {"benchmark": "startup", "runs": runs, "limit": LIMIT, "passed": passed}
    print(json.dumps({**report, "rows": rows, "environment": machine}))  # noqa: T201


if __name__ == "__main__":
    main()
