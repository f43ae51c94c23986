"""Owns the question why averaging failed, and what to do about it.

Input: a contest whose average is worse than its members.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ensemblekit.contest import Contest
from ensemblekit.scoring import Scores


def diagnose(
    contest: Contest, chosen: Mapping[str, Scores], baseline: str, cosines: Sequence[float]
) -> dict[str, Any] | None:
    """Nothing yet."""
    return None
