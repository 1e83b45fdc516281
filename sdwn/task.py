"""An array task: what submitit pickles, and what a process of it runs."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdwn.files import RunPaths
from sdwn.processes import see_one_device, this_process, together
from sdwn.weights import switch_hub_off

# The module and function of each stage, loaded where it runs: submitting needs no torch. A
# stage takes the path that it works on and the indices of this process's pieces of work.
STAGES = {
    "generate": ("sdwn.generate", "generate"),
    "pilot": ("sdwn.pilot", "make_pilot"),
    "tune": ("sdwn.tune", "tune_into"),
}


@dataclass(frozen=True)
class ArrayTask:
    """What submitit pickles: a stage, a path, and the indices of the pieces of work."""

    stage: str
    path: str
    indices: tuple[int, ...]

    def __call__(self) -> None:
        """Run the stage on this process's share."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        process = this_process()
        see_one_device(process)
        if RunPaths(Path(self.path)).lock.exists():
            switch_hub_off()
        with together(process):
            module, function = STAGES[self.stage]
            run = getattr(importlib.import_module(module), function)
            run(Path(self.path), process.share(self.indices))

    def checkpoint(self) -> Any:
        """Ask for the same task again: what is on disk says where to go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
