"""Following a run: why tasks ended, what a terminal does to them, later stages, trials, advice."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sdwn.cli import console
from sdwn.cli import run as commands
from sdwn.config import validated
from sdwn.errors import SdwnError
from sdwn.generation.task import GENERATE
from sdwn.jobs import scheduler
from sdwn.jobs.journal import failure, intend, live_jobs, read_journal, settle, unfinished_shards
from sdwn.jobs.profile import ClusterProfile, load_profile
from sdwn.jobs.scheduler import Job, JobState, cannot_start
from sdwn.jobs.submit import WorkOrder, complete
from sdwn.jobs.task import ArrayTask, write_note
from sdwn.paths import NO_GPU, RunPaths
from sdwn.preflight.trials import TrialCallbacks, run_pilot, tune_by_jobs
from sdwn.workflow import status
from sdwn.workflow.status import next_command, run_status
from sdwn.workflow.submitting import LATER_STAGES, leaving_advice

from conftest import PlanRun, Sdwn, noise_config, wait_until, workers

HERE = validated(ClusterProfile, {"executor": "local", "array_parallelism": 1}, source="test")
SLOW = {"generation": {"num_inference_steps": 100}}


# Why a task ended

START = "submitit INFO (2026-01-01 00:00:00,000) - Loading pickle: x\n"
AT_WORK = "2026-01-01 00:00:01,000 cpu: 5 images a batch (one synset)\n"
END = "2026-01-01 00:00:09,000 Job completed successfully\n"
RAISED = """2026-01-01 00:00:01,000 Submitted job triggered an exception
Traceback (most recent call last):
  File "x.py", line 1, in <module>
sdwn.errors.SdwnError: the model is gone
"""
EXITED = "srun: error: n1: task 0: Exited with exit code 1\n"
KILLED = "srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=8.0\n"
OOM = (
    "slurmstepd: error: Detected 1 oom_kill event in StepId=8.0. Some tasks have been OOM Killed.\n"
)
LIMIT = (
    "slurmstepd: error: *** STEP 8.0 ON n1 CANCELLED AT 2026-01-01T00:00:09 DUE TO TIME LIMIT ***\n"
)
PREEMPTED = LIMIT.replace("TIME LIMIT", "PREEMPTION")
BY_HAND = LIMIT.replace(" DUE TO TIME LIMIT", "") + "srun: error: n1: task 0: Killed\n"
NODE = LIMIT.replace("TIME LIMIT", "NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS")


def logged(paths: RunPaths, texts: Sequence[str]) -> None:
    """Write down an ended job 7 that had shard 0 (and 1, as process 1), with these logs."""
    folder = paths.jobs / "7"
    folder.mkdir(parents=True)
    for rank, text in enumerate(texts):
        (folder / f"7_{rank}_log.err").write_text(text)
        (folder / f"7_{rank}_log.out").write_text(START)
    site = validated(ClusterProfile, {"gres": f"gpu:{len(texts)}"}, source="test")
    settle(paths, intend(paths, [ArrayTask(GENERATE, str(paths.root), (0, 1))], site), ["7"])


CAUSES = [
    (AT_WORK + KILLED, "killed (SIGKILL)"),
    (AT_WORK + OOM + KILLED, "killed: it used more memory than it asked for"),
    (AT_WORK + LIMIT + KILLED, "ended by its time limit"),
    (AT_WORK + PREEMPTED, "preempted"),
    (AT_WORK + NODE, "its node failed"),
    (AT_WORK + BY_HAND, "cancelled by scancel"),
    (AT_WORK, "killed without a word"),
    ("", "killed without a word"),
    (RAISED + EXITED, "SdwnError: the model is gone"),
    (RAISED + OOM, "SdwnError: the model is gone"),
    # An earlier start's end is not this one's, nor an exception that work went on after.
    (AT_WORK + PREEMPTED + RAISED + EXITED, "the model is gone"),
    (RAISED + AT_WORK + KILLED, "killed (SIGKILL)"),
    (AT_WORK + PREEMPTED + AT_WORK + KILLED, "killed (SIGKILL)"),
    (AT_WORK + END, "is gone: deleted or moved"),
    (AT_WORK + "2026-01-01 00:00:09,000 Requeued job 7 (9 remaining timeouts)\n", "time limit"),
    (AT_WORK + "usage: unknown option\n" + EXITED, "usage: unknown option"),
]


def test_the_cause_of_a_tasks_end_is_read_from_its_log(tmp_path: Path) -> None:
    for number, (text, expected) in enumerate(CAUSES):
        paths = RunPaths(tmp_path / str(number))
        logged(paths, [text])
        assert expected in failure(paths, 0), text


def test_a_process_is_told_by_its_own_end(planned: PlanRun) -> None:
    """SLURM writes of all processes into the first one's log."""
    paths, _ = planned()
    logged(paths, [AT_WORK + KILLED.replace("task 0", "task 1") + AT_WORK + RAISED, AT_WORK])
    assert "the model is gone" in failure(paths, 0)
    assert "killed (SIGKILL)" in failure(paths, 1)


