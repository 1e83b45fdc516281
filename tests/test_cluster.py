from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sdwn.cli.options import SITE
from sdwn.config import validated
from sdwn.devices.device import given_gpus
from sdwn.errors import UsageError
from sdwn.evaluation.evaluate import IMAGE_STAGES
from sdwn.generation.task import GENERATE
from sdwn.jobs.journal import failure, intend, read_journal, settle
from sdwn.jobs.profile import (
    ClusterProfile,
    group_into_tasks,
    job_script,
    load_profile,
    minutes,
    split_into_arrays,
)
from sdwn.jobs.task import ArrayTask, Process, see_one_device, this_process
from sdwn.preflight.doctor import NODE_CHECK
from sdwn.preflight.trials import PILOT, TUNE
from sdwn.workflow.submitting import RUN_STAGES

from conftest import REPOSITORY, PlanRun, Sdwn, noise_config, submit_shards, wait_until

PROFILES = sorted((REPOSITORY / "slurm/profiles").glob("*.yaml"))


def profile(**fields: Any) -> ClusterProfile:
    return validated(ClusterProfile, fields, source="test")


def sbatch_lines(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line]
    pairs = (line.partition("=") for line in lines)
    return {name: value.strip("'\"") for name, _, value in pairs}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_shipped_profile_loads_and_writes_a_script(path: Path, tmp_path: Path) -> None:
    site = load_profile(str(path))
    assert "sdwn" in job_script(3, tmp_path, site) or site.executor == "local"


def test_a_script_holds_the_sites_own_words(tmp_path: Path) -> None:
    site = profile(
        account="lab",
        partition="gpu",
        time="1-12:00:00",
        gres="gpu:a100:1",
        cpus_per_task=8,
        mem="32G",
        array_parallelism=16,
        setup=["module load cuda"],
        environment={"HF_HUB_OFFLINE": "1"},
        python="/opt/env/bin/python",
        sbatch={"mail-type": "FAIL", "exclusive": True},
    )
    text = job_script(5, tmp_path, site)
    options = sbatch_lines(text)
    assert options["account"] == "lab"
    assert options["partition"] == "gpu"
    assert options["time"] == str(36 * 60)
    assert options["gres"] == "gpu:a100:1"
    assert options["mem"] == "32G"
    assert options["array"] == "0-4%5"
    assert options["mail-type"] == "FAIL"
    assert "exclusive" in options
    assert "requeue" in options
    assert "wckey" not in options
    assert not [name for name in options if name.startswith("gpus")]
    assert "module load cuda" in text
    assert "export HF_HUB_OFFLINE=1" in text
    srun = next(line for line in text.splitlines() if line.startswith("srun"))
    assert "--cpus-per-task=8" in srun
    assert "/opt/env/bin/python -P -u -m submitit.core._submit" in srun


def test_a_time_in_a_file_is_slurms_not_yamls(tmp_path: Path) -> None:
    """In YAML 1.1 an unquoted 2:00:00 is the number 7200."""
    (tmp_path / "site.yaml").write_text("time: 2:00:00\n")
    assert minutes(load_profile(str(tmp_path / "site.yaml")).time) == 120


@given(
    st.integers(1, 300), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["local", "slurm"])
)
def test_every_piece_of_work_is_dealt_once(
    pieces: int, parallel: int, each: int, executor: str
) -> None:
    site = profile(executor=executor, array_parallelism=parallel, shards_per_task=each)
    tasks = group_into_tasks(range(pieces), site)
    assert sorted(index for task in tasks for index in task) == list(range(pieces))
    assert all(tasks)
    if executor == "local":
        assert len(tasks) <= parallel


