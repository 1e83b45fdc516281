"""Safety from what others leave in a folder: it deletes, runs and reveals nothing."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sdwn.cli import console
from sdwn.config import ModelConfig
from sdwn.devices.tuning import GpuProfile, Probe, Tuning, find_profile, store_profile
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.generation.batching import NoiseSampler
from sdwn.generation.sampler import Sampler
from sdwn.generation.task import GENERATE
from sdwn.io import csv_text
from sdwn.jobs import scheduler
from sdwn.jobs.journal import intend, last_profile, note_cancelled, note_later, read_journal, settle
from sdwn.jobs.profile import ClusterProfile, job_script, load_profile
from sdwn.jobs.submit import submission_lock
from sdwn.jobs.task import ArrayTask, Process, hold_until_peers_exit
from sdwn.models.builtin import builtin_folder
from sdwn.models.weights import converted_folder, staged_if_wanted
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Concept, parse_table, table_text
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.releases.staged_folder import JOURNAL, StagedFolder, build
from sdwn.workflow.status import run_status
from submitit.core.utils import DelayedSubmission

from conftest import (
    FEW,
    PlanRun,
    Testbed,
    noise_config,
    profile_for_testbed,
    submit_shards,
    wait_until,
)

LOCAL = ClusterProfile(executor="local")


def fill(staged: StagedFolder) -> None:
    (staged.root / "a").write_text("a")


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of the user's that nothing here may touch, as if sdwn had begun it."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years")
    return folder


class TestAnUnfinishedFolder:
    def test_a_link_is_not_followed(self, precious: Path, tmp_path: Path) -> None:
        (precious / JOURNAL).write_text("")
        (tmp_path / ".out.unfinished").symlink_to(precious)
        with pytest.raises(UsageError, match=r"\.out\.unfinished: .* found a link"):
            build(tmp_path / "out", {}, fill)
        assert contents(precious) == {"thesis.txt": "three years"}

    def test_a_folder_that_sdwn_did_not_begin_is_left(self, precious: Path, tmp_path: Path) -> None:
        precious.rename(tmp_path / ".out.unfinished")
        with pytest.raises(UsageError, match="found files without"):
            build(tmp_path / "out", {}, fill)
        assert contents(tmp_path / ".out.unfinished") == {"thesis.txt": "three years"}

    def test_a_folder_of_another_user_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / ".out.unfinished"
        folder.mkdir()
        (folder / JOURNAL).write_text("{}\n")
        own = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: own + 1)
        with pytest.raises(UsageError, match="another user's folder"):
            build(tmp_path / "out", {}, fill)
        assert (folder / JOURNAL).read_text() == "{}\n"

    def test_a_journal_that_is_a_link_is_not_written(self, precious: Path, tmp_path: Path) -> None:
        (tmp_path / ".out.unfinished").mkdir()
        (tmp_path / ".out.unfinished" / JOURNAL).symlink_to(precious / "thesis.txt")
        with pytest.raises(UsageError, match="found a link"):
            build(tmp_path / "out", {}, fill)
        assert contents(precious) == {"thesis.txt": "three years"}

    def test_a_link_within_is_not_written_through(self, precious: Path, tmp_path: Path) -> None:
        folder = tmp_path / ".out.unfinished"
        folder.mkdir()
        (folder / JOURNAL).write_text("{}\n")
        (folder / "a").symlink_to(precious / "thesis.txt")
        build(tmp_path / "out", {}, fill)
        assert contents(precious) == {"thesis.txt": "three years"}
        assert (tmp_path / "out/a").read_text() == "a"


def test_journal_and_lock_of_a_run_are_no_links(precious: Path, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.submissions.symlink_to(precious / "thesis.txt")
    paths.submitting.symlink_to(precious / "thesis.txt")
    with pytest.raises(UsageError, match="found a link"):
        note_cancelled(paths, ["7"])
    with pytest.raises(UsageError, match="found a link"), submission_lock(paths, print):
        pass
    assert contents(precious) == {"thesis.txt": "three years"}


@pytest.mark.process
def test_only_a_runs_own_processes_are_its_jobs(tmp_path: Path) -> None:
    """A number in a journal may be any process's by now."""
    jobs, others, name = tmp_path / "a run/jobs", tmp_path / "another/jobs", "run-generate-0badcafe"
    for folder in (jobs, others):
        folder.mkdir(parents=True)
    (jobs / f"{name}.sh").write_text("(sleep 60; true)\ntrue\n")
    # Any user's, whose words need not be UTF-8.
    stranger = subprocess.Popen(["bash", "-c", "sleep 60; true", b"caf\xe9"])
    words = ["bash", str(jobs / f"{name}.sh"), "7_0"]
    with stranger, subprocess.Popen(words, start_new_session=True) as process:
        wait_until(lambda: scheduler.processes(jobs))
        assert scheduler.processes(jobs) == {"7_0": (process.pid, name)}
        assert not scheduler.processes(others)
        scheduler.end_jobs("local", others, name, ["7_0"])
        scheduler.end_jobs("local", jobs, name, ["1"])
        scheduler.end_jobs("local", jobs, "run-generate-12345678", ["7_0"])
        assert process.poll() is None
        scheduler.end_jobs("local", jobs, name, ["7_0"])
        assert process.wait() == -signal.SIGKILL
        assert stranger.poll() is None
        stranger.kill()


