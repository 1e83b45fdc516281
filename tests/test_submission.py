"""Submitting: waves, the journal, what a crash leaves behind, slices, and the later stages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdwn.config import validated
from sdwn.errors import QueueFullError, SdwnError, UsageError
from sdwn.generation.task import GENERATE, generate
from sdwn.io import code_version
from sdwn.jobs import journal, scheduler
from sdwn.jobs import submit as submission
from sdwn.jobs.journal import (
    intend,
    live_jobs,
    note_cancelled,
    open_journal,
    read_journal,
    settle,
    unfinished_shards,
    unheld_shards,
)
from sdwn.jobs.profile import ClusterProfile, job_script, load_profile, stage_profile
from sdwn.jobs.scheduler import Job, JobState, job_ids, read_squeue
from sdwn.jobs.submit import WorkOrder, cancel_run, complete, follow
from sdwn.jobs.task import ArrayTask
from sdwn.paths import CHANGED, ReleasePaths, RunPaths
from sdwn.planning.plan import Slice, make_plan, parse_slice, read_plan, write_plan
from sdwn.workflow.status import run_status
from sdwn.workflow.submitting import RUN_STAGES

from conftest import (
    NOISE,
    REPOSITORY,
    PlanRun,
    Sdwn,
    Testbed,
    keep_record,
    noise_config,
    profile_for_testbed,
    submit_shards,
    wait_until,
    workers,
)

HERE = validated(ClusterProfile, {"executor": "local", "array_parallelism": 2}, source="test")


def others(paths: RunPaths, **settings: Any) -> None:
    """Put another plan in the place of a run's."""
    from sdwn.wordnet.corpus import open_wordnet, read_catalog

    for path in (paths.plan, paths.concepts):
        path.unlink()
    config = noise_config(**settings)
    write_plan(make_plan(config, read_catalog(config.catalog, open_wordnet())), paths)


# The plan and the code that were submitted


def test_a_plan_that_took_the_place_of_the_submitted_one_is_refused(
    sdwn: Sdwn, planned: PlanRun
) -> None:
    paths, plan = planned()
    tasks = WorkOrder(paths, plan, RUN_STAGES, HERE).tasks_for([0])
    settle(paths, intend(paths, tasks, HERE), [])
    others(paths, seed=1)
    refused = sdwn("submit", paths.root, code=2).stderr
    assert f"jobs were submitted here for plan {plan.digest[:12]}" in " ".join(refused.split())
    with pytest.raises(SdwnError, match="this task was submitted for plan"):
        tasks[0]()
    assert not paths.shards.exists()


def test_other_code_than_was_submitted_is_reported(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, plan = planned(storage={"images_per_shard": 1000})
    (made,) = WorkOrder(paths, plan, RUN_STAGES, HERE).tasks_for([0])
    ArrayTask(made.stage, made.path, made.indices, made.plan, code="0.0.9+abc")()
    (note,) = run_status(paths, plan).changed_code
    assert "the code has changed since this was submitted: 0.0.9+abc" in note
    assert note.endswith(code_version())
    submission = intend(paths, [made], HERE)
    line = json.loads(paths.submissions.read_text())
    paths.submissions.write_text(json.dumps({**line, "code": "0.0.9+abc", "ids": ["1"]}) + "\n")
    assert submission.code == code_version()
    told = sdwn("submit", paths.root, "--dry-run").stderr
    assert "the code has changed since the last submission: 0.0.9+abc" in " ".join(told.split())


def test_the_same_code_is_not_reported(generated: PlanRun) -> None:
    paths, plan = generated()
    assert not list(paths.tasks.glob(f"*{CHANGED}"))
    assert run_status(paths, plan).changed_code == []


# Slices


@given(st.integers(1, 60), st.integers(1, 9))
def test_slices_share_all_shards(shards: int, count: int) -> None:
    slices = [Slice(number, count) for number in range(1, count + 1)]
    owners = [[one for one in slices if shard in one] for shard in range(shards)]
    assert all(len(owner) == 1 for owner in owners)
    sizes = [sum(shard in one for shard in range(shards)) for one in slices]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "2", "2/", "/3", "-1/3", "1/0", "1.5/3", ""])
def test_a_wrong_slice_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a share such as 2/3"):
        parse_slice(text)