@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_times_are_read_as_slurm_reads_them(days: int, hours: int, mins: int, secs: int) -> None:
    whole = (days * 24 + hours) * 60 + mins + (secs > 0)
    assume(whole)
    assert minutes(f"{days}-{hours:02d}:{mins:02d}:{secs:02d}") == whole
    assert minutes(f"{24 * days + hours}:{mins:02d}:{secs:02d}") == whole


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"partitoin": "gpu"}, "unknown key 'partitoin'; valid keys here: executor, account, par"),
        ({"time": "two hours"}, "time: expected a SLURM time such as 90, 2:00:00 or 1-12:00:00"),
        ({"executor": "pbs"}, "executor: Input should be 'local' or 'slurm', found 'pbs'"),
        ({"time": 0}, "time: expected a time limit of up to a year, found '0'"),
        ({"nodes": 2}, "nodes: Input should be less than or equal to 1"),
        ({"environment": {"X;touch Y": "1"}}, "expected the name of an environment variable"),
        ({"sbatch": {"x y": "1"}}, "expected a long option of sbatch, as mail-type, found 'x y'"),
        ({"sbatch": {"array": "0-3"}}, "'array' is set by sdwn itself or has a field of its own"),
        ({"sbatch": {"partition": "q"}}, "'partition' is set by sdwn itself or has a field"),
        ({"array_parallelism": 0}, "array_parallelism: Input should be greater than 0"),
        ({"mem": "16GiB"}, "mem: expected memory as 16G, 1500M or 16000 (MB), found '16GiB'"),
        ({"mem_per_cpu": "1.5G"}, "mem_per_cpu: expected memory as 16G"),
        ({"stages": {"merge": {"mem": "16 G"}}}, "stages.merge: mem: expected memory as 16G"),
        ({"gpus_per_node": 0}, "gpus_per_node: expected a number of GPUs as 4, a100 or a100:4"),
        ({"gres": "gpu:0"}, "gres: expected gpu:4, gpu:a100:4, joined by commas, found 'gpu:0'"),
        ({"gres": "gpu:1, nvme:1"}, "joined by commas, found 'gpu:1, nvme:1'"),
        ({"gres": "gpu:a100:2(S:0-1)"}, "found 'gpu:a100:2(S:0-1)'"),
        ({"gres": "4"}, "gres: expected gpu:4, gpu:a100:4, joined by commas, found '4'"),
        ({"sbatch": {"gpus": "a100:1"}}, "'gpus' is set by sdwn itself or has a field of its own"),
        ({"gres": "gpu:1", "gpus_per_node": 1}, "gres and gpus_per_node ask for the same thing"),
        ({"mem": "8G", "mem_per_cpu": "1G"}, "mem and mem_per_cpu ask for the same thing"),
    ],
)
def test_a_wrong_profile_is_explained(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError) as error:
        profile(**fields)
    assert expected in str(error.value)


def test_half_precision_wants_a_gpu_before_anything_is_submitted() -> None:
    real = noise_config(model={"name": "some/model"}, generation={"precision": "fp16"})
    with pytest.raises(UsageError, match=r"--set generation\.precision=fp32"):
        profile(executor="slurm", partition="cpu").require_fit(real)
    profile(executor="slurm", gres="gpu:1").require_fit(real)
    profile(executor="local").require_fit(noise_config(generation={"precision": "fp16"}))


