"""Jobs that wait in vain: which of SLURM's reasons do not pass by themselves, and what to do."""

from __future__ import annotations

import re

from sdwn.jobs.live import Live
from sdwn.jobs.scheduler import RUNNING

AGAIN = "cancel the run's jobs (sdwn cancel) and submit with"
# Of the reason codes at https://slurm.schedmd.com/job_reason_codes.html, and of what slurmctld
# writes in their place. Limits on what runs at once pass; limits on each job do not.
REMEDIES = (
    (r"JobHeldUser", "held by its user; let it go with: scontrol release {job}"),
    (r"JobHeldAdmin", "held by the site; only its administrators can let it go"),
    (
        r"requeued.(in.)?held|JobHoldMaxRequeue|JobLaunchFailure",
        "put back into the queue and held, perhaps because its node could not start it; let it go "
        "with: scontrol release {job}",
    ),
    (r"PartitionTimeLimit|PerJob.*Wall|WallDuration", AGAIN + " a shorter --time"),
    (
        r"PartitionDown|PartitionInactive",
        f"the partition is closed; wait, or {AGAIN} another --partition",
    ),
    (r"InvalidAccount|AccountNotAllowed", AGAIN + " an --account that the partition takes"),
    (r"InvalidQOS|QOSNotAllowed", AGAIN + " a --qos that the partition takes"),
    (r"ReservationDeleted|ReservationInvalid", AGAIN + " another --reservation, or none"),
    (r"Minutes", "your account's hours are used up; ask your site for more"),
    (r"DependencyNeverSatisfied", "the job before it failed; go on with: sdwn retry"),
    (
        r"BadConstraints|PartitionNodeLimit|PartitionConfig|Max\w*Per(Job|Node)",
        "no node or limit allows what it asks for; " + AGAIN + " less, or another --partition",
    ),
)


def cannot_start(live: Live) -> dict[str, str]:
    """Describe, by SLURM's reason, the live jobs that wait in vain and what to do.

    >>> from sdwn.jobs.cluster import Job
    >>> from sdwn.jobs.scheduler import JobState
    >>> cannot_start({Job("7_0", (0,)): JobState("PENDING", "Resources")})
    {}
    >>> cannot_start({Job("7_0", (0,)): JobState("PENDING", "JobHeldAdmin")})["JobHeldAdmin"]
    'job 7_0 cannot start (JobHeldAdmin): held by the site; only its administrators can let it go'
    """
    jobs: dict[str, list[str]] = {}
    for job, state in live.items():
        if state.state != RUNNING:
            jobs.setdefault(state.reason, []).append(job.id)
    found = {}
    for why, ids in jobs.items():
        remedy = next((remedy for words, remedy in REMEDIES if re.search(words, why)), None)
        if remedy is not None:
            which = f"job {ids[0]}" + f" and {len(ids) - 1:,} more" * (len(ids) > 1)
            # An array's id stands for all its tasks.
            arrays = dict.fromkeys(one.partition("_")[0] for one in ids)
            named = ids[0] if len(ids) == 1 else ",".join(arrays)
            found[why] = f"{which} cannot start ({why}): {remedy.format(job=named)}"
    return found