class TestARelease:
    @pytest.mark.parametrize("file", ["manifest.json", "metadata.parquet", "images-00000.h5"])
    def test_a_linked_file_is_named_and_not_read(
        self, generated: PlanRun, tmp_path: Path, file: str
    ) -> None:
        paths, _ = generated(catalog=FEW)
        root = merge([paths], ReleasePaths(tmp_path / "release")).paths.root
        (root / file).rename(tmp_path / file)
        (root / file).symlink_to(tmp_path / file)
        with pytest.raises(IntegrityError, match=f"{file}: a link"):
            Release(root).image(0)
        with pytest.raises(IntegrityError, match=f"{file}: a link"):
            export(Release(root), tmp_path / "out", ExportOptions("release"))
        if file != "manifest.json":  # which nothing can be checked without
            assert [problem for problem in verify(root) if problem.startswith(f"{file}: a link")]

    @pytest.mark.parametrize("file", ["concepts.parquet", "evaluations/vit/evaluation.json"])
    def test_a_pipe_is_not_waited_for(self, generated: PlanRun, tmp_path: Path, file: str) -> None:
        paths, _ = generated(catalog=FEW)
        root = merge([paths], ReleasePaths(tmp_path / "release")).paths.root
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).unlink(missing_ok=True)
        os.mkfifo(root / file)
        assert [problem for problem in verify(root) if problem.startswith(f"{file}: a link or")]

    def test_a_link_to_a_release_is_as_good_as_the_release(
        self, generated: PlanRun, tmp_path: Path
    ) -> None:
        paths, _ = generated(catalog=FEW)
        made = merge([paths], ReleasePaths(tmp_path / "made"))
        (tmp_path / "link").symlink_to(made.paths.root)
        assert verify(tmp_path / "link") == []
        assert Release(tmp_path / "link").image(0).size == made.image(0).size


class TestASharedDisk:
    """All users of a node may write to its disk."""

    def weights(self, folder: Path, text: str) -> Path:
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text(text)
        return folder

    @pytest.mark.parametrize("linked", [False, True], ids=["open to all", "a link"])
    def test_weights_that_another_user_put_there_are_not_taken(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        linked: bool,
    ) -> None:
        model, disk = self.weights(tmp_path / "model", "{}"), tmp_path / "disk"
        monkeypatch.setenv("SDWN_STAGE_WEIGHTS", str(disk))
        copied = staged_if_wanted(model)
        own = copied.parent
        assert own.parent == disk
        assert own.stat().st_mode & 0o077 == 0
        # The same name and the same size: only the folder tells.
        (own / f"{copied.name}/model_index.json").write_text("[]")
        if linked:
            own.symlink_to(own.rename(tmp_path / "planted"))
        else:
            own.chmod(0o777)
        assert staged_if_wanted(model) == model
        assert f"{own}: expected a folder that only you can open" in caplog.text

    def test_the_processes_of_a_task_meet_nowhere_else(
        self, tmp_path: Path, precious: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / f"sdwn-{os.getuid()}").symlink_to(precious)
        with (
            pytest.raises(UsageError, match=f"choose another folder than {tmp_path}"),
            hold_until_peers_exit(Process("7", rank=1, count=2)),
        ):
            pass
        assert contents(precious) == {"thesis.txt": "three years"}


