"""The boundary to SLURM's commands: what they are given, how they are read, whose a job is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdwn.config import validated
from sdwn.errors import SdwnError
from sdwn.generation.task import GENERATE
from sdwn.io import ignore
from sdwn.jobs import scheduler
from sdwn.jobs.journal import intend, live_jobs, read_journal, settle, unheld_shards
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.scheduler import job_ids
from sdwn.jobs.submit import WorkOrder, cancel_run, complete
from sdwn.jobs.task import ArrayTask
from sdwn.paths import RunPaths
from sdwn.planning.plan import Plan
from sdwn.workflow.submitting import LATER_STAGES, RUN_STAGES

from conftest import PlanRun, Sdwn, Testbed, submit_shards

SITE = validated(ClusterProfile, {"partition": "main"}, source="test")
COLUMNS = ("40", "24", "80", "80")

NONE = {"sbatch": "exit 1", "squeue": "", "srun": "", "scontrol": "exit 1"}

Commands = Callable[..., None]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Put shell scripts on the PATH in the place of SLURM's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(**scripts: str) -> None:
        for name, text in {**NONE, **scripts}.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return write


def queue_line(job: str, name: str, state: str = "PENDING") -> str:
    """A shell line that prints a job as squeue does."""
    formats = "".join(f"%-{width}s" for width in COLUMNS)
    return f"printf '{formats}\\n' {job} {state} {name} Priority"


# Prints the array 7 under whatever name it is asked for.
ANY_NAME = f"""for option; do case $option in --name=*) name=${{option#--name=}};; esac; done
{queue_line("7_0", "$name")}
{queue_line("7_1", "$name")}"""


# What the user's shell says


@given(
    st.sampled_from(["SBATCH", "SLURM", "SQUEUE", "SCANCEL", "SINFO", "SACCT", "SRUN", "SALLOC"]),
    st.from_regex(r"[A-Z]{2,9}(_[A-Z]{2,9})?", fullmatch=True),
)
@settings(max_examples=20)
def test_no_default_of_the_user_reaches_a_command_of_slurm(command: str, name: str) -> None:
    steering, finding = f"{command}_X{name}", "SLURM_CONF"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(steering, "1")
        patch.setenv(finding, "/etc/slurm/slurm.conf")
        seen = scheduler.environment()
    assert steering not in seen
    assert seen[finding] == "/etc/slurm/slurm.conf"
    assert seen["PATH"] == os.environ["PATH"]


@pytest.mark.process
def test_jobs_get_what_the_profile_says_and_what_is_left_out_is_named_once(
    planned: PlanRun, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned()
    commands(sbatch=f"env >> {tmp_path}/seen; echo Submitted batch job 7")
    for name in ("SBATCH_PARTITION", "SLURM_MEM_PER_CPU", "SLURM_EXPORT_ENV", "SBATCH_QOS"):
        monkeypatch.setenv(name, "outer")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SLURM_CONF_SERVER", "controller:6817")
    told: list[str] = []
    for index in (0, 1):
        submit_shards(paths, plan, [index], SITE, told.append)
    seen = (tmp_path / "seen").read_text()
    assert "=outer" not in seen
    assert "CUDA_VISIBLE_DEVICES" not in seen, "the node's GPUs are SLURM's to name"
    assert "SLURM_CONF_SERVER=controller:6817" in seen
    assert told == ["SBATCH_PARTITION, SBATCH_QOS: not followed; jobs get what the profile says"]


# What sbatch answers


@pytest.mark.process
@pytest.mark.parametrize(
    "answer",
    [
        "echo Submitted batch job 7",
        "echo Job 12 of 40 in your quota; echo Submitted batch job 7 on cluster big; echo Bye",
        "echo Submitted batch job 7 >&2",
        "echo Submitted batch job 7; echo 'sbatch: error: accounting hook failed' >&2; exit 3",
        "echo '7;big'",
        "echo Your job 12 of 40 was taken",
        "",
        "exit 1",
        "echo 'error: Socket timed out on send/recv operation' >&2; exit 1",
    ],
)
def test_whatever_a_sites_sbatch_prints_the_array_is_known(
    planned: PlanRun, commands: Commands, answer: str
) -> None:
    paths, plan = planned()
    commands(sbatch=answer, squeue=ANY_NAME)
    jobs = submit_shards(paths, plan, [0, 1], SITE, ignore)
    assert [job.id for job in jobs] == ["7_0", "7_1"]
    assert all((paths.jobs / job.id / f"{job.id}_submitted.pkl").exists() for job in jobs)


@pytest.mark.process
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("echo Thank you", r"expected 'Submitted batch job' and a number from sbatch, .*Thank you"),
        ("echo 'sbatch: error: invalid partition' >&2; exit 1", "refused: .*invalid partition"),
    ],
)
def test_an_array_that_is_not_there_was_refused(
    planned: PlanRun, commands: Commands, answer: str, reason: str
) -> None:
    paths, plan = planned()
    commands(sbatch=answer, squeue="")
    with pytest.raises(SdwnError, match=reason):
        submit_shards(paths, plan, [0, 1], SITE, ignore)
    assert read_journal(paths)[0].refused
    assert not list(paths.jobs.glob("*.sh"))


# Whose job it is


def taken(paths: RunPaths, plan: Plan, *ids: str) -> str:
    """Write down that SLURM took the first shards under these ids; return the array's name."""
    tasks = WorkOrder(paths, plan, RUN_STAGES, SITE).tasks_for(range(len(ids)))
    return settle(paths, intend(paths, tasks, SITE), ids).name


@pytest.mark.process
def test_a_job_is_the_runs_only_by_its_name_and_its_id(
    planned: PlanRun, commands: Commands, tmp_path: Path
) -> None:
    """Ids begin anew with a controller, roll over, and each cluster counts for itself."""
    paths, plan = planned()
    name = taken(paths, plan, "7_0", "7_1")
    until = f"[ -e {tmp_path}/cancelled ] && exit"
    lines = [queue_line("7_0", "somebodys"), queue_line("7_1", name), queue_line("8_0", name)]
    commands(squeue="\n".join([until, *lines]), scancel=f'echo "$@" > {tmp_path}/cancelled')
    assert [job.id for job in live_jobs(paths)] == ["7_1"]
    assert 0 in unheld_shards(paths, plan)
    assert [job.id for job in cancel_run(paths)] == ["7_1"]
    assert (tmp_path / "cancelled").read_text().split() == [f"--name={name}", "7"]


@pytest.mark.process
def test_a_wait_for_shards_that_failed_ends_though_a_later_stage_is_held(
    commands: Commands, planned: PlanRun
) -> None:
    paths, plan = planned()
    merge = ArrayTask(LATER_STAGES["merge"], str(paths.root), (), plan.digest)
    queued = settle(paths, intend(paths, [merge], SITE), ["9"])
    commands(squeue=queue_line("9", queued.name))
    assert [job.id for job in live_jobs(paths)] == ["9"]
    with pytest.raises(SdwnError, match=f"{len(plan.shards)} of {len(plan.shards)} shards failed"):
        complete(
            WorkOrder(paths, plan, RUN_STAGES, SITE), -1, lambda _: None, print
        )  # no try is left


# As squeue is for a user whom another's jobs belong to: --me shows none of them.
OF_OTHERS = 'case "$*" in *--me*) exit;; esac'


@pytest.mark.process
@pytest.mark.parametrize("owner", ["alice", None])
def test_another_users_jobs_are_seen_and_what_one_may_not_cancel_is_said(
    planned: PlanRun, commands: Commands, owner: str | None
) -> None:
    paths, plan = planned()
    name = taken(paths, plan, "7_0", "7_1")
    assert read_journal(paths)[0].owner
    text = paths.submissions.read_text()
    mine = f', "owner": "{read_journal(paths)[0].owner}"'
    assert mine in text, "an older journal has none"
    paths.submissions.write_text(text.replace(mine, f', "owner": "{owner}"' if owner else ""))
    lines = [queue_line("7_0", name), queue_line("7_1", name)]
    denied = "scancel: error: Kill job error on job id 7_0: Access/permission denied"
    commands(squeue="\n".join([OF_OTHERS, *lines]), scancel=f"echo '{denied}' >&2; exit 210")
    assert not {0, 1} & set(unheld_shards(paths, plan)), "they are not made twice"
    whose = owner or "another user"
    with pytest.raises(SdwnError, match=rf"jobs 7_0 to 7_1 of {whose} could not .*denied"):
        cancel_run(paths)


@pytest.mark.process
@pytest.mark.parametrize("refused", ["known", "lost"])
def test_a_job_that_slurm_does_not_end_is_named_and_all_others_are_ended(
    sdwn: Sdwn, planned: PlanRun, commands: Commands, tmp_path: Path, refused: str
) -> None:
    """Also one that the journal does not know: until it has ended, nothing can be submitted."""
    paths, plan = planned()
    names = {"known": taken(paths, plan, "7_0", "7_1"), "lost": "run-generate-0badcafe"}
    paths.jobs.mkdir()
    (paths.jobs / f"{names['lost']}.sh").touch()
    lines = [queue_line("7_0", names["known"]), queue_line("8_0", names["lost"])]
    why = "scancel: error: Kill job error: Unable to contact slurm controller"
    refusal = f"case $1 in --name={names[refused]}) echo '{why}' >&2; exit 1;; esac"
    commands(squeue="\n".join(lines), scancel=f"echo $* >> {tmp_path}/asked\n{refusal}")
    told = sdwn("cancel", paths.root, code=1).stderr
    which = {
        "known": f"job 7_0 of {scheduler.user()}",
        "lost": f"1 job of this run that {paths.submissions} does not know (8_0)",
    }
    assert f"{which[refused]} could not be ended: {why}" in told
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"--name={names['known']} 7", f"--name={names['lost']} 8"]


@pytest.mark.process
def test_a_cancel_while_sbatch_runs_says_which_jobs_slurm_did_not_end(
    planned: PlanRun, commands: Commands, tmp_path: Path
) -> None:
    paths, plan = planned()
    cancelled = f"""echo '{{"cancelled": "now", "jobs": []}}' >> {paths.submissions}"""
    taken = f"{cancelled}; touch {tmp_path}/taken; echo Submitted batch job 7"
    queue = f"[ -e {tmp_path}/taken ] || exit 0; name=$(basename {paths.jobs}/*.sh .sh)"
    refused = "scancel: error: Access/permission denied"
    commands(
        sbatch=taken,
        squeue=f"{queue}\n{queue_line('7_0', '$name')}",
        scancel=f"echo '{refused}' >&2; exit 1",
    )
    said = f"cancelled by: sdwn cancel .*\njob 7_0 of .* could not be ended: {refused}"
    with pytest.raises(SdwnError, match=said):
        complete(WorkOrder(paths, plan, RUN_STAGES, SITE), 0, lambda _: None, ignore)


@pytest.mark.process
def test_where_a_site_hides_others_jobs_their_shards_are_submitted_only_by_force(
    sdwn: Sdwn, planned: PlanRun, commands: Commands, tmp_path: Path
) -> None:
    paths, plan = planned()
    taken(paths, plan, "7_0", "7_1")
    me = read_journal(paths)[0].owner
    paths.submissions.write_text(paths.submissions.read_text().replace(f'"{me}"', '"alice"'))
    (tmp_path / "site.yaml").write_text("{executor: slurm, partition: main}")
    site = ("submit", paths.root, "--profile", "site.yaml")
    hiding = {"scontrol": "echo 'PrivateData  = accounts,jobs'", "scancel": "", "sinfo": ""}
    commands(sbatch="echo Submitted batch job 8", **hiding)
    refused = sdwn(*site, code=1).stderr
    assert "alice submitted some of these shards" in refused
    assert "--force" in refused
    assert "alice submitted here: not cancelled" in sdwn("cancel", paths.root).stderr
    (owner,) = sdwn.json("status", paths.root)["submitted_by"]
    assert owner.startswith("alice (this site hides their jobs")
    assert sdwn.json(*site, "--force")["submitted"] == len(plan.shards)

    paths.submissions.write_text(paths.submissions.read_text().replace('"alice"', f'"{me}"'))
    assert sdwn.json("status", paths.root)["submitted_by"] == [me], "one's own are never hidden"


# On a real SLURM


@pytest.mark.slurm
def test_other_jobs_and_the_users_shell_change_nothing(
    sdwn: Sdwn, planned: PlanRun, cluster: Testbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = planned()
    site = ("--account", "lab", "--partition", "main", "--mem", "500M", "--time", "5")
    command = ["sbatch", "--hold", "--account=lab", "--mem=500M", "--array=0-3", "-Jtheirs"]
    theirs = cluster.run(*command, "--wrap=true").split()[-1]
    taken(paths, plan, *job_ids(theirs, 4))
    assert live_jobs(paths) == {}
    cancel_run(paths)
    scheduler.end_jobs("slurm", paths.jobs, read_journal(paths)[0].name, job_ids(theirs, 4))
    assert cluster.run("squeue", "--noheader", "--array", "--name=theirs").count("\n") == 3

    for name, value in {
        "SQUEUE_STATES": "RUNNING",
        "SQUEUE_PARTITION": "high",
        "SCANCEL_PARTITION": "high",
        "SBATCH_PARTITION": "nowhere",
    }.items():
        monkeypatch.setenv(name, value)
    (paths.root / "site.yaml").write_text("executor: slurm\nsbatch: {hold: true}\n")
    found = sdwn.json("submit", paths.root, "--profile", paths.root / "site.yaml", *site)
    assert found["submitted"] == len(plan.shards)
    cluster.run("scontrol", "update", "PartitionName=main", "Hidden=YES")
    try:
        assert len(live_jobs(paths)) == len(plan.shards)
        assert len(cancel_run(paths)) == len(plan.shards)
        assert live_jobs(paths) == {}
    finally:
        cluster.run("scontrol", "update", "PartitionName=main", "Hidden=NO")


@pytest.mark.slurm
@pytest.mark.parametrize("export", ["ALL", "NONE", "HOME"])
def test_tasks_start_whatever_is_exported_and_whatever_job_they_are_submitted_in(
    sdwn: Sdwn, planned: PlanRun, testbed: Testbed, tmp_path: Path, export: str
) -> None:
    paths, plan = planned(storage={"images_per_shard": 1000})
    text = f"{{account: lab, partition: main, mem: 500M, time: 5, sbatch: {{export: {export}}}}}"
    (tmp_path / "site.yaml").write_text(text)
    outer = {"SLURM_MEM_PER_CPU": "9", "SLURM_NTASKS": "3", "SLURM_EXPORT_ENV": "NONE"}
    outer |= {"SLURM_JOB_ID": "1", "SLURM_GPUS_PER_NODE": "v100:1", "SUBMITIT_EXECUTOR": "local"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in outer.items():
            patch.setenv(name, value)
        sdwn("submit", paths.root, "--profile", tmp_path / "site.yaml", "--wait", "--retries", "0")
    assert not unheld_shards(paths, plan)


@pytest.mark.process
def test_a_process_is_a_job_from_the_moment_that_it_is_started(tmp_path: Path) -> None:
    settings = {"executor": "local", "setup": ["sleep 60"]}
    site = validated(ClusterProfile, settings, source="test")
    for number in range(5):
        name = f"run-generate-{number:08x}"
        task = ArrayTask(GENERATE, str(tmp_path), (0,))
        (job,) = scheduler.start_array([task], tmp_path, site, name, ignore)
        assert job in scheduler.processes(tmp_path)
        scheduler.end_jobs("local", tmp_path, name, [job])
        assert job not in scheduler.processes(tmp_path)
