"""Checks of a profile on its site, by SLURM's commands and a test of sbatch."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from sdwn.errors import counted, duration
from sdwn.jobs import scheduler
from sdwn.jobs.cluster import is_full, job_script, split_into_arrays
from sdwn.jobs.profile import ClusterProfile, minutes
from sdwn.jobs.scheduler import Partition, Site, array_size, user
from sdwn.preflight.findings import Finding, problems

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
MOST_NAMES = 12
# On a busy controller, finding when a job would start takes its time.
TEST_SECONDS = 30

# What a profile says of a task's node.
REQUEST = (
    *("gres", "gpus_per_node", "cpus_per_task", "mem", "mem_per_cpu", "mem_per_gpu"),
    *("constraint", "nodelist", "exclude", "sbatch"),
)

# What sbatch's refusals are about, by a word in them; the first one counts.
REFUSED = {
    "account": "account",
    "qos": "qos",
    "time limit": "time",
    "partition": "partition",
    "node": "nodes",
    "feature": "nodes",
    "gres": "nodes",
}


def check_site(site: Site, profile: ClusterProfile, tasks: int) -> list[Finding]:
    """Compare a profile and a number of tasks with a site, and have sbatch test a task."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        text = f"expected a SLURM cluster, found no {', '.join(absent)} on this machine; run it on"
        return [Finding("slurm", "problem", f"{text} a login node, or use --profile local")]
    if site.config is None and scheduler.squeue() is None:
        text = "the SLURM controller does not answer; try again later, or ask your site"
        return [Finding("slurm", "problem", text)]
    partitions = list(_partitions(site, profile))
    return [
        Finding("slurm", "ok", f"version {(site.config or {}).get('SLURM_VERSION', 'unknown')}"),
        *partitions,
        *_time(site, profile),
        *_arrays(site, profile, tasks),
        # Of a partition that is not there, sbatch says no more.
        *([] if problems(partitions) else _request(site, profile)),
    ]