class TestTables:
    @given(st.lists(st.text(st.sampled_from("=+-@\t\r\n ab'\",;"), min_size=1), min_size=1))
    def test_no_cell_is_a_formula_to_a_spreadsheet(self, cells: list[str]) -> None:
        (found,) = list(csv.reader(io.StringIO(csv_text([], [cells]), newline="")))[1:]
        assert not [cell for cell in found if cell.lstrip(" \n")[:1] in ("=", "+", "-", "@")]
        told = [cell.replace("\r", " ") for cell in cells]
        assert [cell.removeprefix("'") for cell in found] == [c.removeprefix("'") for c in told]

    def test_a_file_name_that_is_a_formula_stays_text_in_every_release(
        self, tmp_path: Path
    ) -> None:
        source = tmp_path / "pictures/n02084071"
        source.mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(source / "0.png")
        (source.parent / "=1+1.png").write_bytes(b"no picture")
        target = ReleasePaths(tmp_path / "release")
        made = import_images(
            list_source(source.parent), target, ImportOptions("imagefolder")
        ).release
        export(made, tmp_path / "again", ExportOptions("release"))
        for root in (made.paths, ReleasePaths(tmp_path / "again")):
            rows = list(csv.reader(root.skipped.open(newline="")))
            assert [file for file, _ in rows] == ["file", "'=1+1.png"]

    def test_the_plans_own_table_is_written_to_the_letter(self) -> None:
        row = Concept("n1", "=lemma", "n1", "-.n.01", None, "=lemma", "@gloss", ("+prompt",))
        assert parse_table(table_text((row,))) == (row,)


# Sets a terminal's title, its clipboard, moves up a line, as one byte too, and turns text around.
STEERING = "\x1b]0;mine\x07 \x1b]52;c;cm0=\x07 \x1b[1A\x1b[2K \x9b1A \r \b \u202e"


def test_what_others_wrote_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(STEERING)
    found = {"lemmas": STEERING, "of a list": [STEERING]}
    console.Result({}, found, f"{STEERING}\n").print(as_json=False)
    console.fail(f"{STEERING}: damaged")
    found = "".join(capsys.readouterr())
    assert found.count("]52;c;cm0=") == 5, "all of it can be read"
    assert not set(found) & {"\x1b", "\x07", "\x08", "\r", "\x9b", "\u202e"}


TOKEN = "hf_" + "s3cret" * 5