def test_two_clusters_make_a_slice_each_and_one_release(sdwn: Sdwn, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(json.dumps(NOISE))
    first = sdwn.json("plan", "small.yaml", "a", "--slice", "1/2")
    second = sdwn.json("plan", "small.yaml", "b", "--slice", "2/2")
    assert first["digest"] == second["digest"]
    assert first["slice"].startswith("1/2: ")
    assert "has the slice 1/2 of this plan" in sdwn("plan", "small.yaml", "a", code=2).stderr
    runs = [RunPaths(tmp_path / name) for name in ("a", "b")]
    plans = [read_plan(paths) for paths in runs]
    assert sum(len(plan.assigned_shards) for plan in plans) == len(plans[0].shards)
    own = [[shard.index for shard in plan.assigned_shards] for plan in plans]
    assert unfinished_shards(runs[0], plans[0]) == own[0]
    generate(runs[0].root, own[0])
    status = sdwn.json("status", "a")
    assert status["images_done"] == status["images_total"] == plans[0].assigned_images
    assert status["shards_missing"] == 0
    then = sdwn("submit", "a", "--wait", "--then", "merge", code=2).stderr
    assert "merge all of them" in " ".join(then.split())
    early = " ".join(sdwn("merge", "a", "--release", "out", code=1).stderr.split())
    assert "of other slices of the plan; name their folders too" in early
    generate(runs[1].root, own[1])
    assert sdwn.json("merge", "a", "b", "--release", "out")["images"] == plans[0].images
    few = sdwn("plan", "small.yaml", "c", "--slice", "30/30", code=2).stderr
    assert "the plan has only" in few


# The journal and what lives


def test_an_array_that_was_refused_or_never_taken_holds_no_shard(planned: PlanRun) -> None:
    paths, plan = planned()
    tasks = WorkOrder(paths, plan, RUN_STAGES, HERE).tasks_for([0, 1])
    intend(paths, tasks, HERE)  # and then a crash
    assert read_journal(paths)[0].unsettled
    assert live_jobs(paths) == {}
    assert unheld_shards(paths, plan) == unfinished_shards(paths, plan)


def test_a_submission_where_there_is_no_slurm_leaves_no_script(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths, plan = planned()
    tasks = WorkOrder(paths, plan, RUN_STAGES, ClusterProfile()).tasks_for([0, 1])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SdwnError, match="expected a SLURM cluster, found no sbatch"):
        submission.submit_tasks(paths, tasks, ClusterProfile())
    assert read_journal(paths)[0].refused
    assert not paths.jobs.exists()


@pytest.mark.parametrize("name", ["sdwn-0badcafe-12345678", "sdwn-0badcafe"])
def test_jobs_under_names_of_older_versions_are_followed_and_cancelled(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    paths, plan = planned()
    tasks = WorkOrder(paths, plan, RUN_STAGES, ClusterProfile()).tasks_for([0, 1])
    new = settle(paths, intend(paths, tasks, ClusterProfile()), ["7_0", "7_1"]).name
    assert re.fullmatch("run-generate-[0-9a-f]{8}", new)
    paths.submissions.write_text(paths.submissions.read_text().replace(new, name))
    ended = list[str]()
    queue = {"7_0": JobState("RUNNING", name=name), "7_1": JobState("PENDING", name=name)}
    monkeypatch.setattr(scheduler, "squeue", lambda *_, **__: {} if ended else queue)
    monkeypatch.setattr(scheduler, "end_jobs", lambda *words: ended.extend(words[3]))
    assert [job.id for job in live_jobs(paths)] == ["7_0", "7_1"]
    assert [job.id for job in cancel_run(paths)] == ended == ["7_0", "7_1"]


@pytest.mark.process
def test_processes_of_a_command_that_died_before_it_noted_them_are_found(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned(generation={"num_inference_steps": 200})
    tasks = WorkOrder(paths, plan, RUN_STAGES, HERE).tasks_for(range(len(plan.shards)))

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal, "settle", die)
        with pytest.raises(KeyboardInterrupt):
            submission.submit_tasks(paths, tasks, HERE)
    assert read_journal(paths)[0].unsettled
    assert unheld_shards(paths, plan) == []
    wait_until(lambda: workers(paths))
    with submission.submission_lock(paths, print):
        found = submission.recover(paths, RUN_STAGES, HERE)
    assert read_journal(paths)[0].jobs == tuple(found.live)
    assert not list(paths.jobs.glob("*%*")), "folders are named after jobs"
    assert cancel_run(paths).keys() == found.live.keys()
    assert live_jobs(paths) == {}
    assert workers(paths) == []


@pytest.mark.process
def test_two_commands_at_once_submit_each_shard_once(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path
) -> None:
    paths, plan = planned()
    both = [sdwn.start("submit", paths.root, "--wait") for _ in range(2)]
    for process in both:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
        assert "SLURM" not in log
    shards = [index for one in read_journal(paths) for job in one.jobs for index in job.indices]
    assert sorted(shards) == list(range(len(plan.shards)))


@pytest.mark.process
def test_a_cancel_in_the_moment_of_a_submission_ends_what_that_submits(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned(generation={"num_inference_steps": 500})
    made, submit_tasks = list[Job](), submission.submit_tasks

    def cancelled_meanwhile(*arguments: Any) -> list[Job]:
        note_cancelled(paths, [])
        made.extend(submit_tasks(*arguments))
        return made

    monkeypatch.setattr(submission, "submit_tasks", cancelled_meanwhile)
    with pytest.raises(SdwnError, match="cancelled by: sdwn cancel"):
        complete(WorkOrder(paths, plan, RUN_STAGES, HERE), 0, lambda _: None, print)
    assert made
    wait_until(lambda: not live_jobs(paths))
    assert run_status(paths, plan).shards_cancelled == len(plan.shards)


@pytest.mark.process
def test_cancel_also_ends_the_command_that_follows(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, plan = planned(generation={"num_inference_steps": 200})
    waiting = sdwn.start("submit", paths.root, "--wait")
    wait_until(lambda: live_jobs(paths))
    assert sdwn.json("cancel", paths.root)["cancelled"] > 0
    _, log = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert f"cancelled by: sdwn cancel {paths.root}" in " ".join(log.split())
    assert live_jobs(paths) == {}, "nothing is submitted again"
    assert len(unfinished_shards(paths, plan)) == len(plan.shards)


@pytest.mark.process
def test_a_printed_command_goes_on_with_the_run_under_its_own_profile(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path
) -> None:
    """Pasted into a shell, whatever the run's folder is called."""
    paths, _ = planned("a $HOME of 'runs'")
    site = "{executor: local, array_parallelism: 1, time: 7, setup: [exit 3]}"
    (tmp_path / "site.yaml").write_text(site)
    options = ("--profile", "site.yaml", "--wait", "--retries", "0", "--force")
    failed = sdwn("submit", paths.root, *options, "--then", "merge", code=1).stderr
    told = failed.splitlines()[-1].partition("submit the rest again with: ")[2]
    printed = ["bash", "-c", f'sdwn() {{ printf "%s\\0" "$@"; }}; {told}']
    words = subprocess.run(printed, capture_output=True, text=True, check=True).stdout.split("\0")
    first = len(read_journal(paths))
    again = sdwn(*words[:-1], code=1).stderr
    assert again.splitlines()[-1].partition("again with: ")[2] == told, "with --then, as before"
    assert len(read_journal(paths)) > first
    assert {one.site.time for one in read_journal(paths)} == {"7"}


@given(
    count=st.integers(1, 60), size=st.integers(1, 20), room=st.integers(0, 70), told=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_of_a_queue_that_only_refuses_most_is_used(
    count: int, size: int, room: int, told: bool
) -> None:
    """No command tells how much it takes; a profile's max_submit_jobs is not tried beyond."""
    taken: list[int] = []

    def sbatch(tasks: Any, _: Any, profile: ClusterProfile, *__: Any) -> tuple[str, ...]:
        if sum(taken) + len(tasks) > room:
            assert not profile.max_submit_jobs, "the profile says how much"
            raise QueueFullError("QOSMaxSubmitJobPerUserLimit")
        assert profile.array_parallelism <= len(tasks) <= size
        taken.append(len(tasks))
        return job_ids(str(len(taken)), len(tasks))

    tasks = [ArrayTask(GENERATE, "run", (index,)) for index in range(count)]
    profile = ClusterProfile(max_submit_jobs=room if told and room else None)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "squeue", dict)
        patch.setattr(scheduler, "start_array", sbatch)
        patch.setattr(scheduler, "max_array_size", lambda: size)
        jobs = submission.submit_tasks(RunPaths(Path(folder)), tasks, profile)
        journal = [job for one in read_journal(RunPaths(Path(folder))) for job in one.jobs]
    assert [index for job in jobs for index in job.indices] == list(range(len(jobs)))
    assert journal == jobs
    assert len(jobs) == sum(taken) <= room
    assert len(jobs) == count or 1.5 * len(jobs) + 1 >= room


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_line_of_the_journal_that_is_lost_loses_no_job(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder) / "run")
        for number in range(3):
            tasks = [ArrayTask(GENERATE, folder, (number,))]
            settle(paths, intend(paths, tasks, HERE), [str(number)])
        before, lines = read_journal(paths), paths.submissions.read_bytes().splitlines(True)
        line = data.draw(st.integers(0, len(lines) - 1))
        kept = data.draw(st.integers(0, len(lines[line]) - 2))
        lines[line] = lines[line][:kept] + b"\n"
        paths.submissions.write_bytes(b"".join(lines))
        assert open_journal(paths).unreadable == [line + 1]
        after = read_journal(paths)
    assert [one.name for one in after] == [one.name for one in before]
    # Where its ids are lost, SLURM is asked by its name.
    assert [one for one in after if not one.unsettled] == [
        was for was, one in zip(before, after, strict=True) if not one.unsettled
    ]
    assert sum(one.unsettled for one in after) == line % 2


@pytest.mark.process
def test_jobs_that_no_line_of_the_journal_tells_are_ended_or_waited_for(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = planned()
    # An array is the run's if its script lies there, not by what its name begins with.
    paths.jobs.mkdir()
    (paths.jobs / "run-generate-0badcafe.sh").touch()
    for job, name in (("7_3", "run-generate-0badcafe"), ("9", "run-generate-12345678")):
        columns = [(job, 40), ("RUNNING", 24), (name, 80)]
        with (tmp_path / "queue").open("a") as queue:
            queue.write("".join(text.ljust(width) for text, width in columns) + "\n")
    lines = {"squeue": f"cat {tmp_path}/queue", "scancel": f"echo $* >{tmp_path}/queue"}
    for name in ("sbatch", "srun", *lines):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines.get(name, 'exit 1')}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "site.yaml").write_text("{partition: main}")
    paths.submissions.write_text('{"name": "sdwn-\n{"name": "sdwn-\n')
    told = sdwn("submit", paths.root, "--profile", "site.yaml", "--force", code=1).stderr
    assert f"{paths.submissions}: cannot be read in line 1, 2" in told
    assert "the queue holds 1 job of this run" in told
    assert f"end them with: sdwn cancel {paths.root}" in told
    assert sdwn.json("cancel", paths.root)["job_ids"] == ["7_3"]
    assert (tmp_path / "queue").read_text() == "--name=run-generate-0badcafe 7\n"


@pytest.mark.process
def test_a_full_queue_is_not_waited_for_in_silence(
    planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of MaxJobCount sbatch itself says nothing more, and tries for minutes."""
    full = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying"
    commands = {"sbatch": f"echo '{full}' >&2; exec sleep 300", "squeue": "", "srun": ""}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    paths, plan = planned()
    tasks = WorkOrder(paths, plan, RUN_STAGES, ClusterProfile()).tasks_for([0, 1])
    with pytest.raises(QueueFullError, match="temporarily unable to accept job"):
        submission.submit_array(paths, tasks, ClusterProfile(), print)
    (refused,) = read_journal(paths)
    assert refused.refused
    assert submission.submit_tasks(paths, tasks, ClusterProfile()) == []


@pytest.mark.process
def test_the_second_command_says_what_it_waits_for(
    sdwn: Sdwn, planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = planned(generation={"num_inference_steps": 200})
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sdwn", "submit", "run"])
    with submission.submission_lock(paths, print):
        second = sdwn.start("submit", paths.root)
        assert second.stderr is not None
        told = second.stderr.readline()
        while "waiting for" not in told:
            told = second.stderr.readline()
    assert f"waiting for sdwn submit (process {os.getpid()} of " in told
    assert f"on {socket.gethostname()}, since 20" in told
    second.communicate(timeout=60)
    assert second.returncode == 0, "it goes on when the first has ended"
    sdwn("cancel", paths.root)


def test_a_path_that_slurm_would_rewrite_is_refused(planned: PlanRun) -> None:
    with pytest.raises(UsageError, match="read % in a path as a placeholder"):
        planned("50%able")


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "50%able", os.fsdecode(b"a\xff")])
def test_no_script_is_written_for_a_path_that_slurm_reads_otherwise(
    name: str, tmp_path: Path
) -> None:
    # The folder may have been renamed since it was planned.
    jobs = tmp_path / name / "jobs"
    with pytest.raises(UsageError, match=r"SLURM reads no path with .*rename the folder"):
        job_script(2, jobs, ClusterProfile())
    assert job_script(2, jobs, ClusterProfile(executor="local"))


def test_any_job_name_of_the_user_may_stand_in_the_queue() -> None:
    columns = [("7_0", 40), ("PENDING", 24), ("x" * 80, 80), ("(Resources, or so)", 80)]
    read = read_squeue("".join(text.ljust(width) for text, width in columns))
    assert read is not None
    assert (read[0], read[1].state, read[1].reason) == ("7_0", "PENDING", "(Resources, or so)")
    assert read_squeue("second line of a name  None") is None


# Status


def test_status_opens_no_shard(planned: PlanRun) -> None:
    """Names alone count: these shards are empty files."""
    paths, plan = planned(storage={"images_per_shard": 5})
    paths.shards.mkdir()
    for shard in plan.shards[:20]:
        paths.shard(shard.index).touch()
    status = run_status(paths, plan)
    assert (status.shards_done, status.images_done) == (20, 100)
    assert status.shards_missing == len(plan.shards) - 20


def test_restarts_are_counted_without_accounting(planned: PlanRun) -> None:
    paths, plan = planned()
    paths.tasks.mkdir()
    for name in ("7_0.0.json", "7_0.0.r2.json", "7_1.0.json", "7_1.1.r1.json", "7_2.0.lowered.txt"):
        (paths.tasks / name).touch()
    assert run_status(paths, plan).restarts == 3


def test_speed_and_end_are_told_by_kind_of_gpu(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned()
    tasks = WorkOrder(paths, plan, RUN_STAGES, ClusterProfile()).tasks_for([0, 1])
    array = settle(paths, intend(paths, tasks, ClusterProfile()), ["7_0", "7_1"])
    queue = {job.id: JobState("RUNNING", name=array.name) for job in array.jobs}
    monkeypatch.setattr(scheduler, "squeue", lambda *_, **__: queue)
    for job, device, rate in zip(array.jobs, ("A100", "V100"), (2.0, 0.5), strict=True):
        sampled = {"done": 20, "images": 20, "seconds": 20 / rate, "busy": 1.0}
        keep_record(paths.root, job.id, device, total=50, ended=False, **sampled)
        gpus = run_status(paths, plan).gpus
        assert gpus[device].images_per_second == pytest.approx(rate)
        assert gpus[device].seconds_left == pytest.approx(30 / rate)
        assert gpus[device].processes == 1
    queue.clear()
    assert run_status(paths, plan).gpus == {}


# The later stages


def test_later_stages_ask_for_no_gpu_or_one() -> None:
    site = validated(
        ClusterProfile,
        {
            "gres": "gpu:a100:4,nvme:1",
            "mem": "64G",
            "stages": {"merge": {"partition": "cpu", "mem": None}, "evaluate": {"time": 30}},
        },
        source="test",
    )
    merging, judging = stage_profile(site, "merge"), stage_profile(site, "evaluate")
    assert (merging.gres, merging.partition, merging.mem) == ("nvme:1", "cpu", None)
    assert (judging.gres, judging.time, judging.mem) == ("gpu:a100:1,nvme:1", "30", "64G")
    assert merging.processes == judging.processes == 1
    by_gpu = validated(ClusterProfile, {"gpus_per_node": 4, "mem_per_gpu": "8G"}, source="test")
    assert stage_profile(by_gpu, "evaluate").gpus_per_node == "1"
    assert (stage_profile(by_gpu, "report").mem, stage_profile(by_gpu, "report").gpus_per_node) == (
        "8G",
        None,
    )


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({"meerge": {}}, "stages.meerge"),
        ({"merge": {"partitoin": "x"}}, "unknown key 'partitoin'"),
        ({"merge": {"executor": "local"}}, "executor is the profile's own"),
    ],
)
def test_a_wrong_stage_is_explained(stages: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        validated(ClusterProfile, {"stages": stages}, source="test")


def test_stages_that_lack_their_input_are_refused(sdwn: Sdwn, planned: PlanRun) -> None:
    planned()
    assert "need --wait" in sdwn("submit", "run", "--then", "merge", code=2).stderr
    assert "add merge" in sdwn("submit", "run", "--wait", "--then", "report", code=2).stderr
    assert "found 'eat'" in sdwn("submit", "run", "--wait", "--then", "eat", code=2).stderr


# On a real SLURM


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Arrays whose tasks are held back until they are let go: nothing has to run."""
    path = tmp_path / "site.yaml"
    path.write_text("{account: lab, partition: main, time: 5, mem: 500M, sbatch: {hold: true}}")
    return path


@pytest.fixture
def limited(cluster: Testbed) -> Iterator[int]:
    """A site that takes twelve jobs of a user."""
    cluster.run("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=12")
    try:
        yield 12
    finally:
        cluster.run("sacctmgr", "-i", "modify", "qos", "normal", "set", "MaxSubmitJobsPerUser=-1")


SMALL = {"storage": {"images_per_shard": 5}}  # 39 shards
LITE = {"model": "efficientnet-lite0"}  # it comes with a package


@pytest.mark.slurm
def test_a_plain_submit_takes_what_fits_and_says_what_remains(
    sdwn: Sdwn, planned: PlanRun, limited: int, site: Path, cluster: Testbed
) -> None:
    paths, plan = planned(**SMALL)
    found = sdwn.json("submit", paths.root, "--profile", site, "--then", "merge")
    assert 0 < found["submitted"] <= limited
    assert found["submitted"] + found["remaining"] == len(plan.shards)
    assert "then" not in found, "merge would start too early"
    # No command tells how much the queue takes: there may be a little room left.
    more = sdwn.json("submit", paths.root, "--profile", site)["submitted"]
    assert found["submitted"] > more
    assert len(live_jobs(paths)) == found["submitted"] + more <= limited


@pytest.mark.slurm
def test_a_waiting_submit_feeds_the_queue_as_it_empties(
    sdwn: Sdwn, planned: PlanRun, limited: int, tmp_path: Path, cluster: Testbed
) -> None:
    paths, plan = planned()
    quick = (REPOSITORY / "slurm/profiles/testbed.yaml").read_text()
    (tmp_path / "quick.yaml").write_text(quick)
    profile = load_profile(str(tmp_path / "quick.yaml"), {"mem": "500M", "array_parallelism": "4"})
    most = most_running = 0

    def watch(live: Any) -> None:
        nonlocal most, most_running
        most = max(most, len(live))
        running = sum(state.state == "RUNNING" for state in live.values())
        most_running = max(most_running, running)

    jobs = complete(WorkOrder(paths, plan, RUN_STAGES, profile), 0, watch, print)
    assert len(jobs) == len(plan.shards)
    assert 0 < most <= limited
    # Each array may run one: for a moment beside those of an older one that run already.
    assert most_running <= 4 + len({job.id.partition("_")[0] for job in jobs}) - 1
    assert unfinished_shards(paths, plan) == []
    arrays = {job.id.partition("_")[0] for job in jobs}
    assert len(arrays) <= 2 + 4 * len(plan.shards) / limited, "waves, not a job at a time"


WRAPPER = """#!/bin/sh
# The real sbatch, of whose answer to a submission nothing arrives.
case "$1" in --test-only) exec {sbatch} "$@" ;; esac
if [ -e {mark} ]; then exec {sbatch} "$@"; fi
touch {mark}
{sbatch} "$@" >/dev/null
{then}
"""


def lossy_sbatch(folder: Path, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an sbatch on the PATH whose first call submits, and then does something else."""
    real = shutil.which("sbatch")
    (folder / "bin").mkdir()
    path = folder / "bin/sbatch"
    path.write_text(WRAPPER.format(sbatch=real, mark=folder / "called", then=then))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slurm
def test_an_array_that_slurm_took_without_saying_so_is_found(
    planned: PlanRun,
    site: Path,
    cluster: Testbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, plan = planned()
    error = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    lossy_sbatch(tmp_path, f"echo '{error}' >&2; exit 1", monkeypatch)
    jobs = submit_shards(paths, plan, [0, 1, 2], load_profile(str(site)), print)
    queued = cluster.run("squeue", "--noheader", "--array", "--format=%i").split()
    assert sorted(job.id for job in jobs) == sorted(queued)
    for job in jobs:
        assert (paths.jobs / job.id / f"{job.id}_submitted.pkl").exists()
    assert not list(paths.jobs.glob("*.pkl"))
    cluster.run("scontrol", "release", jobs[0].id.partition("_")[0])
    follow(paths, lambda _: None)
    assert paths.done_shards() == {0, 1, 2}


@pytest.mark.slurm
def test_tasks_that_start_before_sbatch_answers_wait_for_their_work(
    planned: PlanRun, cluster: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = planned()
    late = tmp_path / "bin/sbatch"
    late.parent.mkdir()
    # Answers when tasks have begun to wait.
    waiting = f"until ls {paths.jobs}/*/*_log.out >/dev/null 2>&1; do sleep 0.2; done"
    late.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"; {waiting}; sleep 2\n')
    late.chmod(0o755)
    monkeypatch.setenv("PATH", f"{late.parent}{os.pathsep}{os.environ['PATH']}")
    setup = "setup: [echo from the setup lines >&2]"
    profile = load_profile(str(profile_for_testbed(tmp_path, setup)), {"mem": "500M"})
    tasks = WorkOrder(paths, read_plan(paths), RUN_STAGES, profile).tasks_for([0, 1, 2])
    jobs = submission.submit_tasks(paths, tasks, profile)
    follow(paths, lambda _: None)
    assert paths.done_shards() == {0, 1, 2}
    log = (paths.jobs / jobs[0].id / f"{jobs[0].id}_0_log.err").read_text()
    assert "from the setup lines" in log


@pytest.mark.slurm
def test_what_was_submitted_before_a_crash_is_found(
    sdwn: Sdwn,
    planned: PlanRun,
    site: Path,
    cluster: Testbed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, plan = planned()
    lossy_sbatch(tmp_path, "kill -9 $PPID", monkeypatch)
    submitting = sdwn.start("submit", paths.root, "--profile", site)
    submitting.communicate(timeout=60)
    assert submitting.returncode == -signal.SIGKILL
    assert read_journal(paths)[0].unsettled
    status = run_status(paths, plan)
    assert status.shards_pending == len(plan.shards), "found by its name"
    again = sdwn.json("submit", paths.root, "--profile", site)
    assert (again["submitted"], again["remaining"]) == (0, 0)
    (submission,) = read_journal(paths)
    assert not submission.unsettled
    cluster.run("scontrol", "release", submission.jobs[0].id.partition("_")[0])
    follow(paths, lambda _: None)
    assert unfinished_shards(paths, plan) == []


@pytest.mark.slurm
def test_a_controller_that_is_away_for_a_while_is_waited_for(
    planned: PlanRun, site: Path, cluster: Testbed
) -> None:
    paths, plan = planned()
    indices, told = [shard.index for shard in plan.shards], list[str]()
    cluster.controller("stop")
    back = threading.Timer(8, cluster.controller, ["start"])
    back.start()
    try:
        jobs = submit_shards(paths, plan, indices, load_profile(str(site)), told.append)
    finally:
        back.join()
    assert told[0].startswith("no answer from SLURM (")
    assert told[0].endswith("; trying again in 1 s")
    assert live_jobs(paths).keys() == set(jobs)
    assert len(jobs) == len(plan.shards)


@pytest.mark.slurm
def test_later_stages_wait_for_all_arrays_and_merge_refuses_what_is_incomplete(
    sdwn: Sdwn, planned: PlanRun, site: Path, cluster: Testbed
) -> None:
    paths, plan = planned(**SMALL, evaluation=LITE)
    assert len(plan.shards) > Testbed.max_array_size, "two arrays"
    then = ("--then", "merge,evaluate,report")
    found = sdwn.json("submit", paths.root, "--profile", site, *then)["then"]
    first = described(cluster, found["merge"])
    arrays = {job.id.partition("_")[0] for job in live_jobs(paths)} - set(found.values())
    assert len(arrays) == 2
    assert all(f"afterany:{array}_" in first["Dependency"] for array in arrays)
    assert f"afterok:{found['merge']}" in described(cluster, found["evaluate"])["Dependency"]
    assert "gres" not in first.get("TresPerNode", "")
    states = run_status(paths, plan).then
    assert "pending (" in states["merge"]
    moved = sdwn.json("submit", paths.root, "--profile", site, *then)["then"]
    assert set(moved.values()).isdisjoint(found.values()), "queued anew behind what lives now"
    lost = max(arrays, key=int)
    cluster.run("scancel", lost)
    wait_until(lambda: all(job.id.partition("_")[0] != lost for job in live_jobs(paths)))
    sdwn("submit", paths.root, "--profile", site)
    for array in {job.id.partition("_")[0] for job in live_jobs(paths)} - set(moved.values()):
        cluster.run("scancel", array)
    cluster.run("scontrol", "release", ",".join(moved.values()))
    wait_until(lambda: not live_jobs(paths))
    states = run_status(paths, plan).then
    assert states["merge"].startswith("failed: ")
    assert f"{len(plan.shards)} shards (0-{len(plan.shards) - 1}) missing" in states["merge"]
    assert states["evaluate"].startswith("never started")
    assert not ReleasePaths(paths.release).manifest.exists()
    shown = sdwn("logs", paths.root).stdout
    assert f"{moved['merge']}_0_log.err" in shown
    assert "IntegrityError" in shown
    again = sdwn.json("retry", paths.root)
    assert list(again["then"]) == ["merge", "evaluate", "report"], "what failed goes on too"
    assert (
        f"afterok:{again['then']['merge']}"
        in described(cluster, again["then"]["evaluate"])["Dependency"]
    )


@pytest.mark.slurm
def test_a_stage_that_another_command_queues_anew_is_followed_on(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path, cluster: Testbed
) -> None:
    paths, plan = planned()
    later = profile_for_testbed(tmp_path, 'stages: {merge: {sbatch: {begin: "now+600"}}}')
    first = sdwn.start("submit", paths.root, "--profile", later, "--wait", "--then", "merge")
    wait_until(lambda: "pending" in run_status(paths, plan).then.get("merge", ""))
    at_once = profile_for_testbed(tmp_path, "")
    sdwn("submit", paths.root, "--profile", at_once, "--then", "merge")
    printed, said = first.communicate(timeout=120)
    assert first.returncode == 0, printed + said
    assert ReleasePaths(paths.release).manifest.exists()


@pytest.mark.slurm
def test_what_is_cancelled_has_not_failed_and_what_is_held_is_told(
    sdwn: Sdwn, planned: PlanRun, site: Path, cluster: Testbed
) -> None:
    paths, plan = planned(evaluation=LITE)
    sdwn("submit", paths.root, "--profile", site, "--then", "merge,evaluate")
    wait_until(lambda: sdwn.json("status", paths.root)["cannot_start"])
    (held, *_) = sdwn.json("status", paths.root)["cannot_start"]
    assert "cannot start (JobHeldUser): held by its user" in held
    ended = sdwn.json("cancel", paths.root)
    waiting = len(plan.shards) + 2
    assert (ended["cancelled"], ended["waiting"], ended["running"]) == (waiting, waiting, 0)
    wait_until(lambda: not live_jobs(paths))
    status = sdwn.json("status", paths.root)
    assert (status["shards_cancelled"], status["shards_failed"]) == (len(plan.shards), 0)
    assert status["failures"] == []
    assert all("cancelled as job" in state for state in status["then"].values())
    assert "nothing has failed" in sdwn("logs", paths.root).stdout
    assert list(sdwn.json("retry", paths.root)["then"]) == ["merge", "evaluate"]
    assert sdwn.json("status", paths.root)["shards_cancelled"] == 0


@pytest.mark.slurm
def test_a_wait_ends_once_nothing_is_missing_whatever_is_still_queued(
    sdwn: Sdwn, planned: PlanRun, generated: PlanRun, site: Path, cluster: Testbed
) -> None:
    paths, plan = planned()
    sdwn("submit", paths.root, "--profile", site)
    waiting = sdwn.start("submit", paths.root, "--profile", site, "--wait", "--then", "merge")
    time.sleep(3)
    assert waiting.poll() is None
    whole, _ = generated("elsewhere")
    shutil.copytree(whole.shards, paths.shards)
    wait_until(lambda: read_journal(paths)[-1].stage == "merge" and read_journal(paths)[-1].ids)
    merge = read_journal(paths)[-1].jobs[0]
    assert "afterany" not in described(cluster, merge.id).get("Dependency", "")
    cluster.run("scontrol", "release", merge.id)
    _, log = waiting.communicate(timeout=120)
    said = " ".join(log.split())
    assert waiting.returncode == 0, log
    assert "cannot start (JobHeldUser)" in said
    assert f"the queue still holds {len(plan.shards)} tasks with nothing left to do" in said
    assert ReleasePaths(paths.release).manifest.exists()


def described(cluster: Testbed, job: str) -> dict[str, str]:
    words = cluster.run("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.partition("=")[::2] for word in words)
