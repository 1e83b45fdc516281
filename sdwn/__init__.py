"""Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster.

A catalog becomes a plan, a plan becomes shards, shards become a release, a release becomes an
evaluation. The packages, in that order; imports run one way, from ``cli`` down to ``wordnet``
(``make lint`` checks the layers in pyproject.toml):

- ``wordnet``: synsets, catalogs, ImageNet's classes
- ``planning``: a run's plan: images, seeds, shards, slices
- ``storage``: codecs, and images in HDF5
- ``devices``: memory of GPUs, measured and published speeds
- ``models``: weights, the lock on them, pipelines
- ``jobs``: profiles, SLURM arrays and local processes, their journal and logs
- ``preflight``: what a run takes and what would stop it: doctor, pilot, tune, prefetch
- ``generation``: one task: prompts, noise, sampling, writing a shard
- ``releases``: shards merged into a release; reading it
- ``exchange``: releases in other formats, and images imported from them
- ``prediction``: a classifier over a release's images
- ``evaluation``: the figures made of predictions
- ``reports``: the page of an evaluation, and comparisons
- ``browser``: web pages over a release
- ``workflow``: planning, submitting, following and evaluating as a whole
- ``cli``: a module for each group of commands
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdwn.releases.dataset import ReleaseDataset
    from sdwn.releases.release import Release

__version__ = version("sdwn")
__all__ = ["Release", "ReleaseDataset"]

_HOMES = {"Release": "sdwn.releases.release", "ReleaseDataset": "sdwn.releases.dataset"}


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line pays for neither Arrow nor torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'sdwn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