@pytest.mark.process
def test_a_dry_run_shows_the_script_and_the_arrays_as_they_will_be_cut(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where SLURM is not: only its limit is asked for."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize = 11'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "site.yaml").write_text("{max_submit_jobs: 30, array_parallelism: 8, gres: gpu}")
    paths, plan = planned(storage={"images_per_shard": 5})
    command = ("submit", paths.root, "--profile", "site.yaml", "--dry-run")
    answer = sdwn.json(*command)
    assert (answer["submitted"], answer["shards"]) == (0, len(plan.shards))
    assert answer["estimate"]["tasks"] == len(plan.shards)
    assert sum(answer["arrays"]) == 30
    assert max(answer["arrays"]) <= 11
    assert sbatch_lines(answer["script"])["array"] == f"0-{answer['arrays'][0] - 1}%2"
    shown = sdwn(*command)
    assert shown.stdout == answer["script"], "nothing but the script: it may go into a file"
    assert shown.stdout.startswith("#!/bin/bash")
    assert f"{plan.images} images, {len(plan.shards)} tasks" in shown.stderr
    assert f"tasks, 2 at once; {len(plan.shards) - 30} later" in shown.stderr
    assert not paths.submissions.exists()


def test_lines_of_the_journal_that_are_cut_short_or_garbage_are_left_out(
    planned: PlanRun,
) -> None:
    paths, _ = planned()
    tasks = [ArrayTask(GENERATE, str(paths.root), (0,))]
    first = settle(paths, intend(paths, tasks, profile()), ["7"])
    with paths.submissions.open("ab") as file:
        file.write(b'3\nnull\n\xff\xfe\n{"name": "x", "tasks": [["a"]]}\n{"name": "sdwn-')
    assert read_journal(paths) == [first]
    second = settle(paths, intend(paths, tasks, profile()), ["8"])
    assert read_journal(paths) == [first, second]


def test_a_flag_replaces_the_profiles_request_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("{gres: 'gpu:1', mem: 8G, partition: main}")
    site = load_profile(
        str(tmp_path / "site.yaml"), {"gpus_per_node": "a100:1", "mem_per_cpu": "2G", "nodes": "1"}
    )
    options = sbatch_lines(job_script(2, tmp_path, site))
    assert options["gpus-per-node"] == "a100:1"
    assert options["mem-per-cpu"] == "2G"
    assert options["partition"] == "main"
    assert not {"gres", "mem"} & options.keys()


def test_every_field_that_slurm_names_has_a_flag() -> None:
    own = {"executor", "sbatch", "setup", "environment", "python", "stages"}
    own |= {"signal_delay_s", "max_num_timeout"}
    assert set(SITE) == set(ClusterProfile.model_fields) - own


@given(st.integers(1, 3000), st.integers(1, 1001), st.integers(-3, 300))
def test_arrays_keep_below_the_sites_limit_and_end_together(
    count: int, limit: int, at_once: int
) -> None:
    found = split_into_arrays(range(count), limit, at_once)
    assert [task for group, _ in found for task in group] == list(range(count))
    assert all(0 < len(group) <= limit and share <= len(group) for group, share in found)
    # One of each array runs at least, whatever was asked for.
    assert sum(share for _, share in found) == max(1, min(at_once, count), -(-count // limit))
    rounds = [len(group) / share for group, share in found]
    assert max(rounds) - min(rounds) <= 1, "the last of each ends at about the same time"


@pytest.mark.parametrize(
    ("fields", "gpus"),
    [
        ({"gpus_per_node": 4}, 4),
        ({"gpus_per_node": "a100:4"}, 4),
        ({"gres": "gpu:a100:2,nvme:1"}, 2),
        ({"gres": "gpu"}, 1),
        ({"gres": "nvme:3"}, 1),
        ({"partition": "cpu"}, 1),
        ({"gres": "gpu:4", "executor": "local"}, 1),
    ],
)
def test_each_gpu_of_a_task_has_a_process(
    fields: dict[str, Any], gpus: int, tmp_path: Path
) -> None:
    site = profile(**fields, shards_per_task=3)
    assert site.processes == gpus
    if site.executor == "slurm":
        assert [len(task) for task in group_into_tasks(range(7 * gpus), site)] == [
            3 * gpus,
            3 * gpus,
            gpus,
        ]
        text = job_script(2, tmp_path, site)
        assert sbatch_lines(text).get("ntasks-per-node") == (str(gpus) if gpus > 1 else None)
        assert ("--kill-on-bad-exit=0" in text) == (gpus > 1)


def test_one_kind_of_gpu_takes_the_place_of_another() -> None:
    assert profile(gres="gpu:v100:4,nvme:1").on_gpu("a100").gres == "gpu:a100:1,nvme:1"
    assert profile(gpus_per_node=4).on_gpu("a100").gpus_per_node == "a100:1"
    with pytest.raises(UsageError, match="--gpus needs a profile that asks for a GPU"):
        profile(partition="cpu").on_gpu("a100")


def test_a_batch_size_and_a_folder_for_weights_reach_the_task(tmp_path: Path) -> None:
    text = job_script(2, tmp_path, profile(batch_size=20, stage_weights="$TMPDIR/weights"))
    assert "export SDWN_BATCH_SIZE=20" in text
    assert "export SDWN_STAGE_WEIGHTS='$TMPDIR/weights'" in text, "the task's own TMPDIR"


def test_a_variable_within_a_value_is_the_tasks_own_and_all_else_is_as_written(
    tmp_path: Path,
) -> None:
    values = {"A": "$SCRATCH/h f", "B": "x${SCRATCH}y", "C": "$(date) `x` $1 \"'\\ 5$", "D": ""}
    site = profile(executor="local", environment=values, python="env >&2 #")
    environment = {**os.environ, "SCRATCH": "/fast"}
    words = ["bash", "-c", job_script(1, tmp_path / "jobs", site), "script", "7"]
    subprocess.run(words, env=environment, check=True)
    seen = (tmp_path / "jobs/7/7_0_log.err").read_text().splitlines()
    expected = {**values, "A": "/fast/h f", "B": "x/fasty"}
    assert {f"{name}={value}" for name, value in expected.items()} <= set(seen)


def test_a_batch_size_must_fit_the_plan() -> None:
    config = noise_config(generation={"batch_size": 10})
    profile(batch_size=10).require_fit(config)
    with pytest.raises(UsageError, match="the config pins batches of 10 images"):
        profile(batch_size=20).require_fit(config)
    with pytest.raises(UsageError, match=r"batch_size: 7 is neither .* try 5 or 10"):
        profile(batch_size=7).require_fit(noise_config())


@pytest.mark.process
def test_the_first_process_outlives_the_others(tmp_path: Path) -> None:
    """Also one that is killed; and a process that never starts is not waited for.

    What another cluster's job of the same number left is no peer of these.
    """
    code = (
        "import sys, time; from sdwn.jobs import task; task.START_SECONDS = 3.0\n"
        "rank, seconds = int(sys.argv[1]), float(sys.argv[2])\n"
        "with task.hold_until_peers_exit(task.Process('7', rank, 4)): time.sleep(seconds)\n"
        "print(time.time())"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def start(rank: int, seconds: float, name: str = "run") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(rank), str(seconds)]
        named = {**environment, "SLURM_JOB_NAME": name}
        return subprocess.Popen(command, env=named, stdout=subprocess.PIPE, text=True)

    start(1, 0, name="another").communicate(timeout=60)
    elsewhere = set(tmp_path.rglob("*.lock"))
    first, second, killed = start(0, 0), start(1, 1.5), start(2, 600)
    wait_until(lambda: sum(path.stat().st_size for path in tmp_path.rglob("run*.lock")) == 3)
    killed.kill()
    ends = [float(process.communicate(timeout=60)[0]) for process in (first, second)]
    assert ends[0] > ends[1]
    assert set(tmp_path.rglob("*.lock")) == elsewhere, "no lock is left"


@pytest.mark.process
def test_a_task_that_is_unpickled_imports_neither_torch_nor_the_hub() -> None:
    """Which GPU it sees, and that it is offline, is set after that and before both."""
    stages = (*RUN_STAGES.values(), *IMAGE_STAGES.values(), PILOT, TUNE, NODE_CHECK)
    tasks = [ArrayTask(stage, "run", (1,)) for stage in stages]
    code = (
        "import pickle, sys\n"
        "tasks = pickle.load(sys.stdin.buffer)\n"
        "print(*(task.stage.name for task in tasks))\n"
        "print(*{'torch', 'huggingface_hub', 'diffusers', 'timm'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(tasks), capture_output=True, check=True
    )
    names, heavy, *_ = done.stdout.decode().split("\n")
    expected = "generate merge evaluate report judge encode conclude pilot tune probe"
    assert names == expected, "as journals call them"
    assert not heavy


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_only_submitit_says_that_slurm_started_a_process(
    executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell within an allocation has SLURM's variables, and may start local tasks."""
    variables = {
        "SUBMITIT_EXECUTOR": executor,
        "SUBMITIT_LOCAL_JOB_ID": "123",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_PROCID": "2",
        "SLURM_NTASKS": "4",
        "SLURM_RESTART_COUNT": "1",
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "HIP_VISIBLE_DEVICES": "4,5,6,7",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    process = this_process()
    see_one_device(process)
    if executor == "slurm":
        assert process == Process("7_3", rank=2, count=4, start=1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    else:
        assert process == Process("123")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"


@pytest.mark.process
@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, {"2", "3"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-89,MIG-12/1/0"}, {"GPU-89", "MIG-12/1/0"}),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,2"}, {"1"}),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, set()),
        ({"HIP_VISIBLE_DEVICES": "6,7"}, {"6", "7"}),
        ({"ROCR_VISIBLE_DEVICES": "6,7"}, {"0", "1"}),
    ],
)
@pytest.mark.parametrize("by", ["shell", "profile"])
def test_local_tasks_get_the_gpus_that_the_user_was_given(
    variables: dict[str, str],
    seen: set[str],
    by: str,
    planned: PlanRun,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    paths, plan = planned()
    environment = {"SEEN": str(tmp_path)}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value if by == "shell" else "0")
    if by == "profile":
        environment |= variables
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" > $SEEN/$SUBMITIT_LOCAL_JOB_ID.gpu\n'
    )
    python.chmod(0o700)
    local = profile(
        executor="local", array_parallelism=2, python=str(python), environment=environment
    )
    submit_shards(paths, plan, [0, 1], local, print)
    wait_until(lambda: len([p for p in tmp_path.glob("*.gpu") if p.read_text()]) == 2)
    told = [path.read_text().strip() for path in tmp_path.glob("*.gpu")]
    assert {
        gpu for text in told for gpu in given_gpus({"CUDA_VISIBLE_DEVICES": text}) or ()
    } == seen


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))))
def test_the_processes_of_a_task_share_its_gpus(process: tuple[int, int]) -> None:
    """SLURM names AMD's by ROCR_VISIBLE_DEVICES, and at some sites all GPUs by both."""
    count, rank = process
    names = ",".join(map(str, range(4, 4 + count)))
    for variables, own in (
        ({"CUDA_VISIBLE_DEVICES": names}, 4 + rank),
        ({"ROCR_VISIBLE_DEVICES": names}, rank),
        ({"CUDA_VISIBLE_DEVICES": names, "ROCR_VISIBLE_DEVICES": names}, 4 + rank),
    ):
        with mock.patch.dict(os.environ, variables, clear=True):
            see_one_device(Process("7", rank=rank, count=count))
            assert given_gpus(os.environ) == ([str(own)] if count > 1 else given_gpus(variables))


