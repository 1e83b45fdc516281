"""What a profile asks of a site, held against what the site has."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator

from sdwn.doctor.findings import Finding, ok, problem, unverified, warning
from sdwn.jobs import scheduler
from sdwn.jobs.limits import Bound, Limits, association_of
from sdwn.jobs.profiles import ClusterProfile, megabytes, minutes
from sdwn.jobs.site import NodeKind, Partition

COMMANDS = ("sbatch", "srun", "squeue", "scancel")
MOST_NAMES = 12


def check_site(limits: Limits, profile: ClusterProfile, tasks: int) -> list[Finding]:
    """Hold a profile and a number of tasks against a site."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        text = f"expected a SLURM cluster, found no {', '.join(absent)} on this machine; run it on"
        return [problem("slurm", f"{text} a login node, or use --profile local")]
    if limits.site.config is None and scheduler.squeue() is None:
        text = "the SLURM controller does not answer; try again later, or ask your site"
        return [problem("slurm", text)]
    return [
        ok("slurm", f"version {(limits.site.config or {}).get('SLURM_VERSION', 'unknown')}"),
        *_partitions(limits, profile),
        *_account(limits, profile),
        *_qos(limits, profile),
        *_time(limits, profile),
        *_arrays(limits, tasks),
        *_nodes(limits, profile),
    ]


def _partitions(limits: Limits, profile: ClusterProfile) -> Iterator[Finding]:
    known, default = limits.site.partitions, limits.site.default_partition
    there = f"this site has {_names(known)}" + (f" (default: {default})" if default else "")
    if not known:
        yield unverified(
            "partition", "scontrol tells of no partitions; sbatch will refuse a wrong one"
        )
        return
    if not limits.chosen:
        yield problem("partition", f"there is no default one; set partition: {there}")
        return
    if absent := [name for name in limits.chosen if name not in known]:
        yield problem("partition", f"there is no {_names(absent)}; {there}")
    chosen = [known[name] for name in limits.chosen if name in known]
    if closed := [partition.name for partition in chosen if not partition.up]:
        verdict = problem if len(closed) == len(chosen) else warning
        yield verdict("partition", f"{_names(closed)} is closed: jobs wait until it opens; {there}")
    elif not absent:
        yield ok("partition", f"{_names(limits.chosen)} is open")
    yield from (_allowed(partition, profile) for partition in chosen if partition.accounts)


def _allowed(partition: Partition, profile: ClusterProfile) -> Finding:
    accounts = partition.accounts or ()
    text = f"partition {partition.name} is for the accounts {_names(accounts)}"
    if profile.account in accounts:
        return ok("account", text)
    # An account below one of them may be meant too.
    return warning("account", f"{text}; the profile has {profile.account or 'none'}")


def _account(limits: Limits, profile: ClusterProfile) -> Iterator[Finding]:
    associations = limits.site.associations
    if associations is None or not limits.site.enforces("associations"):
        return
    found = [association_of(associations, profile.account, name) for name in limits.chosen]
    yours = _names({row.account for row in associations}) or "none"
    if not associations or (found and not any(found)):
        account = profile.account or "no default account"
        yield problem("account", f"you may not use {account} here; yours: {yours}; set account")


def _qos(limits: Limits, profile: ClusterProfile) -> Iterator[Finding]:
    if profile.qos is None or limits.site.qos is None:
        return
    rows = [
        association_of(limits.site.associations or (), profile.account, name)
        for name in limits.chosen
    ]
    yours = {name for row in rows if row is not None for name in row.qos} or set(limits.site.qos)
    if profile.qos in yours & set(limits.site.qos):
        yield ok("qos", profile.qos)
        return
    verdict = problem if limits.site.enforces("qos") else warning
    what = "you may not use" if profile.qos in limits.site.qos else "there is no"
    yield verdict("qos", f"{what} {profile.qos}; yours: {_names(yours)}")


def _time(limits: Limits, profile: ClusterProfile) -> Iterator[Finding]:
    asked = minutes(profile.time)
    bounds = [bound for name, bound in limits.walls.items() if name in limits.site.partitions]
    short = [bound for bound in bounds if bound is not None and bound.value < asked]
    text = f"a task asks for {slurm_time(asked)}"
    if short:
        verdict = problem if len(short) == len(bounds) else warning
        most = max(short, key=lambda bound: bound.value)
        longest = f"{slurm_time(most.value)}, the {most.source}"
        yield verdict("time", f"{text} and may take {longest}: it would wait for ever; lower time")
    elif bounds:
        known = [bound for bound in bounds if bound is not None]
        yield ok("time", f"{text}; {_allowed_time(known)}")


def _allowed_time(bounds: list[Bound]) -> str:
    if not bounds:
        return "no limit is set"
    least = min(bounds, key=lambda bound: bound.value)
    return f"{slurm_time(least.value)} is the {least.source}"


def _arrays(limits: Limits, tasks: int) -> Iterator[Finding]:
    if not tasks:
        yield ok("arrays", "nothing is left to submit")
        return
    arrays = math.ceil(tasks / limits.max_array_size)
    yield ok(
        "arrays",
        f"{_count(tasks, 'task')} as {_count(arrays, 'array')} of at most "
        f"{limits.max_array_size:,}",
    )
    yield _jobs(limits, tasks)


def _jobs(limits: Limits, tasks: int) -> Finding:
    most, source = limits.max_submit_jobs, limits.max_submit_source
    if most is not None and most < 1:
        return problem("jobs", f"you may have no job in the queue: {source} is 0; ask your site")
    if most is not None and most < tasks:
        waves = math.ceil(tasks / most)
        return ok("jobs", f"at most {most:,} in the queue ({source}): {waves:,} waves")
    if not limits.site.accounting and source != "max_submit_jobs of the profile":
        text = (
            "sacctmgr tells no limit on jobs in the queue; if sbatch refuses, set max_submit_jobs"
        )
        return unverified("jobs", text)
    return ok("jobs", f"all may be in the queue at once{f' ({most:,}: {source})' if most else ''}")


def _nodes(limits: Limits, profile: ClusterProfile) -> Iterator[Finding]:
    known = limits.site.partitions
    kinds = [kind for name in limits.chosen if name in known for kind in known[name].nodes]
    if not kinds:
        if known and all(name in known for name in limits.chosen):
            yield unverified("nodes", "sinfo tells of no nodes; sbatch will refuse what none has")
        return
    where = f"of {_names(limits.chosen)}"
    fitting = [kind for kind in kinds if _has_gpus(kind, profile.gpu_request)]
    if not fitting:
        yield problem("gpu", _no_gpu(limits, profile, kinds, where))
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
    yield _in_use(fitting, where)


def _in_use(fitting: list[NodeKind], where: str) -> Finding:
    nodes, usable = sum(k.nodes for k in fitting), sum(k.usable for k in fitting)
    if not usable:
        text = f"all {nodes:,} {where} that fit are down or drained; tasks wait until some are back"
        return warning("nodes", text)
    return ok("nodes", f"{usable:,} {where} have what a task asks for")


def _has_gpus(kind: NodeKind, request: dict[str, int]) -> bool:
    named = {name: count for name, count in request.items() if name}
    return all(kind.gpus.get(name, 0) >= count for name, count in named.items()) and (
        sum(kind.gpus.values()) >= sum(request.values())
    )


def _no_gpu(limits: Limits, profile: ClusterProfile, kinds: list[NodeKind], where: str) -> str:
    most = most_gpus(kinds)
    if not most:
        others = [p.name for p in limits.site.partitions.values() if most_gpus(p.nodes)]
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
