"""Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster.

The packages, as the data flows; imports run one way, from the commands down to the synsets
(``make lint`` holds them against the layers in pyproject.toml):

- ``synsets``: WordNet, catalogs, ImageNet's classes; ``planning``: shards, images, seeds;
- ``storage``: images in HDF5; ``devices``: memory and batch sizes; ``models``: weights, pipelines;
- ``jobs``: profiles, arrays, what they said; ``generation``: one task's images;
- ``estimating``: what a run takes; ``releases``: shards merged, read, made again;
- ``judging``: classifiers over images; ``evaluation``: the figures; ``pages``: the report;
- ``comparison``, ``exchange``, ``browsing``: releases side by side, in other formats, in a browser;
- ``runs``, ``doctor``, ``trials``: a run as a whole, examined, and tried beforehand;
- ``commands``: the command line; ``steps``: what a command does, and what is seen of it meanwhile.
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