@pytest.mark.process
def test_what_launchers_left_behind_ties_no_process_to_others() -> None:
    """With torchrun's variables, accelerate waits for processes that nobody started."""
    left = {"RANK": "1", "LOCAL_RANK": "", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    left |= {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "2"}
    left |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "CUDA_VISIBLE_DEVICES": ""}
    code = "from sdwn.devices.device import Device; print(Device().torch)"
    words, environment = [sys.executable, "-c", code], {**os.environ, **left}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "cpu"


def test_a_failure_is_read_from_the_log_of_the_process_that_had_the_shard(
    planned: PlanRun,
) -> None:
    paths, _ = planned()
    folder = paths.jobs / "7"
    folder.mkdir(parents=True)
    for rank in range(2):
        (folder / f"7_{rank}_log.err").write_text(f"process {rank} fell\n")
    tasks = [ArrayTask(GENERATE, str(paths.root), (4, 5, 6))]
    settle(paths, intend(paths, tasks, profile(gres="gpu:2")), ["7"])
    assert failure(paths, 5).startswith("process 1 fell")
    assert failure(paths, 6).startswith("process 0 fell")


@pytest.mark.process
@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("python: /opt/nothing/python", "/opt/nothing/python: No such file or directory"),
        ("setup: ['echo no licence left >&2', 'exit 3']", "no licence left"),
    ],
)
def test_a_local_task_that_cannot_start_says_why(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path, site: str, reason: str
) -> None:
    paths, _ = planned()
    (tmp_path / "site.yaml").write_text(f"executor: local\narray_parallelism: 1\n{site}\n")
    sdwn("submit", paths.root, "--profile", "site.yaml", "--wait", "--retries", "0", code=1)
    assert reason in sdwn.json("status", paths.root)["failures"][0]
    assert reason in sdwn("logs", paths.root).stdout


