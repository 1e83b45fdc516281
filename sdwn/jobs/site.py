"""A site as SLURM's commands describe it: settings, partitions, nodes, QOS, the user's name.

The number of jobs that it takes is not read: sbatch says when the queue is full.
"""

from __future__ import annotations

import os
import pwd
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sdwn.io import in_threads
from sdwn.jobs import scheduler
from sdwn.jobs.profile import ClusterProfile, minutes

# Each command may hang as long; they run at once.
TIMEOUT_S = 20

CONFIG = ("scontrol", "show", "config")
PARTITIONS = ("scontrol", "--all", "--oneliner", "show", "partition")
NODES = ("sinfo", "--all", "--exact", "--noheader", "--format=%R|%t|%D|%c|%m|%G")
QOS = ("sacctmgr", "-nP", "show", "qos", "format=name,flags,maxwall")

# SLURM's defaults.
MAX_ARRAY_SIZE = 1001

# How sinfo's short states of nodes begin that take no jobs.
OUT_OF_USE = ("down", "drain", "drng", "fail", "inval", "unk")


@dataclass(frozen=True, slots=True)
class NodeKind:
    """Nodes of a partition that are alike; ``gpus`` counts a node's by kind, "" for no kind.

    ``usable`` are those that are neither down nor drained.
    """

    nodes: int
    usable: int
    cpus: int
    memory_mb: int
    gpus: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition; None stands for no limit, ``nodes`` is empty where sinfo lists none."""

    name: str
    up: bool
    time_min: int | None = None
    nodes: tuple[NodeKind, ...] = ()


@dataclass(frozen=True, slots=True)
class Qos:
    """A quality of service; None stands for no limit."""

    name: str
    flags: tuple[str, ...] = ()
    wall_min: int | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """What the commands printed; None or nothing where one of them did not answer."""

    config: Mapping[str, str] | None = None
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    default_partition: str | None = None
    qos: Mapping[str, Qos] | None = None

    def chosen(self, profile: ClusterProfile) -> tuple[str, ...]:
        """Return the names of the partitions that a profile asks for."""
        wanted = (profile.partition or self.default_partition or "").split(",")
        return tuple(name.strip() for name in wanted if name.strip())

    def enforces(self, what: str) -> bool:
        """Return whether accounting's limits, qos or associations bind here; True if unknown."""
        if self.config is None or "AccountingStorageEnforce" not in self.config:
            return True
        return what in self.config["AccountingStorageEnforce"].split(",")


def read_site() -> Site:
    """Run SLURM's commands, all at once; a command that fails leaves its values unknown."""
    commands = (CONFIG, PARTITIONS, NODES, QOS)
    printed = in_threads(_printed, commands, threads=len(commands), ahead=len(commands))
    return parse_site(*printed)


def _printed(command: Sequence[str]) -> list[str] | None:
    return scheduler.output_lines(command, TIMEOUT_S)


def parse_site(
    config: Iterable[str] | None,
    partitions: Iterable[str] | None,
    nodes: Iterable[str] | None,
    qos: Iterable[str] | None,
) -> Site:
    """Parse what the commands printed, line by line; None where one failed."""
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in partitions or ()]
    rows = [row for row in rows if "PartitionName" in row]
    kinds = parse_nodes(nodes or ())
    found = [
        Partition(
            name=row["PartitionName"],
            up=row.get("State", "UP") == "UP",
            time_min=_time(row.get("MaxTime", "")),
            nodes=kinds.get(row["PartitionName"], ()),
        )
        for row in rows
    ]
    qos_rows = [line.split("|") for line in qos or () if line.count("|") == 2]
    services = [
        Qos(name, tuple(filter(None, flags.split(","))), _time(wall))
        for name, flags, wall in qos_rows
    ]
    return Site(
        config=None if config is None else parse_config(config),
        partitions={partition.name: partition for partition in found},
        default_partition=next(
            (row["PartitionName"] for row in rows if row.get("Default") == "YES"), None
        ),
        qos=None if qos is None else {one.name: one for one in services},
    )


def parse_config(lines: Iterable[str]) -> dict[str, str]:
    """Parse ``scontrol show config``.

    >>> parse_config(["Configuration data as of now", "MaxArraySize            = 30"])
    {'MaxArraySize': '30'}
    """
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def parse_nodes(lines: Iterable[str]) -> dict[str, tuple[NodeKind, ...]]:
    """Parse sinfo's lines as each partition's kinds of nodes.

    >>> parse_nodes(["main|drain*|1|8|64000+|gpu:a100:4(S:0-1),mps:400", "all|idle|2|8|1|gpu:2"])
    ... # doctest: +NORMALIZE_WHITESPACE
    {'main': (NodeKind(nodes=1, usable=0, cpus=8, memory_mb=64000, gpus=Counter({'a100': 4})),),
     'all': (NodeKind(nodes=2, usable=2, cpus=8, memory_mb=1, gpus=Counter({'': 2})),)}
    """
    kinds: dict[str, tuple[NodeKind, ...]] = {}
    for fields in (line.split("|") for line in lines):
        if len(fields) != 6:
            continue
        name, state, *numbers, gres = fields
        # sinfo writes 64000+ where nodes of a row differ.
        texts = (text.strip().rstrip("+") for text in numbers)
        nodes, cpus, memory = (int(text) if text.isdecimal() else 0 for text in texts)
        gpus = Counter[str]()
        for kind, count in re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)(?=\(|,|$)", gres):
            gpus[kind] += int(count)
        usable = 0 if state.startswith(OUT_OF_USE) else nodes
        kinds[name] = (*kinds.get(name, ()), NodeKind(nodes, usable, cpus, memory, gpus))
    return kinds


def _time(text: str) -> int | None:
    try:
        return minutes(text)
    except ValueError:
        return None  # UNLIMITED, or nothing


def hides_jobs() -> bool:
    """Return whether users of this site see only their own jobs; False if that is unknown."""
    config = parse_config(_printed(CONFIG) or ())
    return "jobs" in config.get("PrivateData", "").split(",")


def max_array_size() -> int:
    """Return how many tasks an array may have here; SLURM's default where it does not say."""
    return array_size(parse_config(_printed(CONFIG) or ()))


def array_size(config: Mapping[str, str]) -> int:
    """Return how many tasks an array may have; the highest index is one less than MaxArraySize.

    An array of one task is submitted as a plain job, which a site without arrays (0) takes too.

    >>> [array_size(config) for config in ({"MaxArraySize": "30"}, {"MaxArraySize": "0"}, {})]
    [30, 1, 1001]
    >>> array_size({"MaxArraySize": "30", "SchedulerParameters": "defer,max_array_tasks=10"})
    10
    """
    text = config.get("MaxArraySize", "")
    size = int(text) if text.isdecimal() else MAX_ARRAY_SIZE
    tasks = re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    return max(1, min(size, int(tasks[1]) if tasks else size))


def user() -> str:
    """Return the user's name as the system has it; $USER may be another's after su or sudo."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.getuid())
