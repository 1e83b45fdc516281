"""An array task: what submitit pickles, and what a process of it runs."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sdwn import checkout
from sdwn.batches import batch_size_of_task
from sdwn.errors import SdwnError
from sdwn.io import now, read_json, require_home
from sdwn.jobs.disk import RunDisk, write_note
from sdwn.jobs.processes import see_one_device, this_process, together
from sdwn.paths import CHANGED, RunPaths

log = logging.getLogger(__name__)

# So many starts in a row that SLURM ends before anything new is finished are enough.
IDLE_STARTS = 3

# The module and function of each stage, loaded where it runs: submitting needs no torch. A
# stage takes the path that it works on and the indices of this process's pieces of work.
STAGES = {
    "generate": ("sdwn.generation.task", "generate"),
    "pilot": ("sdwn.preflight.trials", "make_pilot"),
    "probe": ("sdwn.preflight.probe", "report_node"),
    "tune": ("sdwn.preflight.trials", "tune_task"),
    "merge": ("sdwn.workflow.later_stages", "merge_run"),
    "evaluate": ("sdwn.workflow.later_stages", "evaluate_run"),
    "report": ("sdwn.workflow.later_stages", "report_run"),
    "judge": ("sdwn.prediction.task", "predict"),
    "conclude": ("sdwn.evaluation.evaluate", "conclude"),
}
# Those that also take the batch size that the profile asks for.
WITH_BATCHES = ("generate", "pilot", "judge")


@dataclass(frozen=True)
class ArrayTask:
    """What submitit pickles: a stage, a path, and the indices of the pieces of work.

    ``plan`` is the digest of the plan that it was submitted for, ``code`` names the code then.
    ``made`` names what was finished of it when SLURM ended its last start, and ``idle`` counts
    the starts since then that finished nothing new.
    """

    stage: str
    path: str
    indices: tuple[int, ...]
    plan: str = ""
    code: str = ""
    made: frozenset[str] = frozenset()
    idle: int = 0

    def __call__(self) -> None:
        """Run the stage on this process's share."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        process = this_process()
        require_home()
        see_one_device(process)
        paths = RunPaths(Path(self.path))
        if paths.lock.exists():
            # Its weights are locked: nothing of this process asks the hub for others.
            os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        if process.start and process.rank == 0:
            write_note(paths, paths.note(process.job, 0, f".r{process.start}.started.txt"), now())
        with together(process):
            self._require_same_plan(paths)
            if self.code not in ("", here := checkout.code()):
                text = f"the code has changed since this was submitted: {self.code} to {here}"
                log.warning("%s", text)
                write_note(paths, paths.note(process.job, process.rank, CHANGED), text)
            module, function = STAGES[self.stage]
            run = getattr(importlib.import_module(module), function)
            share = process.share(self.indices)
            if self.stage in WITH_BATCHES:
                run(paths.root, share, batch_size_of_task())
            else:
                run(paths.root, share)

    def _require_same_plan(self, paths: RunPaths) -> None:
        if not self.plan:
            return
        found = RunDisk(paths).retry(partial(read_json, paths.plan)).get("digest")
        if found != self.plan:
            raise SdwnError(
                f"{paths.plan}: this task was submitted for plan {self.plan[:12]}, found "
                f"{str(found)[:12]}: the plan was replaced; restore it, or submit again"
            )

    def checkpoint(self) -> Any:
        """Ask for the same task again: what is on disk says where to go on.

        Raises:
            SdwnError: start after start ended without anything new.
        """
        from submitit.helpers import DelayedSubmission

        made = self._finished()
        idle = 0 if made != self.made else self.idle + 1
        # A later stage, which has no pieces of work, says itself how far it is.
        if idle >= IDLE_STARTS and self.indices:
            text = (
                f"not started again: {idle} starts in a row ended at the time limit, or were "
                "preempted, before anything new was finished; ask for more --time, or for "
                "smaller batches (--batch-size)"
            )
            # Other processes of this task may keep the error from being the log's last word.
            log.error("%s", text)
            raise SdwnError(text)
        return DelayedSubmission(replace(self, made=made, idle=idle))

    def _finished(self) -> frozenset[str]:
        """Name the finished shards, and pieces of others, of this task."""
        paths = RunPaths(Path(self.path))
        return frozenset(
            str(path.relative_to(paths.root))
            for index in self.indices
            for path in (
                *paths.shards.glob(f"{paths.shard(index).stem}.*"),
                *paths.shard_pieces(index).glob("[0-9]*"),
            )
        )
