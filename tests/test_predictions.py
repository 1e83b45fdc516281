"""Classifying a release in shards: kept after a kill, merged, compared with the release."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import timm
import torch
from safetensors.torch import save_file
from sdwn import io as files
from sdwn.cli import console
from sdwn.config import EvaluationConfig
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.evaluate import keep_computed, write_results
from sdwn.evaluation.verify import verify
from sdwn.jobs import task
from sdwn.jobs.journal import intend, settle
from sdwn.jobs.profile import ClusterProfile
from sdwn.jobs.task import ArrayTask, read_record
from sdwn.paths import EvaluationPaths, ReleasePaths, RunPaths
from sdwn.planning.plan import write_plan
from sdwn.prediction import plan as prediction_plan
from sdwn.prediction.plan import PredictionPlan, open_planned_release, open_prediction_plan
from sdwn.prediction.table import IMAGE, Predictions, merge_shards, plan_digest_of
from sdwn.prediction.task import PREDICT, predict
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.reports.report import write_report
from sdwn.workflow.submitting import (
    SubmitOptions,
    evaluation_profiles,
    evaluation_settings,
    make_results_by_tasks,
)

from conftest import PlanRun, Sdwn, Testbed, profile_for_testbed, wait_until, workers
from drawn import evaluate

# Of the 30 images of this release, of which 15 are of three ImageNet classes.
SHARD = 4
SHARES = ["top5_probability", "label_probability", "subtree_probability"]
MORE = ("corgi.n.01", "dog.n.01", "farm.n.01", "zebra.n.01")


def save_tiny(path: Path, seed: int) -> Path:
    """Write weights of timm's smallest ViT: a real classifier of random opinions."""
    torch.manual_seed(seed)
    save_file(timm.create_model("test_vit", num_classes=1000).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", seed=1)


@pytest.fixture
def tiny(checkpoint: Path) -> EvaluationConfig:
    return EvaluationConfig(model="test_vit", checkpoint=checkpoint)


@pytest.fixture
def everything(tiny: EvaluationConfig) -> EvaluationConfig:
    return tiny.model_copy(update={"images": "all"})


MakeRelease = Callable[..., Release]


@pytest.fixture
def make_release(generated: PlanRun, whole_runs: Path, tmp_path: Path) -> MakeRelease:
    def make(name: str = "release", **changes: Any) -> Release:
        names = tmp_path / "names.txt"
        names.write_text("\n".join(MORE))
        catalog = {"roots": ["corgi.n.01"], "file": str(names)}
        paths, plan = generated(f"run-{name}", catalog=catalog, **changes)
        made = whole_runs / f"release-{plan.digest}"
        if not made.exists():
            merge([paths], ReleasePaths(made))
        shutil.copytree(made, tmp_path / name)
        return Release(tmp_path / name)

    return make


@pytest.fixture
def release(make_release: MakeRelease) -> Release:
    return make_release()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_plan, "IMAGES_PER_SHARD", SHARD)


Predicted = tuple[RunPaths, PredictionPlan]


@pytest.fixture
def predicted(release: Release, tiny: EvaluationConfig) -> Predicted:
    """All shards of predictions, not merged yet."""
    work, planned = open_prediction_plan(release, tiny)
    predict(work.root, range(len(planned.shards)))
    return work, planned


def changed(path: Path, change: Callable[[pa.Table], pa.Table], **origin: Any) -> None:
    """Write predictions anew, with something else in them."""
    found = Predictions.read(path, 99)
    replace(found, table=change(found.table), **origin).write(path)