def test_after_a_time_limit_the_printed_command_asks_for_twice_the_time(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned()
    logged(paths, [AT_WORK + LIMIT + KILLED])
    monkeypatch.setattr(scheduler, "squeue", lambda *_, **__: {})
    site = validated(ClusterProfile, {"time": "1:30:00"}, source="test")
    callbacks = (lambda _: None), print, "sdwn retry run --wait"
    with pytest.raises(SdwnError, match=r"time limit .*with: sdwn retry run --wait --time 180"):
        complete(WorkOrder(paths, plan, {GENERATE.name: GENERATE}, site), -1, *callbacks)


def test_a_setup_line_that_failed_is_told_for_every_process_with_its_own_words(
    planned: PlanRun,
) -> None:
    paths, plan = planned()
    text = "slurm_script: line 9: modul: command not found\n"
    text += "setup failed with exit code 127: modul load cuda\n"
    logged(paths, [text, ""])
    (paths.jobs / "7/7_1_log.err").unlink()
    for shard in (0, 1):
        told = failure(paths, shard)
        assert "setup failed with exit code 127: modul load cuda: slurm_script: line 9" in told
    # retry would take the profile as it was.
    ended = replace(run_status(paths, plan), jobs_live=0, failures=[told])
    assert next_command(paths, plan, ended) == f"sdwn submit {paths.root} --profile PROFILE"


def test_a_task_that_never_started_says_its_last_line(planned: PlanRun) -> None:
    paths, _ = planned()
    logged(paths, ["bash: line 3: /opt/python: No such file or directory\n"])
    (paths.jobs / "7/7_0_log.out").unlink()
    assert failure(paths, 0).startswith("bash: line 3: /opt/python")


@pytest.mark.process
def test_a_local_task_that_is_killed_is_told_as_killed(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, _ = planned(**SLOW)
    sdwn("submit", paths.root, "--array-parallelism", "1")
    wait_until(lambda: list(paths.tasks.glob("*.json")) if paths.tasks.is_dir() else [])
    os.kill(workers(paths)[0], signal.SIGKILL)
    wait_until(lambda: not live_jobs(paths))
    assert "killed without a word" in sdwn.json("status", paths.root)["failures"][0]


def test_the_space_that_is_missing_is_told(
    generated: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = generated()
    for shard in plan.shards[1:]:
        paths.shard(shard.index).unlink()
    said = "OSError: [Errno 28] No space left on device"
    size = paths.shard(0).stat().st_size * (len(plan.shards) - 1)
    usage = shutil.disk_usage(paths.root)
    monkeypatch.setattr(status.shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    assert "are missing" in str(status.shortage(paths, plan, said))
    monkeypatch.setattr(status.shutil, "disk_usage", lambda _: usage._replace(free=size * 2))
    assert "quota" in str(status.shortage(paths, plan, said))
    assert status.shortage(paths, plan, "killed") is None


# Restarts, and what waits in vain


def test_a_restart_is_counted_once_it_began_whatever_ends_it(
    planned: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned()
    names = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    for name, value in {**names, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    for start in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        with pytest.raises(Exception, match="submitted for plan"):
            ArrayTask(GENERATE, str(paths.root), (0,), plan="another")()
        assert run_status(paths, plan).restarts == start


REASONS = (
    "JobHeldUser",
    "JobHeldAdmin",
    "launch failed requeued held",
    "PartitionTimeLimit",
    "BadConstraints",
    "job requeued in held state",
    "QOSMaxWallDurationPerJobLimit",
    "AssocGrpCPUMinutesLimit",
    "InvalidQOS",
    "DependencyNeverSatisfied",
)
PASSING = (
    "Resources",
    "Priority",
    "Dependency",
    "BeginTime",
    "JobArrayTaskLimit",
    "None",
    "AssocGrpCpuLimit",
    "QOSMaxJobsPerUserLimit",
    "Licenses",
    "ReqNodeNotAvail",
)


@given(st.lists(st.sampled_from(REASONS + PASSING), max_size=12))
def test_what_waits_in_vain_is_told_and_nothing_else(reasons: list[str]) -> None:
    live = {Job(f"7_{n}", (n,)): JobState("PENDING", why) for n, why in enumerate(reasons)}
    found = cannot_start(live)
    assert set(found) == set(reasons) & set(REASONS)
    assert all(text.startswith(f"job 7 cannot start ({why}): ") for why, text in found.items())


# Displays


def test_work_under_way_is_a_line_a_minute_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(f"7_{number}", (number,)) for number in range(3)]
    with console.progress("making images", 400, start=100) as bar:
        bar.look({})
        bar.advance(10)
        assert capsys.readouterr().err == "", "not before a minute, or the first job"
        states = [JobState("PENDING", "Resources"), JobState("RUNNING", "None")]
        bar.look(dict(zip(jobs, [*states, states[1]], strict=True)))
        said = capsys.readouterr().err
        assert "110/400 images (27 %); job 7: 1 queued (no free nodes), 2 running" in said
        monkeypatch.setattr(console, "REPORT_SECONDS", 0)
        bar.look({jobs[0]: states[1]})
        assert "job 7: 1 running, 2 ended; 0 s elapsed" in capsys.readouterr().err
        bar.note("batch 20, 3 of 10")
        assert "batch 20, 3 of 10; 0 s elapsed" in capsys.readouterr().err


def test_a_terminal_shows_the_same_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(console, "stderr", drawn)
    with console.progress("measuring") as bar:
        bar.look({Job("7", (0,)): JobState("RUNNING")})
        bar.note("batch 20, 3 of 10")
        drawn.print(bar)
    shown = drawn.file.getvalue()
    for text in ("measuring", "job 7: 1 running", "batch 20, 3 of 10", "0 s elapsed"):
        assert text in shown


# Terminals


@pytest.mark.process
def test_tasks_of_this_machine_outlive_the_terminal(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, plan = planned(catalog={"roots": ["corgi.n.01"]})
    assert leaving_advice(paths) is None, "nothing goes on before anything was submitted"
    shell = os.fork()
    if shell == 0:
        # A terminal's foreground: its signals go to all of the group.
        os.setpgid(0, 0)
        process = sdwn.start("submit", paths.root, "--array-parallelism", "1")
        process.wait()
        os._exit(process.returncode)
    assert os.waitpid(shell, 0)[1] == 0
    with pytest.raises(ProcessLookupError):  # none of the terminal's is left to be reached
        os.killpg(shell, signal.SIGHUP)
    assert f"sdwn status {paths.root}" in str(leaving_advice(paths))
    wait_until(lambda: not unfinished_shards(paths, plan))
    wait_until(lambda: not live_jobs(paths))
    assert leaving_advice(paths) is None


# Later stages


@pytest.mark.process
def test_a_later_stage_that_failed_is_told_and_gone_on_with(sdwn: Sdwn, planned: PlanRun) -> None:
    judge = {"model": "efficientnet-lite0"}
    paths, _ = planned(catalog={"roots": ["corgi.n.01"]}, evaluation=judge)
    (paths.release / "mine").mkdir(parents=True)
    then = ("--wait", "--then", "merge,evaluate,report")
    refused = sdwn("submit", paths.root, *then, code=1).stderr
    assert "merge failed: " in refused
    assert f"resume with: sdwn retry {paths.root} --wait" in " ".join(refused.split())
    then = sdwn.json("status", paths.root)["then"]
    told = then["merge"]
    assert told.startswith("failed: ")
    assert then["evaluate"] == "not submitted yet"
    assert f"merge: {told}" in " ".join(sdwn("status", paths.root).stdout.split())
    assert str(paths.release) in sdwn("logs", paths.root).stdout
    shutil.rmtree(paths.release)
    advice = sdwn("retry", paths.root).stderr
    again = f"merge, evaluate, report; resume with: sdwn retry {paths.root} --wait"
    assert again in " ".join(advice.split())
    stages = ["merge", "evaluate", "report"]
    assert list(sdwn.json("retry", paths.root, "--wait")["then"]) == stages
    status = sdwn.json("status", paths.root)
    assert status["then"] == dict.fromkeys(stages, "done")
    assert status["shards_failed"] == status["shards_missing"] == 0
    assert list(paths.release.glob("evaluations/*/report.html"))
    assert "then" not in sdwn.json("retry", paths.root, "--wait"), "nothing is left to do"


def test_status_shows_what_there_is_and_equal_notes_once(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, plan = planned()
    shown = sdwn("status", paths.root).stdout
    assert "without gpu" not in shown
    assert "none" not in shown
    text = "a sentence that is told to its end " * 8
    for job in range(7):
        write_note(paths, paths.note(str(job), 0, NO_GPU), text)
    told = run_status(paths, plan).without_gpu
    assert told == [f"jobs 0.0, 1.0, 2.0, 3.0, 4.0: {text.strip()}", "and 2 more"]
    assert "without gpu" in sdwn("status", paths.root).stdout


@pytest.mark.process
def test_the_watch_ends_with_the_last_stage(
    sdwn: Sdwn, generated: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "WATCH_SECONDS", 0.2)
    paths, plan = generated()
    waiting = sdwn.start("submit", paths.root, "--wait", "--then", "merge")
    wait_until(lambda: run_status(paths, plan).then)
    monkeypatch.setattr(console, "REPORT_SECONDS", 0)
    first, *_, last = sdwn("status", paths.root, "--watch").stdout.splitlines()
    assert first == f"{plan.images}/{plan.images} images (100 %)", "a line a look into a pipe"
    assert last == f"next: sdwn evaluate {paths.release}"
    assert "merge: done" in sdwn("status", paths.root).stdout
    assert waiting.wait(timeout=60) == 0


def test_without_a_controller_files_and_logs_say_that_all_is_done(
    generated: PlanRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "squeue", lambda *_, **__: None)
    paths, plan = generated()
    logged(paths, [AT_WORK + END])
    site = validated(ClusterProfile, {}, source="test")
    settle(
        paths, intend(paths, [ArrayTask(LATER_STAGES["merge"], str(paths.root), ())], site), ["8"]
    )
    found = run_status(paths, plan)
    assert found.then["merge"].startswith("unknown")
    assert found.jobs_live == 1, "the merge may live; what made finished shards does not matter"
    (paths.jobs / "8").mkdir()
    (paths.jobs / "8/8_0_log.err").write_text(END)
    assert run_status(paths, plan).then == {"merge": "done"}
    assert run_status(paths, plan).jobs_live == 0, "a watch ends"


# Trials


@pytest.mark.process
def test_a_pilot_that_was_left_is_taken_up_again(sdwn: Sdwn, planned: PlanRun) -> None:
    # Some seconds: long enough to be left, asked again with another question, and joined.
    paths, plan = planned(generation={"num_inference_steps": 30})
    left = sdwn.start("pilot", paths.root)
    wait_until(lambda: live_jobs(paths.pilot))
    left.send_signal(signal.SIGINT)
    _, log = left.communicate(timeout=60)
    assert "resume with the same command" in " ".join(log.split())
    other = sdwn("pilot", paths.root, "--time", "7", code=1).stderr
    assert "a pilot is running" in other, "another question is another pilot"
    # Two at once are one, and each says what it is at.
    steps, site = [list[str](), list[str]()], load_profile("local")

    def ask(place: int) -> Any:
        callbacks = TrialCallbacks(lambda _: None, lambda _: None, steps[place].append)
        return run_pilot(paths, plan, site, callbacks)["images"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == [20, 20]
    for told in steps:
        assert [one for one in told if re.fullmatch(r"images, \d+ of 20|timing batch .* of 3", one)]
    assert len(read_journal(paths.pilot)) == 1, "it was not submitted again"
    assert not paths.pilot.question.exists(), "its answer is taken: the next one is a new one"


@pytest.mark.process
def test_a_tuning_that_was_left_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A cache of its own: what is tuned here would be the batch size of every later test.
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "cache"))
    folders: list[Path] = []

    def leave(_: Any) -> None:
        raise KeyboardInterrupt

    config = noise_config()
    with pytest.raises(KeyboardInterrupt):
        tune_by_jobs(config, HERE, [], TrialCallbacks(folders.append, leave))
    (found,) = tune_by_jobs(config, HERE, [], TrialCallbacks(folders.append, lambda _: None))
    assert found.tuning.batch_size > 0
    assert folders[0] == folders[1]
    assert len(read_journal(RunPaths(folders[0]))) == 1
    assert not RunPaths(folders[0]).question.exists()
    # What its task was at, for whoever follows it.
    assert re.fullmatch(r"batch \d+, \d+ of 10\n", (folders[0] / "step-0.txt").read_text())


# Advice


# What is given, and what is said of it; {0} is the folder of both.
MISPLACED = [
    ("report run", "use: sdwn report run/release"),
    ("verify run", "use: sdwn verify run/release"),
    ("browse run", "use: sdwn browse run/release"),
    ("show run dog", "use: sdwn show run/release"),
    ("evaluate run", "use: sdwn evaluate run/release"),
    ("status run/release", "use: sdwn status {0}/run"),
    ("retry run/release", "use: sdwn retry {0}/run"),
    ("status apart", "use: sdwn browse apart"),
    ("merge apart --release x", "apart is a release, and sdwn merge takes a run"),
    ("plan paper apart", "use: a folder of its own"),
    ("extend apart apart", "use: a folder of its own"),
    ("report run/release/evaluations/paper", "sdwn report {0}/run/release --evaluation paper"),
    ("verify run/release/evaluations/paper", "sdwn verify {0}/run/release"),
    ("retry run/release/evaluations/paper", "sdwn evaluate {0}/run/release"),
]


def test_a_folder_of_another_kind_is_told_with_the_command_that_takes_it(
    sdwn: Sdwn, generated: PlanRun
) -> None:
    paths, _ = generated()
    sdwn("merge", "run", "--release", "run/release")
    sdwn("merge", "run", "--release", "apart")
    evaluation = paths.release / "evaluations/paper"
    evaluation.mkdir(parents=True)
    (evaluation / "evaluation.json").write_text("{}")
    for words, expected in MISPLACED:
        said = " ".join(sdwn(*words.split(), code=2).stderr.split())
        assert expected.format(sdwn.folder) in said, words


def test_a_run_that_is_not_merged_is_to_be_merged_first(sdwn: Sdwn, planned: PlanRun) -> None:
    paths, _ = planned()
    said = " ".join(sdwn("verify", paths.root, code=2).stderr.split())
    assert f"use: sdwn merge {paths.root} --release {paths.release}" in said
