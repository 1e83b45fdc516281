"""The journal of a run: what was handed to a scheduler, written down before and after it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from pydantic import ConfigDict, TypeAdapter

from sdwn.checkout import code
from sdwn.config import Positive, validated
from sdwn.io import JSON_BYTES, now, open_append, read_whole
from sdwn.jobs.cluster import Job
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.site import user
from sdwn.jobs.task import ArrayTask
from sdwn.paths import RunPaths

_ID = re.compile(r"[0-9]+(_[0-9]+)?")
_NAME = re.compile(r"sdwn(-[0-9a-f]{8}){1,2}")


@dataclass(frozen=True, slots=True)
class Submission:
    """An array that was to be submitted: what, when, from where, how, of which plan and code.

    ``name`` is the job's own, by which the scheduler can be asked for it. ``tasks`` holds the
    indices of each task's pieces of work, ``ids`` the scheduler's ids: one a task, none if it
    was ``refused``, and None while it isn't known whether the scheduler took it. ``cancelled``
    holds those ids that ``sdwn cancel`` ended. ``owner`` is the user who submitted it; None in
    older journals, and where ``ids`` are not known.
    """

    # A line with a field that is not known is left out.
    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    time: str
    host: str
    executor: Literal["local", "slurm"]
    stage: str
    profile: dict[str, Any]
    processes: Positive
    plan: str
    code: str
    tasks: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...] | None = None
    refused: str | None = None
    cancelled: tuple[str, ...] = ()
    owner: str | None = None

    def __post_init__(self) -> None:
        # They name folders, and are handed to scancel: of no other jobs of this user.
        if not all(map(_ID.fullmatch, self.ids or ())) or not _NAME.fullmatch(self.name):
            raise ValueError(f"expected name and ids of jobs, found {self.name}, {self.ids}")

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Its jobs, as far as they are known."""
        return self.jobs_as(self.ids or ())

    def jobs_as(self, ids: Sequence[str]) -> tuple[Job, ...]:
        """Its jobs under these ids."""
        pairs = zip(ids, self.tasks, strict=False)
        return tuple(Job(one, indices, self.processes, self.name) for one, indices in pairs)

    @property
    def site(self) -> ClusterProfile:
        """The profile that it was submitted under."""
        return validated(ClusterProfile, self.profile, source="the journal's profile")

    @property
    def unsettled(self) -> bool:
        """Whether it isn't known if the scheduler took it: a crash came between."""
        return self.ids is None and self.refused is None


# Anybody may have written a line of a journal.
_SUBMISSION = TypeAdapter(Submission)


def run_name(paths: RunPaths) -> str:
    """Return how the names of all jobs of a run begin: SLURM tells them without a journal."""
    return f"sdwn-{hashlib.sha256(os.fsencode(paths.root.resolve())).hexdigest()[:8]}-"


def intend(paths: RunPaths, tasks: Sequence[ArrayTask], profile: ClusterProfile) -> Submission:
    """Write down what is about to be submitted."""
    submission = Submission(
        name=run_name(paths) + uuid4().hex[:8],
        time=now(),
        host=socket.gethostname(),
        executor=profile.executor,
        stage=tasks[0].stage,
        profile=profile.record(),
        processes=profile.processes,
        plan=tasks[0].plan,
        code=code(),
        tasks=tuple(task.indices for task in tasks),
        owner=user(),
    )
    _append(paths, _content(submission))
    return submission


def _content(submission: Submission) -> dict[str, Any]:
    content = asdict(submission)
    # Earlier versions of sdwn leave out a submission with a field that they do not know.
    del content["owner"]
    return {key: value for key, value in content.items() if value not in (None, ())}


def settle(paths: RunPaths, submission: Submission, ids: Sequence[str]) -> Submission:
    """Write down under which ids the scheduler took it; all of it anew, if a line gets lost."""
    owner = {"owner": submission.owner} if submission.owner else {}
    content = {"of": _content(submission)}
    _append(paths, {"name": submission.name, "ids": list(ids), **owner, **content})
    return replace(submission, ids=tuple(ids))


def refuse(paths: RunPaths, submission: Submission, reason: str) -> None:
    """Write down that the scheduler did not take it."""
    _append(paths, {"name": submission.name, "refused": reason})


def note_cancelled(paths: RunPaths, ids: Sequence[str]) -> None:
    """Write down that these jobs were cancelled, for whoever follows them."""
    _append(paths, {"cancelled": now(), "jobs": list(ids)})


def note_later(paths: RunPaths, stages: Sequence[str]) -> None:
    """Write down which stages are to follow the shards, for whoever takes the run up again."""
    _append(paths, {"then": list(stages)})


def noted_later(paths: RunPaths) -> tuple[str, ...]:
    """Read which stages were to follow the shards, when they were asked for last."""
    return _read(paths).later


def cancellations(paths: RunPaths) -> int:
    """Count how often the run's jobs were cancelled."""
    return _read(paths).cancellations


def _append(paths: RunPaths, record: dict[str, Any]) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    # A line that a crash cut short must not swallow this one.
    torn = paths.submissions.exists() and not paths.submissions.read_bytes().endswith(b"\n")
    with open_append(paths.submissions) as file:
        file.write("\n" * torn + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_journal(paths: RunPaths) -> list[Submission]:
    """Read all submissions of a run, in order; lines that a crash cut short are left out."""
    return list(_read(paths).submissions.values())


def unreadable(paths: RunPaths) -> list[int]:
    """Return the numbers of the lines that say nothing, as those that a crash cut short."""
    return _read(paths).unreadable


@dataclass
class _Journal:
    """The records of a journal, and the numbers of its unreadable lines."""

    submissions: dict[str, Submission] = field(default_factory=dict)
    later: tuple[str, ...] = ()
    cancellations: int = 0
    unreadable: list[int] = field(default_factory=list)


def _read(paths: RunPaths) -> _Journal:
    journal = _Journal()
    if not paths.submissions.exists():
        return journal
    text = read_whole(paths.submissions, JSON_BYTES).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            _take(journal, json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            journal.unreadable.append(number)
    return journal


def _take(journal: _Journal, record: dict[str, Any]) -> None:
    found = journal.submissions
    if "cancelled" in record:
        journal.cancellations += 1
        ended = set(map(str, record.get("jobs", ())))
        for name, one in found.items():
            more = tuple(job for job in one.ids or () if job in ended)
            found[name] = replace(one, cancelled=one.cancelled + more)
        return
    if "then" in record:
        journal.later = tuple(map(str, record["then"]))
        return
    name = str(record["name"])
    if "tasks" in record:
        found[name] = _SUBMISSION.validate_python(record)
    elif "ids" in record:
        if name not in found:
            _take(journal, record["of"])
        ids, owner = tuple(map(str, record["ids"])), record.get("owner")
        found[name] = replace(found[name], ids=ids, owner=owner and str(owner))
    else:
        found[name] = replace(found[name], refused=str(record["refused"]))


def last_jobs(submissions: Sequence[Submission]) -> dict[int, Job]:
    """Give the last job of each shard that was ever submitted."""
    return {
        index: job for submission in submissions for job in submission.jobs for index in job.indices
    }


def cancelled_jobs(submissions: Sequence[Submission]) -> set[Job]:
    """Return the jobs that ``sdwn cancel`` ended."""
    return {job for one in submissions for job in one.jobs if job.id in one.cancelled}
