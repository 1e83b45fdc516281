"""The main job on a real SLURM: arrays, preemption, kills, and what status says of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sdwn.generation.task import GENERATE
from sdwn.jobs.journal import read_journal
from sdwn.jobs.profile import load_profile
from sdwn.jobs.submit import follow, submit_tasks
from sdwn.jobs.task import ArrayTask
from sdwn.paths import RunPaths

from conftest import (
    NOISE,
    PlanRun,
    Sdwn,
    Testbed,
    profile_for_testbed,
    wait_until,
    workers,
)
from test_cli import readme_commands
from test_generate import images

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]

# A shard takes four seconds: long enough to be caught in the middle.
SLOW: dict[str, Any] = {
    "generation": {"num_inference_steps": 10},
    "storage": {"images_per_shard": 40},
}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The testbed's profile, but every batch goes to disk at once, as a slow model's does."""
    return profile_for_testbed(tmp_path, 'environment: {SDWN_FLUSH_SECONDS: "0"}')


def some_pieces(paths: RunPaths) -> bool:
    return any(paths.pieces.rglob("*-*.h5")) if paths.pieces.is_dir() else False


def signal_until(jobs: Sequence[str], done: Callable[[], Any]) -> None:
    """Send the signal that SLURM sends ahead of a time limit, until something is seen.

    scancel sends it again, seconds later, to a job that was just requeued, and a task that still
    starts dies of it.
    """
    with subprocess.Popen(["scancel", "--signal=USR2", *jobs], stderr=subprocess.DEVNULL) as told:
        wait_until(done)
        told.kill()


def verified(sdwn: Sdwn, paths: RunPaths) -> None:
    release = paths.root / "release"
    sdwn("merge", paths.root, "--release", release)
    assert sdwn.json("verify", release)["ok"]


@pytest.fixture
def undisturbed(generated: PlanRun) -> list[Any]:
    """The images as they come out undisturbed; a step of noise only takes time."""
    paths, _ = generated("undisturbed", storage=SLOW["storage"])
    return images(paths)


@contextmanager
def visited(command: str, folder: Path) -> Iterator[str]:
    """Run a server as a user does: read its address, and end it by Ctrl-C."""
    words = shlex.split(command, comments=True)
    with subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert "Traceback" not in log


def test_the_worked_run_of_the_readme(testbed: Testbed, sdwn: Sdwn, tmp_path: Path) -> None:
    """The README's lines for the test cluster, fewer images, steps and tasks, without its start."""
    lines = [line for line in readme_commands("testbed") if line.startswith("sdwn ")]
    assert len(lines) >= 6
    servers = [line for line in lines if line.startswith("sdwn browse ")]
    fewer = "generation.num_inference_steps=2 images_per_synset=4 storage.images_per_shard=160"
    shown = ""
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        changes = [word for one in fewer.split() for word in ("--set", one)]
        if line not in servers:
            shown += sdwn(*words, *changes * (words[0] == "plan")).stdout
    assert re.search(r"zebra\.n\.01 +n02391049", shown), "sdwn show"
    for line in servers:
        with visited(line, tmp_path) as address:
            page = urllib.request.urlopen(f"{address}?q=zebbra", timeout=60).read().decode()
            assert "n02391049" in page, "a typing error is forgiven"
    answers = json.loads((tmp_path / "RUN/pilot/answers.json").read_text())
    assert (answers["images"], answers["run_images"], answers["run_tasks"]) == (20, 160, 1)
    assert list((tmp_path / "RUN/pilot/jobs").glob("*/*_0_log.err"))
    assert (tmp_path / "RUN/pilot/contact-sheet.png").stat().st_size > 0
    report = next(tmp_path.rglob("report.html"))
    assert "160 synthetic images" in report.read_text()
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert {kind["device"] for kind in manifest["made_on"]} == {"cpu"}


def test_an_array_makes_the_same_images(
    sdwn: Sdwn, planned: PlanRun, undisturbed: list[Any], testbed: Testbed, site: Path
) -> None:
    paths, plan = planned(**SLOW)
    submitted = sdwn.json("submit", paths.root, "--profile", site, "--cpus-per-task", "2")
    assert submitted["shards"] == submitted["submitted"] == len(plan.shards)
    array = {job.partition("_")[0] for job in submitted["job_ids"]}
    assert len(array) == 1, "one array"
    assert submitted["job_ids"] == [f"{array.copy().pop()}_{i}" for i in range(len(plan.shards))]
    assert sdwn.json("submit", paths.root, "--profile", site)["submitted"] == 0
    wait_until(lambda: sdwn.json("status", paths.root)["shards_running"] > 0)
    status = sdwn.json("status", paths.root)
    assert status["shards_running"] <= 2, "array_parallelism"
    assert status["shards_pending"] > 0
    wait_until(lambda: workers(paths))
    assert b"SLURM_CPUS_PER_TASK=2\0" in environment(workers(paths)[0])
    assert b"OMP_NUM_THREADS=2\0" in environment(workers(paths)[0])
    assert sdwn.json("retry", paths.root, "--wait")["submitted"] == 0, "follows what runs"
    status = sdwn.json("status", paths.root)
    assert status["images_done"] == plan.images
    assert status["shards_failed"] == status["restarts"] == 0
    assert images(paths) == undisturbed
    verified(sdwn, paths)
    table = json.loads((paths.root / "release/manifest.json").read_text())
    assert table["made_on"][0]["task_runs"] == len(plan.shards)


