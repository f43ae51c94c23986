"""Each module imports only from those above it in one list; torch stands below a line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ensemblekit"

# The README's reading order.
ABOVE = [
    "errors",
    "options",
    "statistics",
    "libraries",
    "machine",
    "dtypes",
    "files",
    "checksums",
    "atomic",
    "containers",
    "containers.memory",
    "containers.safetensors",
    "containers.suspects",
    "containers.pickle_globals",
    "containers.pickle_vm",
    "containers.torch_zip",
    "containers.torch_legacy",
    "containers.raw_pickle",
    "containers.tar",
    "containers.sharded",
    "containers.dcp",
    "layouts",
    "layouts.tensors",
    "layouts.torch_dict",
    "layouts.torch_module",
    "layouts.state_dict",
    "layouts.dialect",
    "layouts.composer",
    "layouts.deepspeed",
    "layouts.detectron2",
    "layouts.fairseq",
    "layouts.fastai",
    "layouts.ignite",
    "layouts.lightning",
    "layouts.mmengine",
    "layouts.nanogpt",
    "layouts.open_clip",
    "layouts.swa_repo",
    "layouts.timm",
    "layouts.torchvision",
    "layouts.ultralytics",
    "layouts.transformers",
    "layouts.peft",
    "tables",
    "snapshots",
    "walk",
    "duplicates",
    "ordering",
    "schedule",
    "selection",
    "discovery",
    "candidates",
    "averaging",
    "averaging.uniform",
    "averaging.weighted",
    "averaging.ema",
    "averaging.lawa",
    "averaging.wsm",
    "averaging.posthoc_ema",
    "averaging.greedy_soup",
    "averaging.learned_soup",
    "families",
    "mixing",
    "bfloat16",
    "pieces",
    "blocks",
    "state",
    "distances",
    "writers",
    "writers.safetensors",
    "writers.pickling",
    "writers.torch_zip",
    "writers.lightning",
    "writers.saving",
    "writers.folder",
]
BELOW = [
    "distributed",
    "targets",
    "batches",
    "pooling",
    "batchnorm",
    "build",
    "tasks",
    "cache",
    "rivals",
    "predict",
    "predictions",
    "members",
    "workbench",
    "combiners",
    "choosing",
    "scoring",
    "metrics",
    "evaluation",
    "fitting",
    "contest",
    "latency",
    "operations",
    "ensemble_module",
    "graphs",
    "graphs.template",
    "graphs.folding",
    "graphs.lifting",
    "graphs.fusing",
    "graphs.making",
    "graphs.interface",
    "graphs.saving",
    "graphs.precision",
    "runtimes",
    "runtimes.onnx_runtime",
    "graphs.choosing",
    "runtimes.torch_eager",
    "runtimes.choosing",
    "runtimes.torch_fused",
    "runtimes.torch_compile",
    "runtimes.torch_cudagraph",
    "runtimes.onnx_graph_runtime",
    "likeness",
    "verification",
    "decision",
    "environment",
    "sections",
    "comparison",
    "reports",
    "reports.wording",
    "reports.view",
    "reports.decision",
    "reports.markup",
    "reports.axes",
    "reports.labels",
    "reports.pareto",
    "reports.heatmap",
    "reports.plots",
    "reports.tables",
    "reports.csv",
    "reports.markdown",
    "reports.html",
    "reports.latency",
    "commands",
    "commands.result",
    "commands.bn_plan",
    "commands.provenance",
    "commands.outgoing",
    "commands.report_folder",
    "commands.chosen",
    "commands.audit",
    "commands.measure",
    "commands.objective",
    "commands.average",
    "commands.diagnose",
    "commands.compare",
    "commands.triton",
    "commands.subject",
    "commands.export",
    "commands.verify",
    "commands.bench",
    "commands.demo",
    "commands.probing",
    "commands.doctor",
    "cli",
    "cli.show",
    "cli.options",
    "cli.settings",
    "cli.allocator",
    "cli.inspect",
    "cli.average",
    "cli.compare",
    "cli.bench",
    "cli.export",
    "cli.verify",
    "cli.demo",
    "cli.doctor",
    "cli.main",
    "__main__",
]
ORDER = ["", *ABOVE, *BELOW]
# These may import what is heavy, or below them, where it is used: inside a function.
INSIDE = {
    ("commands.average", "commands.measure"),
    ("commands.average", "commands.objective"),
    ("commands.provenance", "targets"),
    ("cli.settings", "cli.main"),  # the registry of commands, whose options are the settings
}
NO_TORCH_AT_MODULE_LEVEL = [
    "distributed",
    "targets",
    "commands.average",
    "commands.outgoing",
    "commands.audit",
    "commands.provenance",
    "commands.probing",
    "commands.doctor",
]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if "demo_files" not in path.parts}


def statements(tree: ast.AST, *, type_checking: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Import statements, and whether each stands inside of a function."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, inside = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend((n, inside) for n in node.orelse)
            if not type_checking:
                continue
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack.extend((child, inside) for child in ast.iter_child_nodes(node))


def imported(module: str) -> Iterator[tuple[str, bool]]:
    """Full names of what a module imports, and whether inside of a function."""
    tree = ast.parse(MODULES[module].read_text())
    count_types = module != "" and module.partition(".")[0] != "cli"
    for node, inside in statements(tree, type_checking=count_types):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = full.removeprefix("ensemblekit.") in MODULES
                yield (full if ours else str(node.module)), inside


def ours(module: str) -> Iterator[tuple[str, bool]]:
    for full, inside in imported(module):
        if full.partition(".")[0] == "ensemblekit":
            yield full.removeprefix("ensemblekit").removeprefix("."), inside


def test_list_is_complete() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", [name for name in ORDER if name in MODULES])
def test_only_from_above(module: str) -> None:
    place = ORDER.index(module)
    wrong = [
        name
        for name, inside in ours(module)
        if ORDER.index(name) >= place and not (inside and (module, name) in INSIDE)
    ]
    assert not wrong, f"{module} imports {wrong}, which stand below it"


@pytest.mark.parametrize("module", [name for name in ABOVE if name in MODULES])
def test_no_torch_above_the_line(module: str) -> None:
    heavy = [name for name, _ in imported(module) if name.partition(".")[0] == "torch"]
    assert not heavy


@pytest.mark.parametrize("module", NO_TORCH_AT_MODULE_LEVEL)
def test_torch_is_imported_where_it_is_used(module: str) -> None:
    heavy = [n for n, inside in imported(module) if n.partition(".")[0] == "torch" and not inside]
    assert not heavy


def test_exceptions_are_needed() -> None:
    assert {
        (module, name) for module, name in INSIDE if (name, True) in set(ours(module))
    } == INSIDE


@pytest.mark.parametrize(
    "modules, absent",
    [
        (["ensemblekit", "ensemblekit.cli.main"], ["torch", "numpy", "ml_dtypes"]),
        ([f"ensemblekit.{name}" for name in [*ABOVE, *NO_TORCH_AT_MODULE_LEVEL]], ["torch"]),
    ],
    ids=["start", "above"],
)
def test_what_is_loaded(modules: list[str], absent: list[str]) -> None:
    program = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {absent!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
