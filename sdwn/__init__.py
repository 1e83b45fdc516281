"""Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdwn.dataset import ReleaseDataset
    from sdwn.release import Release

__version__ = version("sdwn")
__all__ = ["Release", "ReleaseDataset"]

_HOMES = {"Release": "sdwn.release", "ReleaseDataset": "sdwn.dataset"}


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line pays for neither Arrow nor torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'sdwn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
