"""A site as SLURM's commands tell of it: partitions, nodes, QOS.

How many jobs it takes is not asked: sbatch says when the queue is full.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from sdwn.jobs import scheduler
from sdwn.jobs.profile import ClusterProfile, minutes

# Each command may hang as long; they run at once.
TIMEOUT_S = 20

CONFIG = ("scontrol", "show", "config")
PARTITIONS = ("scontrol", "--all", "--oneliner", "show", "partition")
NODES = ("sinfo", "--all", "--exact", "--noheader", "--format=%R|%t|%D|%c|%m|%G")
QOS_COLUMNS = "name,flags,maxwall"
QOS = ("sacctmgr", "-nP", "show", "qos", f"format={QOS_COLUMNS}")

# What SLURM takes where nobody configures it.
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
    """A partition; None stands for no limit, ``nodes`` is empty where sinfo tells nothing."""

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
    """All that the commands told; None or nothing where one of them did not answer."""

    config: Mapping[str, str] | None = None
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    default_partition: str | None = None
    qos: Mapping[str, Qos] | None = None

    def chosen(self, profile: ClusterProfile) -> tuple[str, ...]:
        """Return the names of the partitions that a profile asks for."""
        wanted = (profile.partition or self.default_partition or "").split(",")
        return tuple(name.strip() for name in wanted if name.strip())

    def enforces(self, what: str) -> bool:
        """Tell whether accounting's limits, qos or associations bind here; yes, if unknown."""
        if self.config is None or "AccountingStorageEnforce" not in self.config:
            return True
        return what in self.config["AccountingStorageEnforce"].split(",")


def read_site() -> Site:
    """Ask SLURM's commands, all at once; what one of them does not tell is unknown, no error."""
    commands = (CONFIG, PARTITIONS, NODES, QOS)
    with ThreadPoolExecutor(len(commands)) as pool:
        return site(*pool.map(lambda command: scheduler.output_lines(command, TIMEOUT_S), commands))


def hides_jobs() -> bool:
    """Return whether this site shows users nobody's jobs but their own; no, if it does not say."""
    config = read_config(scheduler.output_lines(CONFIG, TIMEOUT_S) or [])
    return "jobs" in config.get("PrivateData", "").split(",")


def max_array_size() -> int:
    """Return how many tasks an array may have here; SLURM's default where it does not say."""
    return array_size(read_config(scheduler.output_lines(CONFIG, TIMEOUT_S) or []))


def array_size(config: Mapping[str, str]) -> int:
    """Return how many tasks an array may have; the highest index is one less than MaxArraySize.

    An array of one task is submitted as a plain job, which a site without arrays (0) takes too.

    >>> [array_size(config) for config in ({"MaxArraySize": "30"}, {"MaxArraySize": "0"}, {})]
    [30, 1, 1001]
    >>> array_size({"MaxArraySize": "30", "SchedulerParameters": "defer,max_array_tasks=10"})
    10
    """
    size = number(config.get("MaxArraySize", ""))
    size = MAX_ARRAY_SIZE if size is None else size
    tasks = re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", ""))
    return max(1, min(size, int(tasks[1]) if tasks else size))


def user() -> str:
    """Name the user as the system does; $USER may be another's after su or sudo."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.getuid())


def site(
    config: Sequence[str] | None,
    partitions: Sequence[str] | None,
    nodes: Sequence[str] | None,
    qos: Sequence[str] | None,
) -> Site:
    """Put together what the commands printed, line by line; None where one failed."""
    settings = None if config is None else read_config(config)
    found, default = read_partitions(partitions or [], read_nodes(nodes or []))
    return Site(
        config=settings,
        partitions=found,
        default_partition=default,
        qos=None if qos is None else {row.name: row for row in read_qos(qos)},
    )


def read_config(lines: Iterable[str]) -> dict[str, str]:
    """Read ``scontrol show config``.

    >>> read_config(["Configuration data as of now", "MaxArraySize            = 30"])
    {'MaxArraySize': '30'}
    """
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_partitions(
    lines: Iterable[str], nodes: Mapping[str, tuple[NodeKind, ...]]
) -> tuple[dict[str, Partition], str | None]:
    """Read ``scontrol --oneliner show partition``; also give the default partition's name."""
    rows = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]
    rows = [row for row in rows if "PartitionName" in row]
    default = [row["PartitionName"] for row in rows if row.get("Default") == "YES"]
    found = (_partition(row, nodes.get(row["PartitionName"], ())) for row in rows)
    return {partition.name: partition for partition in found}, next(iter(default), None)


def _partition(row: Mapping[str, str], nodes: tuple[NodeKind, ...]) -> Partition:
    return Partition(
        name=row["PartitionName"],
        up=row.get("State", "UP") == "UP",
        time_min=_time(row.get("MaxTime", "")),
        nodes=nodes,
    )


def read_nodes(lines: Iterable[str]) -> dict[str, tuple[NodeKind, ...]]:
    """Read sinfo's lines as each partition's kinds of nodes.

    >>> read_nodes(["main|drain*|1|8|64000|gpu:a100:4(S:0-1),mps:400"])["main"][0].gpus
    {'a100': 4}
    """
    kinds: dict[str, list[NodeKind]] = {}
    for line in lines:
        fields = line.split("|")
        if len(fields) != 6:
            continue
        name, state, count, cpus, memory, gres = fields
        kind = NodeKind(_least(count), 0, _least(cpus), _least(memory), read_gpus(gres))
        usable = 0 if state.startswith(OUT_OF_USE) else kind.nodes
        kinds.setdefault(name, []).append(replace(kind, usable=usable))
    return {name: tuple(found) for name, found in kinds.items()}


def read_gpus(gres: str) -> dict[str, int]:
    """Count a node's GPUs by kind.

    >>> read_gpus("gpu:a100:4(S:0,1),shard:8"), read_gpus("gpu:2"), read_gpus("(null)")
    ({'a100': 4}, {'': 2}, {})
    """
    entries = re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)(?=\(|,|$)", gres)
    gpus: dict[str, int] = {}
    for kind, count in entries:
        gpus[kind] = gpus.get(kind, 0) + int(count)
    return gpus


def read_qos(lines: Iterable[str]) -> list[Qos]:
    """Read sacctmgr's rows of :data:`QOS_COLUMNS`."""
    rows = (line.split("|") for line in lines if line.count("|") == QOS_COLUMNS.count(","))
    return [Qos(name, _list(flags), _time(wall)) for name, flags, wall in rows]


def _list(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def number(text: str) -> int | None:
    """Read a count; None where there is none."""
    return int(text) if text.strip().isdecimal() else None


def _least(text: str) -> int:
    # sinfo writes 64000+ where nodes of a row differ.
    return number(text.strip().rstrip("+")) or 0


def _time(text: str) -> int | None:
    try:
        return minutes(text)
    except ValueError:
        return None  # UNLIMITED, or nothing