def with_column(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        place = table.column_names.index(name)
        return table.set_column(place, name, pa.array(values, table.schema.field(name).type))

    return change


# A whole evaluation


def test_predictions_come_out_row_for_row_and_are_made_once(
    release: Release, everything: EvaluationConfig
) -> None:
    found = evaluate(release, everything)
    paths = EvaluationPaths(Path(found["path"]).parent)
    assert paths.root.name == found["evaluation"]
    assert found["evaluation"].endswith("-all")
    table = Predictions.read(paths.predictions, 99).table
    assert table.select(IMAGE).equals(release.metadata.select(IMAGE).combine_chunks())
    assert pc.count(table["imagenet_class"], mode="only_valid").as_py() == 15
    recorded = json.loads(paths.evaluation.read_text())
    assert recorded["classifier"]["predicted_on"] == [
        {"device": "cpu", "dtype": "float32", "batch_size": 32, "images": 30}
    ]
    assert not paths.work.root.exists(), "nothing is left of the work"
    written = paths.predictions.stat().st_mtime_ns
    paths.evaluation.unlink()
    evaluate(release, everything)
    assert paths.predictions.stat().st_mtime_ns == written, "nothing is classified again"
    assert json.loads(paths.evaluation.read_text())["figures"] == recorded["figures"]
    assert verify(release.paths.root, quick=True) == []


@pytest.mark.process
def test_an_evaluation_goes_on_after_a_kill(release: Release, everything: EvaluationConfig) -> None:
    work, planned = open_prediction_plan(release, everything)
    code = """
import os, signal, sys
from sdwn.config import EvaluationConfig
from sdwn.evaluation.evaluate import make_results, open_image_plan
from sdwn.releases.release import Release
left = 3 * int(sys.argv[3])
def advance(images):
    global left
    left -= images
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
chosen = EvaluationConfig.model_validate_json(sys.argv[2])
release = Release(sys.argv[1])
make_results(release, *open_image_plan(release, chosen), advance)
"""
    settings = planned.evaluation.model_dump_json()
    command = [sys.executable, "-c", code, str(release.paths.root), settings, str(SHARD)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert work.done_shards() == {0, 1}, "those before the one that it was at"
    assert not list(work.shards.glob("*.tmp"))
    changed(work.shard(0), with_column("subtree_probability", 1, 0.123))
    found = evaluate(release, everything)
    table = Predictions.read(Path(found["path"]).with_name("predictions.parquet"), 99).table
    assert table["subtree_probability"][1].as_py() == pytest.approx(0.123), "what was there is kept"
    assert found["images"] == 15


def test_two_classifiers_lie_side_by_side(
    release: Release, tiny: EvaluationConfig, tmp_path: Path
) -> None:
    other = EvaluationConfig(model="test_vit", checkpoint=save_tiny(tmp_path / "2.safetensors", 2))
    names = {evaluate(release, one)["evaluation"] for one in (tiny, other)}
    assert len(names) == 2
    digests = {plan_digest_of(release.paths.evaluation(name).predictions) for name in names}
    assert len(digests) == 2
    assert verify(release.paths.root, quick=True) == []


def test_predictions_of_another_release_are_named_and_made_anew(
    make_release: MakeRelease, tiny: EvaluationConfig
) -> None:
    first, second = make_release("first"), make_release("second", seed=1)
    name = evaluate(first, tiny)["evaluation"]
    shutil.copytree(first.paths.evaluations, second.paths.evaluations)
    (problem,) = verify(second.paths.root, quick=True)
    assert problem.startswith(f"evaluations/{name}/evaluation.json: of another release")
    told: list[str] = []
    evaluate(second, tiny, on_message=told.append)
    assert "classifying again" in told[0]
    assert f"of release {first.digest[:12]}" in told[0]
    assert verify(second.paths.root, quick=True) == []


def test_verify_names_predictions_that_were_changed(
    release: Release, tiny: EvaluationConfig
) -> None:
    name = evaluate(release, tiny)["evaluation"]
    path = release.paths.evaluation(name).predictions
    changed(path, with_column("label_probability", 0, 0.5))
    (problem,) = verify(release.paths.root, quick=True)
    told = f"evaluations/{name}/predictions.parquet: changed (its SHA-256 is not the recorded one)"
    assert problem == f"{told}; evaluate the release again"
    path.unlink()
    (problem,) = verify(release.paths.root, quick=True)
    assert problem.startswith(f"evaluations/{name}/predictions.parquet: missing; evaluate the")


@pytest.mark.parametrize("place", [".", "{name}", "{name}/work", "{name}/figures"])
def test_nothing_is_written_or_removed_through_a_link(
    release: Release, tiny: EvaluationConfig, tmp_path: Path, place: str
) -> None:
    """A release may come from anybody, and a link in it may lead to anything of the user's."""
    name = evaluate(release, tiny)["evaluation"]
    target = release.paths.evaluations / place.format(name=name)
    outside = tmp_path / "outside"
    if target.exists():
        target.rename(outside)
    outside.mkdir(exist_ok=True)
    (outside / "thesis.txt").write_text("three years")
    before = sorted(outside.rglob("*"))
    target.symlink_to(outside)
    # What an attacker would want is that what lies there is classified anew.
    changes = tiny, tiny.model_copy(update={"images": "all"})
    for chosen in changes:
        with pytest.raises(IntegrityError, match="a link or a pipe"):
            evaluate(release, chosen)
    with pytest.raises(IntegrityError, match="a link or a pipe"):
        write_report(release, name)
    assert sorted(outside.rglob("*")) == before
    linked = str(target.relative_to(release.paths.root))
    assert any(problem.startswith(f"{linked}: a link") for problem in verify(release.paths.root))


@pytest.mark.process
def test_tasks_of_a_slurm_that_is_not_here_are_not_taken_for_ended(
    release: Release, tiny: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    work, planned = open_prediction_plan(release, tiny)
    task = ArrayTask(PREDICT, str(work.root), (0,), planned.digest)
    settle(work, intend(work, [task], ClusterProfile(executor="slurm")), ["7"])
    with pytest.raises(SdwnError, match=r"SLURM does not say .* rm -r .*/work"):
        evaluate(release, tiny)


def test_a_mistyped_model_is_refused_at_once_and_leaves_nothing(release: Release) -> None:
    wrong, sites = EvaluationConfig(model="test_vti"), evaluation_profiles("local", {})
    for evaluated_here_or_by_tasks in (
        lambda: evaluate(release, wrong),
        lambda: make_results_by_tasks(release.paths.root, wrong, sites, SubmitOptions(), console),
    ):
        with pytest.raises(UsageError, match=r"model 'test_vti': .*; did you mean test_vit"):
            evaluated_here_or_by_tasks()
        assert not release.paths.evaluation("test_vti").root.exists()


def test_a_release_that_changed_since_is_classified_anew(
    make_release: MakeRelease, everything: EvaluationConfig
) -> None:
    release, other = make_release(), make_release("other", seed=1)
    work, planned = open_prediction_plan(release, everything)
    predict(work.root, [0, 1])
    shutil.copytree(work.root.parent, other.paths.evaluations / planned.name)
    with pytest.raises(IntegrityError, match=r"expected the release .* that this was planned for"):
        open_planned_release(other.paths.evaluation(planned.name).work)
    anew, again = open_prediction_plan(other, everything)
    assert again.digest != planned.digest
    assert anew.done_shards() == set()


def test_the_command_to_go_on_names_all_that_was_asked_for(
    release: Release, everything: EvaluationConfig, tmp_path: Path
) -> None:
    groups = tmp_path / "my groups.yaml"
    groups.write_text("dogs: dog.n.01")
    work, planned = open_prediction_plan(
        release, everything.model_copy(update={"groups": str(groups)})
    )
    command = planned.command(work)
    assert f"--checkpoint {everything.checkpoint} --groups '{groups}' --all" in command


# What an earlier release's images were classified as


@pytest.fixture
def grown(make_release: MakeRelease, everything: EvaluationConfig) -> Release:
    """A release of five images a synset, beside predictions of the first three of each."""
    small, larger = make_release("small", images_per_synset=3), make_release("larger")
    evaluate(small, everything)
    keep_computed(small, larger.paths)
    return larger


def test_only_images_that_an_earlier_release_lacks_are_classified(
    grown: Release, everything: EvaluationConfig, tmp_path: Path
) -> None:
    fresh = Release(shutil.copytree(grown.paths.root, tmp_path / "fresh"))
    shutil.rmtree(fresh.paths.evaluations)
    expected = evaluate(fresh, everything)
    work, planned = open_prediction_plan(grown, everything)
    predict(work.root, range(len(planned.shards)))
    record = read_record(work.task("none", 0))
    assert (record.done, record.total) == (12, 12), "of 30"
    found = write_results(grown, work, planned, console.say)
    assert {**found, "path": ""} == {**expected, "path": ""}
    paths = grown.paths.evaluation(planned.name)
    made, anew = (
        Predictions.read(one.paths.evaluation(planned.name).predictions, 99).table
        for one in (grown, fresh)
    )
    assert made.drop_columns(SHARES).equals(anew.drop_columns(SHARES))
    for name in SHARES:  # their last digits depend on the batch
        one, other = (np.array(table[name].to_pylist(), float) for table in (made, anew))
        assert one == pytest.approx(other, abs=1e-5, nan_ok=True)
    before, here = json.loads(paths.evaluation.read_text())["classifier"]["predicted_on"]
    assert (here["images"], here["device"]) == (12, "cpu")
    assert before == {"device": "of an earlier release", "images": 18}
    assert not paths.earlier.exists(), "all that is in it is in the predictions"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "damaged"),
        (lambda path: changed(path, lambda table: table, network={"model": "other"}), "weights"),
    ],
)
def test_earlier_predictions_that_are_damaged_or_of_other_weights_are_not_used(
    grown: Release,
    everything: EvaluationConfig,
    damage: Callable[[Path], None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work, planned = open_prediction_plan(grown, everything)
    damage(grown.paths.evaluation(planned.name).earlier)
    predict(work.root, range(len(planned.shards)))
    assert read_record(work.task("none", 0)).done == 30
    assert re.search(f"earlier.parquet: .*{message}", caplog.text)


def test_an_image_that_changed_is_classified_though_its_number_was(
    grown: Release, everything: EvaluationConfig
) -> None:
    work, planned = open_prediction_plan(grown, everything)
    path = grown.paths.evaluation(planned.name).earlier
    changed(path, with_column("sha256", 0, "0" * 64))
    predict(work.root, range(len(planned.shards)))
    assert read_record(work.task("none", 0)).done == 13


# The merge


def test_missing_and_foreign_shards_are_all_named(release: Release, predicted: Predicted) -> None:
    work, planned = predicted
    work.shard(1).unlink()
    shutil.copy(work.shard(0), work.shard(2))
    changed(work.shard(3), lambda table: table, plan="0" * 64)
    with pytest.raises(IntegrityError) as error:
        merge_shards(release, work, planned)
    missing, moved, foreign = str(error.value).splitlines()
    assert "1 of 4 shards of predictions missing (1); make them with: sdwn evaluate" in missing
    assert f"{work.shard(2)}: id: of other images than the release has" in moved
    assert f"{work.shard(3)}: foreign: of release {release.digest[:12]}, plan {'0' * 12}" in foreign
    assert f"expected {release.digest[:12]}, {planned.digest[:12]}" in foreign
    again = f"rm {work.shard(3)} && sdwn evaluate {release.paths.root} --model test_vit"
    assert f"make it again: {again}" in foreign


def test_rows_that_are_not_the_releases_are_named(release: Release, predicted: Predicted) -> None:
    work, planned = predicted
    for name, value in {"number": 7, "wnid": "n00000000", "status": "black"}.items():
        whole = work.shard(0).read_bytes()
        changed(work.shard(0), with_column(name, 2, value))
        with pytest.raises(IntegrityError, match=rf"0\.parquet: {name}: of other images than the"):
            merge_shards(release, work, planned)
        work.shard(0).write_bytes(whole)


def test_shards_of_other_weights_or_settings_are_refused(
    release: Release, predicted: Predicted
) -> None:
    work, planned = predicted
    found = Predictions.read(work.shard(2), 99)
    other = {**found.network, "mean": [0]}
    changed(work.shard(2), lambda table: table, network=other)
    with pytest.raises(IntegrityError, match=r"00002\.parquet: of other weights or settings"):
        merge_shards(release, work, planned)


def test_what_no_classifier_says_is_refused(predicted: Predicted) -> None:
    """A class or rank is an index that exists."""
    path = predicted[0].shard(0)
    whole = path.read_bytes()
    for name, value in (("top5", [1, 2, 3]), ("top5", [1, 2, 3, 4, 1000]), ("label_rank", 1000)):
        changed(path, with_column(name, 1, value))
        with pytest.raises(
            IntegrityError, match=r"0\.parquet: damaged: no table of predictions; eval"
        ):
            Predictions.read(path, 99)
        path.write_bytes(whole)


def test_a_damaged_table_is_named(release: Release, predicted: Predicted) -> None:
    work, planned = predicted
    path = work.shard(0)
    whole = path.read_bytes()
    for damage in (whole[:-30], b"", whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        path.write_bytes(damage)
        with pytest.raises(IntegrityError, match=r"00000\.parquet: damaged") as error:
            Predictions.read(path, 99)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    changed(path, lambda table: table.slice(0, 2))
    with pytest.raises(IntegrityError, match="id: of other images than the release has"):
        merge_shards(release, work, planned)


# A task


@pytest.mark.parametrize("fails", ["reading", "writing"])
def test_a_disk_that_fails_for_a_moment_is_waited_for(
    release: Release, tiny: EvaluationConfig, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setattr(task, "WAIT_SECONDS", 1e9)
    monkeypatch.setattr(task, "RETRY_SECONDS", 0.05)
    work, planned = open_prediction_plan(release, tiny)
    failures = iter([False] * 5 + [True, True])
    real = os.pread if fails == "reading" else files.sync

    def failing(*arguments: Any) -> Any:
        if next(failures, False):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(*arguments)

    monkeypatch.setattr(*((os, "pread") if fails == "reading" else (files, "sync")), failing)
    predict(work.root, range(len(planned.shards)))
    record = read_record(work.task("none", 0))
    assert next(failures, None) is None
    assert (record.done, record.total) == (15, 15)
    assert len(merge_shards(release, work, planned).table) == 15


def test_a_task_refuses_another_plan_and_other_weights(
    release: Release, tiny: EvaluationConfig, tmp_path: Path
) -> None:
    weights = save_tiny(tmp_path / "own.safetensors", seed=3)
    work, planned = open_prediction_plan(release, tiny.model_copy(update={"checkpoint": weights}))
    with pytest.raises(SdwnError, match="submitted for plan 000000000000"):
        ArrayTask(PREDICT, str(work.root), (0,), "0" * 64)()
    save_tiny(weights, seed=4)
    with pytest.raises(SdwnError, match=r"expected the checkpoint .* that this was planned for"):
        ArrayTask(PREDICT, str(work.root), (0,), planned.digest)()
    assert work.done_shards() == set()


def test_a_plan_of_predictions_that_was_altered_is_refused(
    release: Release, tiny: EvaluationConfig
) -> None:
    work, planned = open_prediction_plan(release, tiny)
    work.plan.write_text(work.plan.read_text().replace('"images": 15', '"images": 14'))
    with pytest.raises(IntegrityError, match="its digest no longer fits; evaluate the release"):
        open_planned_release(work)
    _, again = open_prediction_plan(release, tiny)
    assert again == planned, "written anew"


# The command


def test_wrong_use_is_said_in_one_line(
    sdwn: Sdwn, release: Release, checkpoint: Path, tmp_path: Path
) -> None:
    command = ("evaluate", release.paths.root, "--model", "test_vit", "--checkpoint", checkpoint)
    assert "need --profile" in sdwn(*command, "--wait", code=2).stderr
    assert "need --profile" in sdwn(*command, "--partition", "gpu", code=2).stderr
    refused = sdwn(*command, "--batch-size", "many", code=2).stderr
    assert "expected a number of images, found 'many'" in refused
    assert "no groups 'moon'" in sdwn(*command, "--groups", "moon", code=2).stderr
    missing = ("--checkpoint", tmp_path / "none")
    refused = sdwn("evaluate", release.paths.root, *missing, code=2).stderr
    assert "none: no such checkpoint file" in refused
    (tmp_path / "words.pth").write_text("words")
    wrong = ("--model", "test_vit", "--checkpoint", tmp_path / "words.pth")
    refused = sdwn("evaluate", release.paths.root, *wrong, code=1).stderr
    assert "words.pth: not a readable safetensors or torch file" in refused
    assert not release.paths.evaluations.exists(), "no work is begun"
    found = sdwn.json(*command, "--batch-size", "7")
    assert json.loads(Path(found["path"]).read_text())["classifier"]["predicted_on"] == [
        {"device": "cpu", "dtype": "float32", "batch_size": 7, "images": 15}
    ]


def evaluated_by(generated: PlanRun, name: str, settings: dict[str, Any]) -> RunPaths:
    """A run that is generated, whose config names these settings of its evaluation."""
    paths, plan = generated(name, evaluation=settings)
    write_plan(plan, paths)  # what is generated is of any run of this plan
    return paths


def test_a_release_is_evaluated_as_its_runs_config_says(
    sdwn: Sdwn, generated: PlanRun, everything: EvaluationConfig, tmp_path: Path
) -> None:
    settings = everything.model_dump(mode="json")
    paths, out = evaluated_by(generated, "named", settings), tmp_path / "out"
    sdwn("merge", paths.root, "--release", out)
    done = sdwn("evaluate", out)
    told = " ".join(done.stderr.split())
    assert f"test_vit with {everything.checkpoint} (from the run's config; another" in told
    (name,) = [folder.name for folder in (out / "evaluations").iterdir()]
    assert re.fullmatch(r"test_vit-[0-9a-f]{8}-all", name)
    # Part of a release is evaluated alike.
    sdwn("export", out, tmp_path / "part", "--format", "release", "--imagenet")
    chosen = evaluation_settings(tmp_path / "part", None, None, NOTHING_GIVEN, console.say)
    assert chosen == everything


NOTHING_GIVEN = {"images": None, "groups": None, "embedding": None}


def test_what_is_given_comes_before_what_the_config_says(
    generated: PlanRun, tiny: EvaluationConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"groups": str(tmp_path / "gone.yaml"), "embedding": str(tmp_path / "gone.txt")}
    settings = {**tiny.model_dump(mode="json"), **gone, "images": "all"}
    release = merge([evaluated_by(generated, "named", settings)], ReleasePaths(tmp_path / "out"))
    root = release.paths.root
    chosen = evaluation_settings(root, "resnet50", None, NOTHING_GIVEN, console.say)
    assert chosen == EvaluationConfig(model="resnet50", images="all")
    told = " ".join(capsys.readouterr().err.split())
    assert "gone.yaml, is not here: the default is used" in told
    assert "classifier: resnet50 (from the command line)" in told
    groups = evaluation_settings(
        root, None, None, {**NOTHING_GIVEN, "groups": "default"}, console.say
    )
    assert groups == tiny.model_copy(update={"groups": "default", "images": "all"})
    release.paths.manifest.write_text(
        release.paths.manifest.read_text().replace("tiny.safetensors", "gone.safetensors")
    )
    with pytest.raises(UsageError, match=r"gone\.safetensors: the run's config takes .* --model"):
        evaluation_settings(root, None, None, NOTHING_GIVEN, console.say)
    assert evaluation_settings(root, "paper", None, NOTHING_GIVEN, console.say).checkpoint is None


def test_a_release_that_names_no_classifier_is_evaluated_by_the_papers(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(release.paths.manifest.read_text())
    del manifest["evaluation"]  # as an older sdwn wrote it
    release.paths.manifest.write_text(json.dumps(manifest))
    assert (
        evaluation_settings(release.paths.root, None, None, NOTHING_GIVEN, console.say)
        == EvaluationConfig()
    )
    assert "paper (the default; another with --model)" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", [{"groups": {"a": 1}}, {"embedding": 1}, {"model": None}])
def test_settings_of_a_wrong_kind_in_a_manifest_are_told(
    release: Release, damaged: dict[str, Any]
) -> None:
    manifest = json.loads(release.paths.manifest.read_text())
    manifest["evaluation"] |= damaged
    release.paths.manifest.write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=rf"manifest\.json: .*{next(iter(damaged))}"):
        evaluation_settings(release.paths.root, None, None, NOTHING_GIVEN, console.say)


def test_of_runs_that_name_different_classifiers_the_first_counts(
    sdwn: Sdwn, generated: PlanRun, tmp_path: Path
) -> None:
    first = evaluated_by(generated, "first", {"model": "resnet50"})
    second = evaluated_by(generated, "second", {"model": "vit_base_patch16_224"})
    for index in first.done_shards():
        (second if index else first).shard(index).unlink()
    sdwn("merge", first.root, second.root, "--release", tmp_path / "out")
    assert Release(tmp_path / "out").manifest.evaluation == {
        **EvaluationConfig().model_dump(mode="json"),
        "model": "resnet50",
    }


def test_tasks_ask_for_a_gpu_and_for_shards_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "{partition: main, gres: 'gpu:a100:4', shards_per_task: 3, batch_size: 10, "
        "stages: {evaluate: {partition: quick}, report: {partition: cpu}}}"
    )
    classify, conclude = evaluation_profiles(str(path), {})
    assert (classify.gres, classify.partition) == ("gpu:a100:1", "quick")
    assert (classify.shards_per_task, classify.batch_size) == (8, None)
    assert (conclude.gres, conclude.partition) == (None, "cpu")
    flags = {"partition": "night", "shards_per_task": "2", "batch_size": "64"}
    asked, conclude = evaluation_profiles(str(path), flags)
    assert (asked.partition, conclude.partition) == ("night", "cpu")
    assert (asked.shards_per_task, asked.batch_size) == (2, 64)


# On a real SLURM


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The testbed's profile; an array of two tasks makes the four shards of a release."""
    return profile_for_testbed(tmp_path, "stages: {evaluate: {shards_per_task: 2}}")


@pytest.mark.slurm
def test_an_array_classifies_and_what_a_killed_task_lost_is_submitted_again(
    sdwn: Sdwn, release: Release, checkpoint: Path, site: Path, cluster: Testbed
) -> None:
    command = ("evaluate", release.paths.root, "--model", "test_vit", "--checkpoint", checkpoint)
    first = sdwn.json(*command, "--profile", site)
    array = first["job_ids"][0].partition("_")[0]
    assert first["job_ids"] == [f"{array}_0", f"{array}_1"]
    work = RunPaths(Path(first["work"]))
    wait_until(lambda: workers(work))
    os.kill(workers(work)[0], signal.SIGKILL)
    again = sdwn.json(*command, "--profile", site)
    assert again["submitted"] <= 1, "only what was lost"
    wait_until(lambda: not cluster.run("squeue", "--noheader"))
    status = sdwn.json("status", work.root)
    assert status["shards_failed"] + status["shards_done"] == 4
    if not again["submitted"]:
        assert status["shards_failed"] == 2
        assert "2 of 4 shards of predictions missing" in status["then"]["conclude"]
        assert sdwn.json("logs", work.root)["logs"]
        again = sdwn.json(*command, "--profile", site)
        assert len(again["failures"]) == again["submitted"] + 1 == 2
        wait_until(lambda: not cluster.run("squeue", "--noheader"))
    evaluation = release.paths.evaluation(first["evaluation"])
    assert json.loads(evaluation.evaluation.read_text())["images_classified"] == 15
    assert sdwn.json("status", work.root)["then"] == {"conclude": "done"}
    assert verify(release.paths.root, quick=True) == []


@pytest.mark.slurm
def test_cancel_ends_all_jobs_of_an_evaluation_and_waiting_goes_on(
    sdwn: Sdwn, release: Release, checkpoint: Path, site: Path, cluster: Testbed
) -> None:
    command = ("evaluate", release.paths.root, "--model", "test_vit", "--checkpoint", checkpoint)
    held = site.with_name("held.yaml")
    held.write_text(site.read_text() + "sbatch: {hold: true}\n")
    submitted = sdwn.json(*command, "--profile", held)
    conclude = cluster.run("scontrol", "-o", "show", "job", submitted["then"]["conclude"])
    assert "gres" not in conclude.partition("TresPerNode=")[2]
    assert f"afterany:{submitted['job_ids'][0].partition('_')[0]}" in conclude
    moved = sdwn.json(*command, "--profile", held)
    assert (moved["submitted"], moved["live"]) == (0, 4)
    assert moved["then"] == submitted["then"], "it waits there already"
    refused = sdwn(*command, code=1).stderr
    assert "tasks are live, classifying this; run the same command when they have ended" in refused
    cancelled = sdwn.json("cancel", submitted["work"])["job_ids"]
    assert {*cancelled} == {*submitted["job_ids"], *submitted["then"].values()}
    found = sdwn.json(*command, "--profile", site, "--wait", "--shards-per-task", "4")
    assert found["images"] == 15
    work = RunPaths(Path(submitted["work"]))
    assert not work.shards.exists(), "they are merged"
    status = sdwn.json("status", work.root)
    assert (status["images_done"], status["shards_done"], status["shards_missing"]) == (15, 4, 0)
    (record,) = (json.loads(path.read_text()) for path in work.tasks.glob("*.json"))
    assert (record["total"], record["done"], record["ended"]) == (15, 15, True)
    again = sdwn.json(*command, "--profile", site)
    assert again == found, "nothing is submitted again"