@pytest.mark.process
def test_tasks_import_nothing_from_the_folder_where_somebody_typed(
    sdwn: Sdwn, planned: PlanRun, tmp_path: Path
) -> None:
    paths, plan = planned(storage={"images_per_shard": 1000})
    for name in ("random", "submitit", "numpy", "sdwn"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the installed module')\n")
    sdwn("submit", paths.root, "--profile", "local", "--wait", "--retries", "0")
    assert paths.done_shards() == {shard.index for shard in plan.shards}


@pytest.mark.process
def test_tasks_of_a_clone_that_is_not_installed_run_its_own_code(
    planned: PlanRun, tmp_path: Path
) -> None:
    paths, _ = planned(storage={"images_per_shard": 1000})
    clone = tmp_path / "clone"
    shutil.copytree(REPOSITORY / "sdwn", clone / "sdwn")
    with (clone / "sdwn/jobs/task.py").open("a") as module:
        module.write("\nprint('from the clone')\n")
    (clone / "site.yaml").write_text("executor: local\n")
    words = ["submit", str(paths.root), "--profile", "site.yaml", "--wait", "--retries", "0"]
    subprocess.run([sys.executable, "-m", "sdwn", *words], cwd=clone, check=True)
    (log,) = paths.jobs.glob("*/*_log.out")
    assert "from the clone" in log.read_text()