def _partitions(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    known, default, chosen = site.partitions, site.default_partition, site.chosen(profile)
    there = f"this site has {_names(known)}" + (f" (default: {default})" if default else "")
    if not known:
        text = "scontrol lists no partitions; sbatch will refuse a wrong one"
        yield Finding("partition", "unverified", text)
    elif not chosen:
        text = f"there is no default one; set partition: {there}"
        yield Finding("partition", "problem", text)
    elif absent := [name for name in chosen if name not in known]:
        yield Finding("partition", "problem", f"there is no {_names(absent)}; {there}")
    elif closed := [name for name in chosen if not known[name].up]:
        text = f"{_names(closed)} is closed: jobs wait until it opens; {there}"
        every = len(closed) == len(chosen)
        yield Finding("partition", "problem" if every else "warning", text)
    else:
        yield Finding("partition", "ok", f"{_names(chosen)} is open")


def _time(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    """Find a limit beyond the partition's or the QOS's: sbatch takes it, and it waits for ever."""
    wanted, qos = minutes(profile.time), (site.qos or {}).get(profile.qos or "")
    longest = {
        f"MaxTime of partition {name}": site.partitions[name].time_min
        for name in site.chosen(profile)
        # Such a QOS may go beyond the partition's.
        if name in site.partitions and not (qos and "PartitionTimeLimit" in qos.flags)
    }
    short = {source: most for source, most in longest.items() if most and most < wanted}
    every = len(short) == len(longest)
    if qos and qos.wall_min and qos.wall_min < wanted and site.enforces("limits"):
        short, every = {f"MaxWall of QOS {qos.name}": qos.wall_min}, True
    text = f"a task asks for {duration(60 * wanted)}"
    if short:
        source, most = max(short.items(), key=lambda item: item[1])
        text += f" and may take {duration(60 * most)}, the {source}: it would wait for ever"
        yield Finding("time", "problem" if every else "warning", f"{text}; lower time")
    else:
        known = [
            f"{duration(60 * most)} is the {source}" for source, most in longest.items() if most
        ]
        yield Finding("time", "ok", f"{text}; {', '.join(known) or 'no limit is known'}")


def _arrays(site: Site, profile: ClusterProfile, tasks: int) -> Iterator[Finding]:
    if not tasks:
        yield Finding("arrays", "ok", "nothing is left to submit")
        return
    most = array_size(site.config or {})
    count = len(split_into_arrays(range(tasks), most, profile.array_parallelism))
    text = f"{counted(tasks, 'task')} as {counted(count, 'array')} of at most {most:,}"
    yield Finding("arrays", "ok", text)
    wave = profile.max_submit_jobs
    if wave is None or wave >= tasks:
        yield Finding("jobs", "ok", "all are submitted at once, as far as the queue takes them")
    else:
        text = f"{wave:,} in the queue (max_submit_jobs): {math.ceil(tasks / wave):,} waves"
        yield Finding("jobs", "ok", f"at most {text}")


def _request(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    """Have sbatch say whether it would take a task; beside a refusal stands what the site has."""
    chosen = [site.partitions[name] for name in site.chosen(profile) if name in site.partitions]
    have = "; ".join(map(_nodes, chosen)) or "sinfo lists no nodes"
    refusal = sbatch_refusal(profile)
    if refusal is None:
        yield Finding("nodes", "unverified", f"sbatch --test-only does not answer; {have}")
        return
    if not refusal:
        yield Finding("nodes", "ok", f"sbatch takes a task; {have}")
        return
    subject = next((REFUSED[word] for word in REFUSED if word in refusal.lower()), "sbatch")
    text = f"sbatch takes no such task: {refusal}"
    if subject == "nodes":
        fields = profile.record().items()
        asks = ", ".join(f"{name} {value}" for name, value in fields if name in REQUEST)
        # In the same words SLURM refuses what no node has and what only drained nodes have.
        down = any(kind.usable < kind.nodes for partition in chosen for kind in partition.nodes)
        text += f"; the profile asks for {asks or 'no resources'}; {have}"
        yield Finding("nodes", "warning" if down else "problem", text)
    elif subject in ("account", "qos"):
        see = f"sacctmgr show associations user={user()} format=account,partition,qos"
        yield Finding(subject, "problem", f"{text}; see yours with: {see}")
    else:
        yield Finding(subject, "problem", f"{text}; change the profile, or ask your site")


def sbatch_refusal(profile: ClusterProfile) -> str | None:
    """Return why sbatch would take no task under a profile, "" if it would, None if unknown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.sh"
        path.write_text(job_script(1, Path(folder), profile), encoding="utf-8")
        try:
            done = scheduler.call(["sbatch", "--test-only", str(path)], TEST_SECONDS)
        except (OSError, subprocess.SubprocessError):
            return None
    # A queue that is full now says nothing of the profile.
    if not done.returncode or is_full(done.stderr):
        return ""
    reasons = re.findall(r"(?:error|failure): (.*)", done.stderr)
    return "; ".join(dict.fromkeys(reasons)) or None


def _nodes(partition: Partition) -> str:
    """Describe a partition's nodes, kind by kind."""
    kinds = []
    for kind in partition.nodes:
        gpus = [f"{count} {name or 'GPU'}" for name, count in sorted(kind.gpus.items())]
        has = ", ".join([f"{kind.cpus:,} CPUs", f"{kind.memory_mb:,} MB", *gpus])
        down = f" ({kind.nodes - kind.usable:,} down or drained)" * (kind.usable < kind.nodes)
        kinds.append(f"{counted(kind.nodes, 'node')} with {has}{down}")
    return f"{partition.name} has {' and '.join(kinds) or 'no nodes'}"


def _names(names: Iterable[str]) -> str:
    """List names, not too many of them."""
    shown = sorted(names)
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return ", ".join(shown[:MOST_NAMES]) + more