def test_a_failure_is_told_with_its_last_line(
    sdwn: Sdwn, planned: PlanRun, testbed: Testbed, site: Path
) -> None:
    paths, plan = planned(model={"name": "/nowhere/model"}, storage={"images_per_shard": 1000})
    failed = sdwn(
        "submit", paths.root, "--profile", site, "--wait", *("--retries", "0", "--force"), code=1
    )
    assert "no such folder" in failed.stderr
    status = sdwn.json("status", paths.root)
    assert status["shards_failed"] == len(plan.shards)
    assert "/nowhere/model: no such folder" in status["failures"][0]
    shown = sdwn("logs", paths.root, "--shard", "0").stdout
    assert "/nowhere/model: no such folder" in shown


def test_a_setup_line_that_fails_ends_the_task_at_once_with_its_text(
    sdwn: Sdwn, planned: PlanRun, testbed: Testbed, tmp_path: Path
) -> None:
    paths, _ = planned(storage={"images_per_shard": 1000})
    site = profile_for_testbed(tmp_path, "setup: ['echo before', 'modul load cuda', 'touch past']")
    sdwn("submit", paths.root, "--profile", site, "--wait", "--retries", "0", code=1)
    told = "setup failed with exit code 127: modul load cuda"
    assert f"shard 0: {told}: " in sdwn.json("status", paths.root)["failures"][0]
    shown = sdwn("logs", paths.root).stdout
    assert told in shown
    assert "modul: command not found" in shown
    assert "Traceback" not in shown
    assert not list(tmp_path.rglob("past"))
    jobs = ",".join(read_journal(paths)[0].ids or ())
    # The database hears of a job that ended at once in any order.
    named = ("sacct", "-nXP", "-o", "JobName", "-j", jobs)
    wait_until(lambda: re.fullmatch("run-generate-[0-9a-f]{8}", testbed.run(*named).strip()))


def test_cancel_ends_the_jobs_and_keeps_what_is_finished(
    sdwn: Sdwn, planned: PlanRun, undisturbed: list[Any], testbed: Testbed, site: Path
) -> None:
    paths, _ = planned(**SLOW)
    sdwn("submit", paths.root, "--profile", site)
    wait_until(lambda: some_pieces(paths))
    assert sdwn.json("cancel", paths.root)["cancelled"] > 0
    wait_until(lambda: not testbed.run("squeue", "--noheader"))
    status = sdwn.json("status", paths.root)
    assert status["shards_running"] == status["shards_pending"] == 0
    assert status["images_done"] > 0
    assert status["shards_cancelled"] > 0
    assert status["shards_failed"] == 0
    sdwn("retry", paths.root, "--wait")
    assert images(paths) == undisturbed


def test_interrupting_a_waiting_submit_leaves_the_jobs_running(
    sdwn: Sdwn, planned: PlanRun, undisturbed: list[Any], testbed: Testbed, site: Path
) -> None:
    paths, _ = planned(**SLOW)
    waiting = sdwn.start("submit", paths.root, "--profile", site, "--wait")
    wait_until(lambda: some_pieces(paths))
    waiting.send_signal(signal.SIGINT)
    _, log = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "the tasks continue without this command" in log
    assert f"follow them again with: sdwn retry {paths.root} --wait --retries 2" in log
    assert sdwn.json("status", paths.root)["shards_running"] > 0
    sdwn("retry", paths.root, "--wait")
    assert {one.executor for one in read_journal(paths)} == {"slurm"}
    assert images(paths) == undisturbed


def test_without_a_controller_files_still_tell(
    sdwn: Sdwn, planned: PlanRun, testbed: Testbed, site: Path
) -> None:
    paths, plan = planned(**SLOW)
    sdwn("submit", paths.root, "--profile", site)
    wait_until(lambda: some_pieces(paths))
    testbed.controller("stop")
    try:
        status = sdwn.json("status", paths.root)
        assert status["images_done"] > 0
        assert status["shards_unknown"] > 0
        assert status["shards_failed"] == 0
    finally:
        testbed.controller("start")
    sdwn("retry", paths.root, "--wait")
    assert sdwn.json("status", paths.root)["images_done"] == plan.images


def test_a_refused_submission_says_what_slurm_said(
    sdwn: Sdwn, planned: PlanRun, testbed: Testbed, site: Path
) -> None:
    paths, _ = planned()
    moon = ("--profile", site, "--partition", "moon")
    refused = sdwn("submit", paths.root, *moon, code=1).stderr
    assert "sbatch takes no such task: invalid partition" in " ".join(refused.split())
    assert not paths.submissions.exists()
    refused = sdwn("submit", paths.root, *moon, "--force", code=1).stderr
    assert "submission refused" in refused
    assert "artition" in refused
    (submission,) = read_journal(paths)
    assert submission.refused
    assert not list(paths.jobs.glob("*.pkl")), "nothing is left behind"


