"""Large synthetic image datasets out of Stable Diffusion and WordNet, on a SLURM cluster."""

from importlib.metadata import version

__version__ = version("sdwn")
