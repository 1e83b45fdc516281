"""The GPUs that a process was given, read from its environment without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

# NVIDIA's runtime reads the first, AMD's both; ROCR_VISIBLE_DEVICES is applied before them.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def given(environment: Mapping[str, str]) -> list[str] | None:
    """List the GPUs that a process was given; None where nothing in its environment says.

    >>> [given({"CUDA_VISIBLE_DEVICES": names}) for names in ("2,3", "-1", "NoDevFiles", "GPU-89")]
    [['2', '3'], [], [], ['GPU-89']]
    >>> given({"ROCR_VISIBLE_DEVICES": "6,7"}), given({})
    (['0', '1'], None)
    """
    for name in VARIABLES:
        if name in environment:
            return _names(environment[name])
    if "ROCR_VISIBLE_DEVICES" in environment:
        # What is left of them is numbered anew.
        return [str(number) for number, _ in enumerate(_names(environment["ROCR_VISIBLE_DEVICES"]))]
    return None


def local_gpus(environment: Mapping[str, str]) -> list[str]:
    """List the GPUs of this machine that a process may use."""
    names = given(environment)
    if names is not None:
        return names
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def only(gpu: str) -> dict[str, str]:
    """Return the variables that leave a process one GPU."""
    return dict.fromkeys(VARIABLES, gpu)


def missing(device: str) -> str | None:
    """Describe that torch works on the CPU though this process was given a GPU; None if not."""
    # In a job, device files alone do not mean that one was given.
    gpus = given(os.environ) if "SLURM_JOB_ID" in os.environ else local_gpus(os.environ)
    if device != "cpu" or not gpus:
        return None
    return (
        f"a GPU was given (number {gpus[0]}) and torch finds none, so this runs on the CPU, many "
        "times slower; see what nvidia-smi and python -m torch.utils.collect_env say, and install "
        "a torch built for this driver's CUDA, or load its modules (setup in the profile)"
    )


def _names(value: str) -> list[str]:
    # CUDA and HIP, too, end a list at the first name that is none.
    name = re.compile(r"\d+|(GPU|MIG)-.+", re.ASCII)
    return list(takewhile(name.fullmatch, (part.strip() for part in value.split(","))))
