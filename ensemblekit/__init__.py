"""ensemblekit: from the checkpoints of one training run to the model to ship.

The public API loads when it is used (PEP 562); importing the package imports neither torch nor
numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemblekit.batchnorm import recompute_bn as recompute_bn
    from ensemblekit.candidates import Candidate as Candidate
    from ensemblekit.candidates import Row as Row
    from ensemblekit.commands.audit import audit as audit
    from ensemblekit.commands.average import average as average
    from ensemblekit.commands.bench import BenchOptions as BenchOptions
    from ensemblekit.commands.bench import bench as bench
    from ensemblekit.commands.compare import CompareOptions as CompareOptions
    from ensemblekit.commands.compare import compare as compare
    from ensemblekit.commands.export import export as export
    from ensemblekit.commands.result import AverageResult as AverageResult
    from ensemblekit.commands.subject import ExportOptions as ExportOptions
    from ensemblekit.commands.verify import verify_file as verify_file
    from ensemblekit.discovery import discover as discover
    from ensemblekit.ensemble_module import EnsembleModule as EnsembleModule
    from ensemblekit.ensemble_module import FusedEnsemble as FusedEnsemble
    from ensemblekit.ensemble_module import Head as Head
    from ensemblekit.errors import EnsembleKitError as EnsembleKitError
    from ensemblekit.options import ModelOptions as ModelOptions
    from ensemblekit.runtimes.choosing import fastest as fastest
    from ensemblekit.selection import Selection as Selection
    from ensemblekit.snapshots import Snapshot as Snapshot
    from ensemblekit.snapshots import SnapshotSet as SnapshotSet

__version__ = "0.1.0"

_PUBLIC: dict[str, str] = {
    "AverageResult": "ensemblekit.commands.result",
    "Candidate": "ensemblekit.candidates",
    "EnsembleKitError": "ensemblekit.errors",
    "CompareOptions": "ensemblekit.commands.compare",
    "EnsembleModule": "ensemblekit.ensemble_module",
    "ExportOptions": "ensemblekit.commands.subject",
    "FusedEnsemble": "ensemblekit.ensemble_module",
    "Head": "ensemblekit.ensemble_module",
    "ModelOptions": "ensemblekit.options",
    "Row": "ensemblekit.candidates",
    "Selection": "ensemblekit.selection",
    "Snapshot": "ensemblekit.snapshots",
    "SnapshotSet": "ensemblekit.snapshots",
    "audit": "ensemblekit.commands.audit",
    "BenchOptions": "ensemblekit.commands.bench",
    "average": "ensemblekit.commands.average",
    "bench": "ensemblekit.commands.bench",
    "compare": "ensemblekit.commands.compare",
    "discover": "ensemblekit.discovery",
    "export": "ensemblekit.commands.export",
    "fastest": "ensemblekit.runtimes.choosing",
    "recompute_bn": "ensemblekit.batchnorm",
    "verify_file": "ensemblekit.commands.verify",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ensemblekit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