class TestSecrets:
    def written(self, folder: Path) -> list[Path]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return [path for path in files if TOKEN.encode() in path.read_bytes()]

    @pytest.mark.process
    def test_a_task_has_what_no_file_of_the_run_holds(
        self, planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor a command line, which all users of a machine see."""
        monkeypatch.delenv("HF_TOKEN", raising=False)
        paths, plan = planned(catalog=FEW)
        seen = tmp_path / "seen"
        profile = ClusterProfile(
            executor="local",
            environment={"HF_TOKEN": TOKEN, "WORD": "plain"},
            setup=(f'echo "$HF_TOKEN $WORD" > {seen}', "tr '\\0' ' ' < /proc/$$/cmdline"),
        )
        submit_shards(paths, plan, [0], profile, print)
        wait_until(paths.done_shards)
        assert seen.read_text() == f"{TOKEN} plain\n"
        assert self.written(paths.root) == []
        assert TOKEN not in job_script(2, paths.jobs, profile)
        (submission,) = read_journal(paths)
        assert submission.profile["environment"] == {"HF_TOKEN": "$HF_TOKEN", "WORD": "plain"}

        again = last_profile(paths, {})
        with pytest.raises(UsageError, match="HF_TOKEN from your shell, where it is not set"):
            submit_shards(paths, plan, [1], again, print)
        monkeypatch.setenv("HF_TOKEN", "of whoever goes on")
        submit_shards(paths, plan, [1], again, print)
        wait_until(lambda: 1 in paths.done_shards())
        assert seen.read_text() == "of whoever goes on plain\n"

    @pytest.mark.slurm
    def test_a_slurm_job_has_it_and_runs_no_pickle_that_lay_there(
        self, planned: PlanRun, testbed: Testbed, tmp_path: Path
    ) -> None:
        """The ids of jobs are easily foreseen, and a folder may come with its pickles."""
        paths, plan = planned(catalog=FEW)
        seen, ran = tmp_path / "seen", tmp_path / "ran"
        last = int(max(["0", *testbed.run("sacct", "-nXP", "-o", "jobidraw").split()], key=int))
        for job in range(last + 1, last + 20):
            planted = paths.jobs / str(job) / f"{job}_submitted.pkl"
            planted.parent.mkdir(parents=True)
            DelayedSubmission(ran.touch).dump(planted)
        own = f"environment: {{HF_TOKEN: {TOKEN}}}\nsetup: ['echo $HF_TOKEN > {seen}', sleep 3]"
        site = load_profile(str(profile_for_testbed(tmp_path, own)))
        submit_shards(paths, plan, [0], site, print)
        wait_until(paths.done_shards)
        assert seen.read_text() == f"{TOKEN}\n"
        assert self.written(paths.root) == []
        assert not ran.exists()

    @pytest.mark.parametrize(
        ("name", "value", "secret"),
        [
            ("WANDB_API_KEY", "0123", True),
            ("AWS_ACCESS_KEY_ID", "0123", True),
            ("https_proxy", "http://me:word@proxy:3128", True),
            ("OTHER", TOKEN, True),
            ("HF_TOKEN_PATH", "/home/me/token", False),
            ("TOKENIZERS_PARALLELISM", "false", False),
            ("https_proxy", "http://proxy:3128", False),
            ("HF_HOME", "/shared/hf", False),
            ("HF_HOME", "$WORK/hf", False),
        ],
    )
    def test_what_counts_as_a_secret(self, name: str, value: str, secret: bool) -> None:
        stage = {"evaluate": {"environment": {name: value}}}
        found = ClusterProfile(environment={name: value}, stages=stage).record()
        told = f"${name}" if secret else value
        assert found["environment"] == found["stages"]["evaluate"]["environment"] == {name: told}

    @pytest.mark.parametrize("written", ["$MINE", "${MINE}"])
    def test_a_variable_of_the_shell_under_another_name(
        self, written: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        profile = ClusterProfile(environment={"WANDB_API_KEY": written})
        again = ClusterProfile(**profile.record())
        monkeypatch.delenv("MINE", raising=False)
        with pytest.raises(UsageError, match=r"MINE from your shell.* export MINE="):
            _ = again.secrets
        monkeypatch.setenv("MINE", TOKEN)
        assert again.secrets == {"WANDB_API_KEY": TOKEN}
        assert TOKEN not in str(again.record())


@pytest.mark.parametrize("job", ["../../etc", "--user=me", "7_0/../../x", ""])
def test_a_journals_ids_are_numbers(planned: PlanRun, job: str) -> None:
    """They name folders of logs, and scancel is given them."""
    paths, plan = planned(catalog=FEW)
    intended = intend(paths, [ArrayTask(GENERATE, str(paths.root), (0,), plan.digest)], LOCAL)
    with paths.submissions.open("a") as file:
        file.write(json.dumps({"name": intended.name, "ids": [job]}) + "\n")
    assert [submission.ids for submission in read_journal(paths)] == [None]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_stands_in_a_journal_ends_no_command(
    planned: PlanRun, data: st.DataObject
) -> None:
    paths, plan = planned(catalog=FEW)
    paths.submissions.unlink(missing_ok=True)
    tasks = [ArrayTask(GENERATE, str(paths.root), (index,), plan.digest) for index in (0, 1)]
    settle(paths, intend(paths, tasks, LOCAL), ["999999991", "999999992"])
    note_cancelled(paths, ["999999991"])
    note_later(paths, ["merge"])
    lines = [json.loads(line) for line in paths.submissions.read_text().splitlines()]
    place, value = data.draw(st.integers(0, len(lines) - 1)), data.draw(ANYTHING)
    if key := data.draw(st.sampled_from(["", *lines[place]])):
        lines[place][key] = value
    else:
        lines[place] = value
    paths.submissions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run_status(paths, plan).shards_total == len(plan.assigned_shards)
    with suppress(SdwnError):
        last_profile(paths, {})
    for one in read_journal(paths):
        with suppress(SdwnError):
            assert one.site


def test_jobs_of_another_name_are_no_runs(planned: PlanRun) -> None:
    """A journal from elsewhere would have this user's other jobs ended."""
    paths, plan = planned(catalog=FEW)
    intend(paths, [ArrayTask(GENERATE, str(paths.root), (0,), plan.digest)], LOCAL)
    line = json.loads(paths.submissions.read_text())
    names = ("training", "", "--user=me", "sdwn-0badcafe,training", "a/b-generate-0badcafe")
    for name in names:
        paths.submissions.write_text(json.dumps({**line, "name": name, "ids": ["7"]}) + "\n")
        assert read_journal(paths) == []


def test_a_journal_without_an_end_is_refused(planned: PlanRun) -> None:
    paths, _ = planned(catalog=FEW)
    os.mkfifo(paths.submissions)
    with pytest.raises(IntegrityError, match="no plain file"):
        read_journal(paths)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file be another user's: root gives it away, who is not root becomes that user."""
    own = os.getuid()
    if own == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: own + 1)


