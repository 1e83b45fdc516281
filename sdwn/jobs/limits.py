"""What a site allows under a profile: arrays, jobs in the queue, hours.

SLURM's own order is kept: a QOS of the partition, then the job's QOS, then the association; of
these the first that sets a limit decides (https://slurm.schedmd.com/resource_limits.html).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdwn.jobs.profiles import ClusterProfile
from sdwn.jobs.site import Association, Qos, Site, look, number

# What SLURM takes where nobody configures it.
MAX_ARRAY_SIZE = 1001
# The QOS of a job for which nobody chooses one.
NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit and who sets it."""

    value: int
    source: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What a site allows under a profile.

    ``max_submit_jobs`` is how many jobs, an array's tasks counted one by one, may wait and run;
    None: no limit is known. ``chosen`` names the partitions that the profile asks for, ``walls``
    the longest time of a job in each, in minutes.
    """

    site: Site
    chosen: tuple[str, ...]
    max_array_size: int
    max_submit_jobs: int | None
    max_submit_source: str
    walls: Mapping[str, Bound | None]


def ask(profile: ClusterProfile) -> Limits:
    """Ask SLURM what it allows under a profile; what cannot be asked is unknown, no error."""
    return limits(look() if profile.executor == "slurm" else Site(), profile)


def limits(site: Site, profile: ClusterProfile) -> Limits:
    """Work out what a site allows under a profile."""
    wanted = (profile.partition or site.default_partition or "").split(",")
    chosen = tuple(name.strip() for name in wanted if name.strip())
    jobs = _submit_bound(site, profile, chosen)
    return Limits(
        site=site,
        chosen=chosen,
        max_array_size=array_size(site.config or {}),
        max_submit_jobs=jobs.value if jobs else None,
        max_submit_source=jobs.source if jobs else "",
        walls={name: _wall_bound(site, profile, name) for name in chosen},
    )


def array_size(config: Mapping[str, str]) -> int:
    """Say how many tasks an array may have; the highest index is one less than MaxArraySize.

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


def _submit_bound(site: Site, profile: ClusterProfile, chosen: Sequence[str]) -> Bound | None:
    if profile.max_submit_jobs is not None:
        return Bound(profile.max_submit_jobs, "max_submit_jobs of the profile")
    bounds = [
        bound for name in chosen or ("",) for bound in _partition_submits(site, profile, name)
    ]
    count = number((site.config or {}).get("MaxJobCount", ""))
    bounds.append(_bound(count, "MaxJobCount, of all users together"))
    return _smallest(bounds)


def _partition_submits(site: Site, profile: ClusterProfile, name: str) -> list[Bound | None]:
    """Give the limits on jobs in a partition: each user's, each account's, and the groups'."""
    if not site.enforces("limits"):
        return []
    association = association_of(site.associations or (), profile.account, name)
    order = _qos_order(site, profile, name)
    own = _first(order, lambda qos: qos.submit_user, "MaxSubmitJobsPerUser")
    account = _first(order, lambda qos: qos.submit_account, "MaxSubmitJobsPerAccount")
    found = [own, account, _first(order, lambda qos: qos.submit_group, "GrpSubmitJobs")]
    if association is not None:
        where = f"your association with account {association.account}"
        found.append(_bound(association.submit_group, f"GrpSubmitJobs of {where}"))
        if own is None and account is None:
            found.append(_bound(association.submit, f"MaxSubmitJobs of {where}"))
    return found


def _wall_bound(site: Site, profile: ClusterProfile, name: str) -> Bound | None:
    order = _qos_order(site, profile, name)
    own = _first(order, lambda qos: qos.wall_min, "MaxWall")
    association = association_of(site.associations or (), profile.account, name)
    if own is None and association is not None:
        own = _bound(association.wall_min, f"MaxWall of your account {association.account}")
    partition = site.partitions.get(name)
    longest = _bound(partition.time_min if partition else None, f"MaxTime of partition {name}")
    if any("PartitionTimeLimit" in qos.flags for qos in order):
        longest = None
    return _smallest([longest, own if site.enforces("limits") else None])


def _qos_order(site: Site, profile: ClusterProfile, name: str) -> list[Qos]:
    """Give the partition's QOS and the job's, whichever decides first before the other."""
    partition = site.partitions.get(name)
    names = [partition.qos if partition else None, job_qos(site, profile, name)]
    found = [(site.qos or {}).get(qos or "") for qos in names]
    order = [qos for qos in found if qos is not None]
    if found[1] is not None and "OverPartQOS" in found[1].flags:
        order.reverse()
    return order


def job_qos(site: Site, profile: ClusterProfile, partition: str) -> str:
    """Name the QOS of a profile's jobs, as slurmctld chooses it where none is given."""
    association = association_of(site.associations or (), profile.account, partition)
    if profile.qos or association is None:
        return profile.qos or NORMAL
    only = association.qos[0] if len(association.qos) == 1 else None
    return association.default_qos or only or NORMAL


def association_of(
    associations: Iterable[Association], account: str | None, partition: str
) -> Association | None:
    """Pick the association that a job falls under: the partition's own before the general one."""
    rows = [row for row in associations if row.account == account or (not account and row.default)]
    own = [row for row in rows if row.partition == partition]
    return next((row for row in own or rows if row.partition in (partition, "")), None)


def _bound(value: int | None, source: str) -> Bound | None:
    return None if value is None else Bound(value, source)


def _first(order: Iterable[Qos], limit: Callable[[Qos], int | None], name: str) -> Bound | None:
    bounds = (_bound(limit(qos), f"{name} of QOS {qos.name}") for qos in order)
    return next((bound for bound in bounds if bound is not None), None)


def _smallest(bounds: Iterable[Bound | None]) -> Bound | None:
    known = (bound for bound in bounds if bound is not None)
    return min(known, key=lambda bound: bound.value, default=None)
