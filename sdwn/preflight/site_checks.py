"""What a profile asks of a site, held against what the site has."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator

from sdwn.jobs import scheduler
from sdwn.jobs.cluster import arrays
from sdwn.jobs.profile import ClusterProfile, megabytes, minutes
from sdwn.jobs.site import Association, NodeKind, Site, array_size
from sdwn.preflight.findings import Finding, ok, problem, unverified, warning

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
MOST_NAMES = 12


def check_site(site: Site, profile: ClusterProfile, tasks: int) -> list[Finding]:
    """Hold a profile and a number of tasks against a site."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        text = f"expected a SLURM cluster, found no {', '.join(absent)} on this machine; run it on"
        return [problem("slurm", f"{text} a login node, or use --profile local")]
    if site.config is None and scheduler.squeue() is None:
        text = "the SLURM controller does not answer; try again later, or ask your site"
        return [problem("slurm", text)]
    return [
        ok("slurm", f"version {(site.config or {}).get('SLURM_VERSION', 'unknown')}"),
        *_partitions(site, profile),
        *_account(site, profile),
        *_qos(site, profile),
        *_time(site, profile),
        *_arrays(site, profile, tasks),
        *_nodes(site, profile),
    ]


def _partitions(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    known, default = site.partitions, site.default_partition
    there = f"this site has {_names(known)}" + (f" (default: {default})" if default else "")
    if not known:
        yield unverified(
            "partition", "scontrol tells of no partitions; sbatch will refuse a wrong one"
        )
        return
    if not site.chosen(profile):
        yield problem("partition", f"there is no default one; set partition: {there}")
        return
    if absent := [name for name in site.chosen(profile) if name not in known]:
        yield problem("partition", f"there is no {_names(absent)}; {there}")
    chosen = [known[name] for name in site.chosen(profile) if name in known]
    if closed := [partition.name for partition in chosen if not partition.up]:
        verdict = problem if len(closed) == len(chosen) else warning
        yield verdict("partition", f"{_names(closed)} is closed: jobs wait until it opens; {there}")
    elif not absent:
        yield ok("partition", f"{_names(site.chosen(profile))} is open")
    for partition in chosen:
        if accounts := partition.accounts:
            text = f"partition {partition.name} is for the accounts {_names(accounts)}"
            if profile.account in accounts:
                yield ok("account", text)
            else:
                # An account below one of them may be meant too.
                yield warning("account", f"{text}; the profile has {profile.account or 'none'}")


def _account(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    associations = site.associations
    if associations is None or not site.enforces("associations"):
        return
    if not _own(site, profile):
        yours = _names({row.account for row in associations}) or "none"
        account = profile.account or "no default account"
        yield problem("account", f"you may not use {account} here; yours: {yours}; set account")


def _own(site: Site, profile: ClusterProfile) -> list[Association]:
    """List what accounting has of the user under the account that the profile's jobs fall to."""
    account = profile.account
    rows = site.associations or ()
    return [row for row in rows if row.account == account or (not account and row.default)]


def _qos(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    if profile.qos is None or site.qos is None:
        return
    yours = {name for row in _own(site, profile) for name in row.qos} or set(site.qos)
    if profile.qos in yours & set(site.qos):
        yield ok("qos", profile.qos)
        return
    verdict = problem if site.enforces("qos") else warning
    what = "you may not use" if profile.qos in site.qos else "there is no"
    yield verdict("qos", f"{what} {profile.qos}; yours: {_names(yours)}")


def _time(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    asked = minutes(profile.time)
    qos = (site.qos or {}).get(profile.qos or "")
    longest = {
        f"MaxTime of partition {name}": site.partitions[name].time_min
        for name in site.chosen(profile)
        # Such a QOS may go beyond the partition's.
        if name in site.partitions and not (qos and "PartitionTimeLimit" in qos.flags)
    }
    short = {source: most for source, most in longest.items() if most and most < asked}
    every = len(short) == len(longest)
    if qos and qos.wall_min and qos.wall_min < asked and site.enforces("limits"):
        short, every = {f"MaxWall of QOS {qos.name}": qos.wall_min}, True
    text = f"a task asks for {slurm_time(asked)}"
    if short:
        source, most = max(short.items(), key=lambda item: item[1])
        text += f" and may take {slurm_time(most)}, the {source}: it would wait for ever"
        yield (problem if every else warning)("time", f"{text}; lower time")
    else:
        known = [f"{slurm_time(most)} is the {source}" for source, most in longest.items() if most]
        yield ok("time", f"{text}; {', '.join(known) or 'no limit is known'}")


def _arrays(site: Site, profile: ClusterProfile, tasks: int) -> Iterator[Finding]:
    if not tasks:
        yield ok("arrays", "nothing is left to submit")
        return
    most = array_size(site.config or {})
    count = len(arrays(range(tasks), most, profile.array_parallelism))
    yield ok(
        "arrays",
        f"{_count(tasks, 'task')} as {_count(count, 'array')} of at most {most:,}",
    )
    wave = profile.max_submit_jobs
    if wave is None or wave >= tasks:
        yield ok("jobs", "all are submitted at once, as far as the queue takes them")
    else:
        waves = math.ceil(tasks / wave)
        yield ok("jobs", f"at most {wave:,} in the queue (max_submit_jobs): {waves:,} waves")


def _nodes(site: Site, profile: ClusterProfile) -> Iterator[Finding]:
    known = site.partitions
    kinds = [kind for name in site.chosen(profile) if name in known for kind in known[name].nodes]
    if not kinds:
        if known and all(name in known for name in site.chosen(profile)):
            yield unverified("nodes", "sinfo tells of no nodes; sbatch will refuse what none has")
        return
    where = f"of {_names(site.chosen(profile))}"
    fitting = [kind for kind in kinds if _has_gpus(kind, profile.gpu_request)]
    if not fitting:
        yield problem("gpu", _no_gpu(site, profile, kinds, where))
        return
    if profile.gpu_request:
        where += " with these GPUs"
    for subject, asked, unit, attribute in (
        ("cpus", _cpus(profile), "", "cpus"),
        ("memory", _memory_mb(profile), " MB", "memory_mb"),
    ):
        most: int = max(getattr(kind, attribute) for kind in fitting)
        if most < asked:
            text = f"a task asks for {asked:,}{unit} and the nodes {where} have at most {most:,}"
            yield problem(subject, f"{text}{unit}; ask for less")
            return
        fitting = [kind for kind in fitting if getattr(kind, attribute) >= asked]
    nodes, usable = sum(k.nodes for k in fitting), sum(k.usable for k in fitting)
    if usable:
        yield ok("nodes", f"{usable:,} {where} have what a task asks for")
    else:
        text = f"all {nodes:,} {where} that fit are down or drained; tasks wait until some are back"
        yield warning("nodes", text)


def _has_gpus(kind: NodeKind, request: dict[str, int]) -> bool:
    named = {name: count for name, count in request.items() if name}
    return all(kind.gpus.get(name, 0) >= count for name, count in named.items()) and (
        sum(kind.gpus.values()) >= sum(request.values())
    )


def _no_gpu(site: Site, profile: ClusterProfile, kinds: list[NodeKind], where: str) -> str:
    most = most_gpus(kinds)
    if not most:
        others = [p.name for p in site.partitions.values() if most_gpus(p.nodes)]
        return f"no node {where} has GPUs; partitions that have: {_names(others) or 'none'}"
    asked = " and ".join(f"{n} {kind}".strip() for kind, n in profile.gpu_request.items())
    have = ", ".join(f"{n} {kind}".strip() for kind, n in sorted(most.items()))
    return f"a task asks for {asked} a node and the nodes {where} have at most: {have}"


def most_gpus(kinds: Iterable[NodeKind]) -> dict[str, int]:
    """Give the most GPUs of each kind that a node has."""
    most: dict[str, int] = {}
    for kind in kinds:
        for name, count in kind.gpus.items():
            most[name] = max(count, most.get(name, 0))
    return most


def _cpus(profile: ClusterProfile) -> int:
    return (profile.cpus_per_task or 1) * profile.processes


def _memory_mb(profile: ClusterProfile) -> int:
    if profile.mem_per_cpu:
        return math.ceil(megabytes(profile.mem_per_cpu) * _cpus(profile))
    if profile.mem_per_gpu:
        return math.ceil(megabytes(profile.mem_per_gpu) * sum(profile.gpu_request.values()))
    return math.ceil(megabytes(profile.mem or "0"))


def slurm_time(minutes: int) -> str:
    """Write a time as SLURM does.

    >>> slurm_time(90), slurm_time(2910)
    ('1:30:00', '2-00:30:00')
    """
    days, rest = divmod(minutes, 24 * 60)
    hours = f"{rest // 60:02d}" if days else f"{rest // 60}"
    return f"{f'{days}-' if days else ''}{hours}:{rest % 60:02d}:00"


def _names(names: Iterable[str]) -> str:
    """List names, not too many of them."""
    shown = sorted(names)
    more = f" and {len(shown) - MOST_NAMES} more" if len(shown) > MOST_NAMES else ""
    return ", ".join(shown[:MOST_NAMES]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