@pytest.mark.parametrize(("mode", "taken"), [(0o777, False), (0o1777, False), (0o775, True)])
def test_a_cache_that_everybody_may_write_to_gives_nothing_of_others(
    planned: PlanRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, taken: bool
) -> None:
    """A group may share one."""
    monkeypatch.setenv("SDWN_CACHE", str(tmp_path / "cache"))
    work = NoiseSampler(planned()[1].config).workload
    tuning = Tuning(10, 9.9, 2, 3, 0.5, 0.5, (Probe(10, 9.9, 2),))
    kept = store_profile(GpuProfile(work, False, tuning, "2026-01-01"))
    (tmp_path / "one.safetensors").write_bytes(b"")
    single = ModelConfig(name=str(tmp_path / "one.safetensors"))
    model = converted_folder(single)
    model.mkdir(parents=True)
    for path in (kept.path, model):
        path.parent.chmod(mode)
        assert find_profile(work) == kept, "one's own"
        assert converted_folder(single) == model
    for path in (kept.path, model):
        give_away(path, monkeypatch)
    assert (find_profile(work) == kept) is taken
    refused = nullcontext() if taken else pytest.raises(IntegrityError, match="set SDWN_CACHE to")
    with refused:
        converted_folder(single)


def test_code_in_a_models_folder_is_not_run(tmp_path: Path) -> None:
    model = shutil.copytree(builtin_folder("tiny"), tmp_path / "model")
    (model / "unet/own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom diffusers import UNet2DConditionModel as Own\n"
    )
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "unet": ["own", "Own"]}))
    with pytest.raises(SdwnError, match="code of its own"):
        Sampler(noise_config(model={"name": str(model)}, generation={"precision": "fp32"}))
    assert not (tmp_path / "ran").exists()
