"""A test cluster of a rehearsal's own, and what befalls it: preemptions, kills, a lost node."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdwn.paths import RunPaths

TESTBED = Path(__file__).resolve().parent.parent / "slurm" / "testbed"

# Shorter than a rehearsal's tasks are many, so that these become two arrays, and two tasks run.
OPTIONS = ("--nodes", 4, "--max-array-size", 17)

SEED = 1
MANY = {"preemption": 6, "kill": 8, "lost node": 1, "stopped controller": 1}
FEW = {"preemption": 1, "kill": 2, "lost node": 1, "stopped controller": 1}
# The last one must still find something to disturb.
LATEST = 0.95
# Within a task's life of some tens of seconds, any moment after its first batch.
MOMENT_S = 10.0
# A task that samples takes each batch down at once.
AT_WORK_S = 3.0

# The test cluster notices after 15 s that a node is dead, and requeues what ran there.
NODE_AWAY_S = 30.0
CONTROLLER_AWAY_S = 10.0
URGENT_JOB_S = 3
# Between two rounds of submissions nothing runs.
WORKER_TIMEOUT_S = 120.0
POLL_SECONDS = 0.2


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """Start a test cluster of this rehearsal's own, and stop it whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="sdwn-testbed-"))
    start = [TESTBED / "up", "--dir", folder, "--port-base", free_ports(6), *OPTIONS]
    try:
        subprocess.run([TESTBED / "install"], check=True)
        done = subprocess.run([*map(str, start)], check=True, stdout=subprocess.PIPE, text=True)
        os.environ["SLURM_CONF"] = done.stdout.strip().partition("=")[2]
        yield folder
    finally:
        # In a session of its own: a second Ctrl-C must not leave half a cluster.
        subprocess.run([TESTBED / "down", "--dir", folder], check=False, start_new_session=True)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> int:
    """Find so many free ports in a row; return the first."""
    for base in range(18000, 30000, 100):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(base, base + count):
                probe = probes.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
            return base
    raise SystemExit("no free ports")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Comes ``wait`` seconds after a share of the shards, ``progress``, is finished."""

    progress: float
    wait: float
    kind: str


@dataclass(frozen=True, slots=True)
class Event:
    """A disturbance that has happened: when, after which share of the shards, and what."""

    seconds: float
    progress: float
    kind: str
    what: str


def schedule(counts: Mapping[str, int]) -> list[Disturbance]:
    """Spread disturbances over a run, in an order and at moments that only the seed decides."""
    chance = random.Random(SEED)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    chance.shuffle(kinds)
    return [
        Disturbance(LATEST * place / len(kinds), MOMENT_S * chance.random(), kind)
        for place, kind in enumerate(kinds)
    ]


class Disturber:
    """Disturbs the tasks of one run on one test cluster."""

    def __init__(self, testbed: Path, run: RunPaths) -> None:
        self._folder, self._run = testbed, run
        self._chance = random.Random(f"targets/{SEED}")
        self._actions: dict[str, Callable[[int, str], str]] = {
            "preemption": self._preempt,
            "kill": self._kill,
            "lost node": self._lose_node,
            "stopped controller": self._stop_controller,
        }

    def disturb(
        self, disturbances: list[Disturbance], progress: Callable[[], float | None]
    ) -> Iterator[Event]:
        """Let them happen one after another; ends early where ``progress`` gives None: no run."""
        began = time.monotonic()
        for one in disturbances:
            while (reached := progress()) is not None:
                if reached >= one.progress:
                    break
                time.sleep(POLL_SECONDS)
            else:
                return
            time.sleep(one.wait)
            worker, node = self._some_worker()
            seconds = time.monotonic() - began
            yield Event(seconds, reached, one.kind, self._actions[one.kind](worker, node))

    def _preempt(self, worker: int, node: str) -> str:
        """A job that two tasks leave too few nodes for takes those of one or both."""
        nodes = self._chance.choice((3, 4))
        request = (f"--nodes={nodes}", "--gres=gpu:1", "--output=/dev/null", "--mem=1G")
        urgent = f"--wrap=sleep {URGENT_JOB_S}"
        _run("sbatch", "--wait", "--partition=high", "--job-name=urgent", *request, urgent)
        return f"a job of the high partition took {nodes} of the 4 nodes"

    def _kill(self, worker: int, node: str) -> str:
        """As the kernel does where memory runs out."""
        os.kill(worker, signal.SIGKILL)
        return f"SIGKILL of the worker on {node}"

    def _lose_node(self, worker: int, node: str) -> str:
        self._testbed("node", node, "kill")
        time.sleep(NODE_AWAY_S)
        self._testbed("node", node, "start")
        return f"{node} and all on it killed; started again after {NODE_AWAY_S:.0f} s"

    def _stop_controller(self, worker: int, node: str) -> str:
        self._testbed("controller", "stop")
        time.sleep(CONTROLLER_AWAY_S)
        self._testbed("controller", "start")
        return f"slurmctld stopped; started again after {CONTROLLER_AWAY_S:.0f} s"

    def _testbed(self, command: str, *arguments: str) -> None:
        _run(str(TESTBED / command), "--dir", str(self._folder), *arguments)

    def _some_worker(self) -> tuple[int, str]:
        """Choose a process that samples now, and name its node; wait until there is one."""
        end = time.monotonic() + WORKER_TIMEOUT_S
        while time.monotonic() < end:
            if workers := self._workers():
                return self._chance.choice(sorted(workers.items()))
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"no task of {self._run.root} samples")

    def _workers(self) -> dict[int, str]:
        """Find the processes that sample images of this run, and no other's, and their nodes."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, KeyError):  # it may end while we look
                command = (process / "cmdline").read_bytes().decode().rstrip("\0").split("\0")
                ours = (
                    "submitit.core._submit" in command
                    and Path(command[-1]).parent == self._run.jobs
                )
                # srun's command line holds the worker's.
                if ours and Path(command[0]).name.startswith("python"):
                    environment = _environment(process)
                    if self._samples(environment):
                        found[int(process.name)] = environment["SLURMD_NODENAME"]
        return found

    def _samples(self, environment: Mapping[str, str]) -> bool:
        array = environment.get("SLURM_ARRAY_JOB_ID")
        task = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID')}"
        record = self._run.task(task if array else environment["SLURM_JOB_ID"], 0)
        return time.time() - record.stat().st_mtime < AT_WORK_S


def _environment(process: Path) -> dict[str, str]:
    entries = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
