"""What must not lose an image: each disturbance ends with the release of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sdwn.evaluation.verify import verify
from sdwn.generation.task import generate
from sdwn.jobs.profile import load_profile
from sdwn.jobs.submit import WorkOrder, follow, submit_array
from sdwn.models.builtin import builtin_folder
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan
from sdwn.releases.merge import merge
from sdwn.workflow.status import run_status
from sdwn.workflow.submitting import RUN_STAGES

from conftest import REPOSITORY, TESTBED, PlanRun, Sdwn, Testbed, free_ports, wait_until, workers

# A shard takes four seconds: long enough to be caught in the middle.
SLOW: dict[str, Any] = {
    "generation": {"num_inference_steps": 10},
    "storage": {"images_per_shard": 40},
}
IDENTITY = ["wnid", "synset", "number", "seed", "prompt", "status", "sha256", "bytes"]

long = pytest.mark.long


def content(paths: RunPaths) -> dict[str, list[Any]]:
    """Merge a run, verify all of the release, and give what identifies each image."""
    release = merge([paths], ReleasePaths(paths.release))
    assert list(verify(paths.release, quick=False)) == []
    table: dict[str, list[Any]] = release.metadata.select(IDENTITY).to_pydict()
    return table


@pytest.fixture
def expected(generated: PlanRun) -> dict[str, list[Any]]:
    """The release as it comes out undisturbed; a step of noise only takes time."""
    return content(generated("undisturbed", storage=SLOW["storage"])[0])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The testbed's profile, but every batch goes to disk at once, as a slow model's does."""
    return flushing(tmp_path / "site.yaml", "testbed")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The same for processes of this machine."""
    return flushing(tmp_path / "here.yaml", "local")


def flushing(path: Path, profile: str) -> Path:
    shipped = (REPOSITORY / f"slurm/profiles/{profile}.yaml").read_text()
    path.write_text(shipped + '\nenvironment: {SDWN_FLUSH_SECONDS: "0"}\n')
    return path


def pieces(paths: RunPaths) -> int:
    return len(list(paths.pieces.rglob("*-*.h5"))) if paths.pieces.is_dir() else 0


def waited(process: subprocess.Popen[str], seconds: float = 300) -> None:
    _, log = process.communicate(timeout=seconds)
    assert process.returncode == 0, log


def restarts(paths: RunPaths, plan: Plan) -> int:
    return run_status(paths, plan).restarts


@long
@pytest.mark.slurm
def test_preempted_by_a_job_in_the_high_partition(
    sdwn: Sdwn, planned: PlanRun, expected: Any, cluster: Testbed, site: Path
) -> None:
    paths, plan = planned(**SLOW)
    # Longer than the five seconds that SLURM lets a preempted job live.
    waiting = sdwn.start(
        "submit", paths.root, "--profile", site, "--shards-per-task", "3", "--wait"
    )
    wait_until(lambda: pieces(paths))
    request = ("--partition=high", "--nodes=4", "--gres=gpu:2", "--output=/dev/null")
    cluster.run("sbatch", *request, "--wrap=sleep 1")
    waited(waiting)
    assert restarts(paths, plan) > 0
    assert content(paths) == expected


@long
@pytest.mark.slurm
def test_a_time_limit_so_short_that_a_shard_takes_three_requeues(
    sdwn: Sdwn, planned: PlanRun, generated: PlanRun, cluster: Testbed, site: Path
) -> None:
    one = {"images_per_shard": 1000}
    paths, plan = planned(generation={"num_inference_steps": 60}, storage=one)
    assert len(plan.shards) == 1
    # SLURM counts in minutes and warns up to half a minute late or early: two minutes of work.
    short = ("--time", "1", "--profile", site)
    waited(sdwn.start("submit", paths.root, *short, "--wait", "--retries", "0"), 600)
    assert restarts(paths, plan) >= 3
    assert content(paths) == content(generated("undisturbed", storage=one)[0])


@long
def test_a_worker_killed_at_twenty_random_moments(
    sdwn: Sdwn, planned: PlanRun, expected: Any, here: Path
) -> None:
    paths, _ = planned(generation={"num_inference_steps": 40}, storage=SLOW["storage"])
    waiting = sdwn.start("submit", paths.root, "--profile", here, "--wait", "--retries", "30")
    chance = random.Random(1)
    for _ in range(20):
        wait_until(lambda: workers(paths))
        time.sleep(3 * chance.random())
        for process in workers(paths)[:1]:
            os.kill(process, signal.SIGKILL)
    waited(waiting)
    assert content(paths) == expected


@long
@pytest.mark.slurm
def test_a_node_dies_with_all_that_runs_on_it(
    sdwn: Sdwn, planned: PlanRun, expected: Any, cluster: Testbed, site: Path
) -> None:
    paths, plan = planned(generation={"num_inference_steps": 40}, storage=SLOW["storage"])
    waiting = sdwn.start("submit", paths.root, "--profile", site, "--wait")
    wait_until(lambda: pieces(paths))
    node = cluster.run("squeue", "--noheader", "--states=R", "--format=%N").split()[0]
    cluster.node(node, "kill")
    try:
        waited(waiting)
    finally:
        cluster.node(node, "start")
    assert restarts(paths, plan) > 0
    assert content(paths) == expected


@long
@pytest.mark.slurm
def test_two_tasks_hold_one_shard(
    sdwn: Sdwn, planned: PlanRun, expected: Any, cluster: Testbed, site: Path
) -> None:
    paths, plan = planned(**SLOW)
    profile = load_profile(str(site))
    tasks = WorkOrder(paths, plan, RUN_STAGES, profile).tasks_for(range(len(plan.shards)))
    for _ in range(2):
        submit_array(paths, tasks, profile, print)
    follow(paths, lambda _: None)
    hosts = [json.loads(path.read_text()) for path in paths.tasks.glob("*.json")]
    assert len(hosts) > len(plan.shards), "both made some of the same"
    assert content(paths) == expected


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_then_space_again(
    sdwn: Sdwn, planned: PlanRun, expected: Any, here: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", small], check=True)
    try:
        paths, plan = planned("small/run", storage=SLOW["storage"])
        once = ("--wait", "--retries", "0")
        waiting = sdwn.start("submit", paths.root, "--profile", here, *once)
        wait_until(lambda: run_status(paths, plan).waited)
        assert "no space or quota left" in run_status(paths, plan).waited[0]
        assert len(paths.done_shards()) < len(plan.shards)
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        waited(waiting)
        assert content(paths) == expected
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.process
def test_one_bit_flipped_in_a_finished_shard(
    sdwn: Sdwn, generated: PlanRun, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = generated("flipped", storage=SLOW["storage"])
    shard = paths.shard(len(plan.shards) // 2)
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 3] ^= 1 << 5
    shard.write_bytes(damaged)
    refused = sdwn("merge", paths.root, "--release", paths.release, code=1).stderr
    assert shard.name in refused
    # The cure that the error names, as it stands.
    cure = " ".join(refused.split()).partition("make it again with: ")[2].partition(";")[0]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cure.startswith(f"rm {shard} && sdwn submit {paths.root}")
    subprocess.run(["bash", "-c", cure], check=True, capture_output=True)
    assert content(paths) == expected


@long
@pytest.mark.slurm
def test_the_controller_stops_while_tasks_run(
    sdwn: Sdwn, planned: PlanRun, expected: Any, cluster: Testbed, site: Path
) -> None:
    paths, _ = planned(generation={"num_inference_steps": 20}, storage=SLOW["storage"])
    waiting = sdwn.start("submit", paths.root, "--profile", site, "--wait")
    wait_until(lambda: pieces(paths))
    cluster.controller("stop")
    try:
        time.sleep(10)
    finally:
        cluster.controller("start")
    waited(waiting)
    assert content(paths) == expected


@pytest.fixture
def without_accounting(testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another test cluster, without a database."""
    folder = Path(tempfile.mkdtemp(prefix="sdwn-"))
    options = ["--dir", folder, "--no-accounting", "--port-base", str(free_ports(6))]
    try:
        done = subprocess.run(
            [TESTBED / "up", *options], capture_output=True, text=True, check=True
        )
        monkeypatch.setenv("SLURM_CONF", done.stdout.strip().partition("=")[2])
        yield
    finally:
        subprocess.run([TESTBED / "down", "--dir", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


@long
@pytest.mark.slurm
@pytest.mark.usefixtures("without_accounting")
def test_no_accounting(sdwn: Sdwn, planned: PlanRun, expected: Any, site: Path) -> None:
    paths, plan = planned(**SLOW)
    # Longer than the five seconds that a requeued job may live on.
    options = ("--profile", site, "--shards-per-task", "3", "--wait")
    waiting = sdwn.start("submit", paths.root, *options)
    wait_until(lambda: pieces(paths) and workers(paths))
    os.kill(workers(paths)[0], signal.SIGKILL)
    wait_until(lambda: workers(paths))
    running = next(job for job, state in queue() if state == "RUNNING")
    subprocess.run(["scontrol", "requeue", running], check=True)
    waited(waiting)
    assert restarts(paths, plan) > 0
    assert content(paths) == expected


def queue() -> list[list[str]]:
    command = ["squeue", "--noheader", "--array", "--format=%i %T"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split() for line in lines.splitlines()]


@pytest.mark.process
def test_a_pipeline_that_gives_nan_images(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path, here: Path
) -> None:
    """A text encoder that knows no "k": images of prompts that have one are NaN in float32 too."""
    settings: dict[str, Any] = {
        "catalog": {"roots": ["springer_spaniel.n.01"]},
        "images_per_synset": 10,
        "model": {"name": str(without_letter("k", tmp_path / "model"))},
        "generation": {"height": 32, "width": 32, "num_inference_steps": 4, "batch_size": 2},
        "storage": {"images_per_shard": 10},
    }
    undisturbed, plan = planned("undisturbed", **settings)
    generate(undisturbed.root, range(len(plan.shards)))
    calm = content(undisturbed)
    paths, _ = planned(**settings)
    one = ("--array-parallelism", "1", "--wait")
    waiting = sdwn.start("submit", paths.root, "--profile", here, *one)
    wait_until(lambda: pieces(paths) and workers(paths))
    os.kill(workers(paths)[0], signal.SIGKILL)
    waited(waiting)
    assert content(paths) == calm
    nan = [status == "nan" for status in calm["status"]]
    assert nan == ["k" in prompt for prompt in calm["prompt"]]
    assert any(nan)
    assert not all(nan)


def without_letter(letter: str, folder: Path) -> Path:
    """Copy the built-in pipeline, with an embedding of a letter that is no number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(builtin_folder("tiny"), folder)
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    path = folder / "text_encoder/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    for symbol in (letter, f"{letter}</w>"):
        weights[name][vocabulary[symbol]] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return folder