def records(paths: RunPaths) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(paths.tasks.glob("*.json"))]


TWO = ("--gres", "gpu:2", "--cpus-per-task", "1")


def test_a_process_that_dies_leaves_its_peer_alone(
    sdwn: Sdwn, planned: PlanRun, undisturbed: list[Any], testbed: Testbed, site: Path
) -> None:
    """The second of two dies; the first one finishes its own shards, and the rest is retried."""
    paths, plan = planned(**SLOW)
    each = str(-(-len(plan.shards) // 2))
    options = (*TWO, "--shards-per-task", each)
    assert len(sdwn.json("submit", paths.root, "--profile", site, *options)["job_ids"]) == 1
    wait_until(lambda: len(workers(paths)) >= 2 and len(records(paths)) == 2)
    assert {record["rank"] for record in records(paths)} == {0, 1}
    second = next(p for p in workers(paths) if b"SLURM_PROCID=1\0" in environment(p))
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: not testbed.run("squeue", "--noheader"))
    assert paths.done_shards() >= set(range(0, len(plan.shards), 2)), "all that the first had"
    status = sdwn.json("status", paths.root)
    assert status["shards_failed"] == len(plan.shards) - status["shards_done"] > 0
    assert sdwn.json("retry", paths.root, "--wait")["submitted"] > 0
    assert images(paths) == undisturbed


def environment(process: int) -> bytes:
    return Path(f"/proc/{process}/environ").read_bytes()


def test_the_first_process_waits_for_its_peer_and_a_time_limit_loses_neither(
    sdwn: Sdwn, planned: PlanRun, undisturbed: list[Any], testbed: Testbed, site: Path
) -> None:
    """Only the first asks for a requeue; its own shards are finished long before the other's."""
    paths, plan = planned(**SLOW)
    generated = RunPaths(paths.root.parent / "undisturbed")
    paths.shards.mkdir()
    for index in range(0, len(plan.shards), 2):
        (paths.shards / f"{index:05d}.h5").write_bytes(generated.shard(index).read_bytes())
    each = str(len(plan.shards))
    everything = [ArrayTask(GENERATE, str(paths.root), tuple(range(len(plan.shards))))]
    chosen = load_profile(str(site), {"gres": "gpu:2", "shards_per_task": each})
    (job,) = submit_tasks(paths, everything, chosen)
    # A process that still starts would die of the signal: the first one is past that once it says
    # that there is nothing to do.
    wait_until(
        lambda: any("finished already" in log.read_text() for log in paths.jobs.rglob("*.err"))
    )
    wait_until(lambda: some_pieces(paths))
    assert len(workers(paths)) >= 2, "the first has nothing to do and is still there"
    signal_until(
        [job.id],
        lambda: any("Calling checkpoint" in log.read_text() for log in paths.jobs.rglob("*.err")),
    )
    wait_until(lambda: sdwn.json("status", paths.root)["restarts"] > 0)
    follow(paths, lambda _: None)
    assert images(paths) == undisturbed


def test_a_time_limit_puts_finished_images_on_disk_and_requeues(
    sdwn: Sdwn, planned: PlanRun, undisturbed: list[Any], testbed: Testbed, tmp_path: Path
) -> None:
    # The signal that SLURM sends ahead of the limit, sent now.
    slow = profile_for_testbed(tmp_path, 'environment: {SDWN_FLUSH_SECONDS: "1000"}')
    paths, _ = planned(**SLOW)
    sdwn("submit", paths.root, "--profile", slow)
    wait_until(lambda: len(records(paths)) > 0)
    time.sleep(1.5)
    assert not some_pieces(paths)
    # A task that still starts would die of the signal.
    signal_until([record["job"] for record in records(paths)], lambda: some_pieces(paths))
    logs = list(paths.jobs.rglob("*_0_log.err"))
    wait_until(lambda: any("Calling checkpoint method" in log.read_text() for log in logs))
    assert sdwn.json("retry", paths.root, "--wait")["submitted"] == 0
    assert images(paths) == undisturbed


def test_each_kind_of_gpu_is_tuned_by_a_job(
    sdwn: Sdwn, testbed: Testbed, site: Path, tmp_path: Path
) -> None:
    """The test cluster's GPUs are names only: both jobs find none, and measure nothing."""
    config = tmp_path / "small.yaml"
    config.write_text(json.dumps({**NOISE, "model": {"name": "builtin:tiny"}}))
    refused = sdwn("tune", config, "--profile", site, "--gpus", "a100,v100", code=1)
    assert "nothing is measured: a GPU was given (number 0) and torch finds none" in refused.stderr
    nodes = {line.split("|")[0] for line in testbed.run("sacct", "-nXP", "-o", "NodeList").split()}
    assert {"n1", "n3"} <= nodes or {"n2", "n4"} <= nodes or len(nodes) > 1
    refused = sdwn("tune", config, "--profile", site, "--gpus", "h100", code=1)
    assert "submission refused" in refused.stderr
