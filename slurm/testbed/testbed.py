"""What up, down, node and controller share: the testbed's folder, daemons and processes."""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

HERE = pathlib.Path(__file__).resolve().parent
# Debian keeps the daemons where only root's shell looks.
PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
# Stands in the environment of every daemon and so tells our processes from all others: unlike
# a recorded pid, it can neither get lost nor come to mean somebody else's process.
LABEL = "SDWN_TESTBED_DAEMON"
DEFAULT_DIR = os.environ.get("SDWN_TESTBED_DIR", "/tmp/sdwn-testbed")


def say(message: str) -> None:
    """Tell the user what happens."""
    sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: {message}\n")


def fail(message: str) -> NoReturn:
    """Tell the user why not, and end."""
    say(message)
    sys.exit(1)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command's parser with the option that all have."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    result.add_argument(
        "--dir",
        type=Testbed,
        default=DEFAULT_DIR,
        dest="testbed",
        metavar="DIR",
        help="the testbed's folder",
    )
    return result


def wait(ready: Callable[[], bool], seconds: float) -> bool:
    """Ask until it is ready; False if that takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Testbed:
    """A folder and the daemons that live in it."""

    def __init__(self, folder: str) -> None:
        self.dir = pathlib.Path(folder).resolve()
        self.conf = self.dir / "slurm.conf"
        # Says that the folder is a testbed's, so that it may be removed.
        self.mark = self.dir / ".sdwn-testbed"

    @property
    def down(self) -> str:
        """The command that ends it."""
        default = pathlib.Path(DEFAULT_DIR).resolve() == self.dir
        return f"{HERE}/down" + ("" if default else f" --dir {self.dir}")

    def log(self, daemon: str) -> pathlib.Path:
        """Where the daemon writes what it does."""
        return self.dir / "log" / f"{daemon}.log"

    def start(self, daemon: str, *command: str, **environment: str) -> None:
        """Start a daemon under a keeper, apart from the caller's terminal and environment."""
        with self.log(daemon).open("ab") as log:
            subprocess.Popen(
                [sys.executable, "-IS", HERE / "keeper.py", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                env={"PATH": PATH, LABEL: f"{self.dir} {daemon}", **environment},
            )

    def start_controller(self, *options: str) -> None:
        """Start slurmctld."""
        self.start("slurmctld", "slurmctld", "-f", str(self.conf), *options)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.start(node, "slurmd", "-f", str(self.conf), "-N", node)

    def ask(self, *command: str) -> str | None:
        """What one of SLURM's commands answers; None if it fails."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                check=False,
                env={"PATH": PATH, "SLURM_CONF": str(self.conf)},
                timeout=10,
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                return done.stdout
        return None

    def controller_answers(self) -> bool:
        """Whether slurmctld is there."""
        return " is UP" in (self.ask("scontrol", "ping") or "")

    def nodes_answer(self, *nodes: str) -> bool:
        """Whether slurmctld counts all these nodes as up."""
        states = self.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T")
        up = [
            node
            for node, state in map(str.split, (states or "").splitlines())
            # A star stands for "does not respond".
            if node in nodes and not state.startswith(("down", "unknown")) and "*" not in state
        ]
        return len(up) == len(nodes)

    def processes(self, daemon: str = "") -> tuple[set[int], set[int]]:
        """The keepers and all below them, of one daemon or (without a name) of the testbed."""
        label = f"{LABEL}={self.dir} {daemon}".encode()
        parents: dict[int, int] = {}
        labelled: set[int] = set()
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while we look
                pid = int(process.name)
                # State and parent follow the name, which may hold spaces and brackets.
                parents[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                for entry in (process / "environ").read_bytes().split(b"\0"):
                    if entry == label or (not daemon and entry.startswith(label)):
                        labelled.add(pid)
        keepers = {pid for pid in labelled if parents[pid] not in labelled}
        below: set[int] = set()
        while more := {p for p, up in parents.items() if up in keepers | below} - keepers - below:
            below |= more
        return keepers, below

    def runs(self, daemon: str = "") -> bool:
        """Whether anything of the daemon, or of the testbed, is alive."""
        return any(self.processes(daemon))

    def kill(self, daemon: str = "") -> None:
        """SIGKILL all of it, again and again: some may fork while they are counted."""
        deadline = time.monotonic() + 10
        while any(found := self.processes(daemon)):
            keepers, below = found
            if time.monotonic() > deadline:
                fail(f"these processes survive SIGKILL: {sorted(keepers | below)}")
            # Keepers last: while they live, nothing below can slip away.
            for pid in below or keepers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
