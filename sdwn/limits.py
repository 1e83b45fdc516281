"""What a site allows (stand-in)."""

from __future__ import annotations

from dataclasses import dataclass

from sdwn import scheduler
from sdwn.profiles import ClusterProfile


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits."""

    max_array_size: int
    max_submit_jobs: int | None = None
    max_submit_source: str = ""


def ask(profile: ClusterProfile) -> Limits:
    """Ask."""
    return Limits(scheduler.array_limit())
