"""Large synthetic image datasets from text-to-image models and WordNet, on a SLURM cluster.

A catalog becomes a plan, a plan becomes shards, shards become a release, a release becomes an
evaluation. CONTRIBUTING.md has the map: which package does what, and which imports which.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdwn.measures.query import ScoredRelease as Release
    from sdwn.releases.dataset import ReleaseDataset

__version__ = "0.1.0"
__all__ = ["Release", "ReleaseDataset"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line pays for neither Arrow nor torch.
    if name == "Release":
        return import_module("sdwn.measures.query").ScoredRelease
    if name == "ReleaseDataset":
        return import_module("sdwn.releases.dataset").ReleaseDataset
    raise AttributeError(f"module 'sdwn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
