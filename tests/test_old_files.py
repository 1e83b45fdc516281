"""Files of version 0.1.0, as its commands wrote them into tests/files: each must stay readable."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sdwn.config import EvaluationConfig, load_config
from sdwn.devices.tuning import find_profile, read_profile, store_profile
from sdwn.errors import SdwnError
from sdwn.evaluation.evaluate import keep_computed
from sdwn.evaluation.record import read_evaluation
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export
from sdwn.generation.regenerate import regenerate
from sdwn.generation.task import generate
from sdwn.io import read_json
from sdwn.jobs.journal import open_journal, read_journal
from sdwn.jobs.task import read_record
from sdwn.models.lock import locked_weights, read_lock
from sdwn.paths import ReleasePaths, RunPaths, shipped_file
from sdwn.planning.plan import make_plan, read_plan, write_plan
from sdwn.prediction.table import Predictions
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.storage.shards import ImageFile
from sdwn.wordnet.corpus import WordNet, read_catalog

from conftest import REPOSITORY, Sdwn
from drawn import evaluate

FILES = REPOSITORY / "tests/files"
NAME = "efficientnet-lite0"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The files, where they may be written to."""
    return Path(shutil.copytree(FILES, tmp_path / "old"))


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        ("paper", "c3cccf6e8d7719772669cc2833e3186b4b950993511f7918bbbed5386d788c3d"),
        ("demo", "01292e796795938455c093eb996f801d20ebfe968aceae59afdda0b20fd42ad5"),
        ("rehearsal", "12c2213caf79414ca8070c2a6e307fe5fab3d27e3e18d8ff36f430033edf714f"),
    ],
)
def test_the_plans_of_the_shipped_configs_stay_the_same(
    config: str, digest: str, wordnet: WordNet
) -> None:
    settings = load_config(shipped_file("config", config))
    assert make_plan(settings, read_catalog(settings.catalog, wordnet)).digest == digest


def test_a_later_setting_is_written_only_where_somebody_uses_it(
    tmp_path: Path, wordnet: WordNet
) -> None:
    config, written = shipped_file("config", "demo"), {}
    for name, overrides in {"plain": (), "same": ("{}",), "used": ("{clip_skip: 1}",)}.items():
        settings = load_config(config, tuple(f"generation.options={text}" for text in overrides))
        plan = make_plan(settings, read_catalog(settings.catalog, wordnet))
        paths = RunPaths(tmp_path / name)
        write_plan(plan, paths)
        written[name] = (plan.digest, "options" in paths.plan.read_text())
        assert read_plan(paths).config == settings
    assert written["plain"] == written["same"]
    assert written["used"][0] != written["plain"][0]
    assert (written["plain"][1], written["used"][1]) == (False, True)


def test_a_stopped_run_is_finished_with_the_same_images(old: Path) -> None:
    paths = RunPaths(old / "stopped")
    assert paths.done_shards() == {0}
    assert paths.piece_ranges(1) == [(0, 2)]
    before = read_record(paths.task("none", 0))
    assert (before.done, before.total) == (6, 10)
    generate(paths.root, [0, 1, 2])
    made = merge([paths], ReleasePaths(paths.release))
    whole = Release(old / "release")
    columns = ["id", "wnid", "number", "seed", "prompt", "prompt_number", "negative_prompt"]
    columns += ["sha256", "retried_fp32"]
    assert made.metadata.select(columns).equals(whole.metadata.select(columns))
    attempts = made.metadata["attempt"].to_pylist()
    assert attempts[:6] == [1] * 6
    with ImageFile(paths.shard(0)) as kept, ImageFile(paths.shard(1)) as joined:
        versions = [int(file.attributes["format_version"]) for file in (kept, joined)]
        assert versions == [1, 2], "what is written is of this version, also from partial shards"
        assert kept.task_runs[0]["host"] == joined.task_runs[0]["host"] == "node1"
        assert len({str(task_run) for task_run in joined.task_runs}) == 2
        assert sorted(set(joined.rows()["task_run"].tolist())) == [0, 1]


def test_planning_again_brings_a_plan_to_this_version(old: Path) -> None:
    paths = RunPaths(old / "stopped")
    plan = read_plan(paths)
    assert not write_plan(plan, paths), "planned already"
    paths.synsets.unlink()
    found = read_plan(paths)
    assert found.recorded_counts is not None
    assert (found.digest, found.shards) == (plan.digest, plan.shards)
    assert tuple(found.concepts) == plan.concepts
    assert read_json(paths.plan)["format_version"] == 2
    new = RunPaths(old / "new")
    assert write_plan(replace(plan, recorded_digest=None), new)
    assert read_plan(new).digest == plan.digest, "what version 1 could have written keeps it"


def test_a_journal_is_read(old: Path) -> None:
    paths = RunPaths(old / "stopped")
    made, refused, unknown = read_journal(paths)
    assert (made.executor, made.stage, made.ids) == ("slurm", "generate", ("71_0", "71_1", "71_2"))
    assert made.plan == read_plan(paths).digest
    assert (made.site.account, made.site.gpu_kind) == ("lab", "a100")
    assert refused.refused == "sbatch: error: QOSMaxSubmitJobPerUserLimit"
    assert unknown.stage == "merge"
    assert unknown.unsettled
    assert open_journal(paths).cancellations == 1


def test_a_task_that_waits_since_then_says_how_to_submit_it_again(old: Path) -> None:
    # submitit pickles it; a requeue after an upgrade loads it again. It names its stage by a word.
    task = pickle.loads((old / "task.pkl").read_bytes()).function
    assert (task.stage.name, task.path, task.indices) == ("generate", "/data/run", (1, 2))
    assert (task.plan, task.code, task.idle) == ("0" * 64, "0.1.0", 0)
    here = replace(task, path=str(old / "stopped"), plan="")
    with pytest.raises(SdwnError, match=f"submit it again with: sdwn submit {old}/stopped"):
        here()
    assert RunPaths(old / "stopped").done_shards() == {0}


def test_a_release_and_its_evaluation_are_read(old: Path, sdwn: Sdwn) -> None:
    root = old / "release"
    assert verify(root) == []
    release = Release(root)
    assert release.image(0).size == (16, 8)
    assert release.provenance(0)["task_run"]["host"] == "node1"
    assert [plan.images for plan in release.manifest.plans] == [10]
    assert release.row(0)["plan"] == release.manifest.plan_digest
    assert release.row(0)["id"] == release.row(0)["wnid"]
    assert release.row(0)["label"] == "Pembroke"
    for index in range(len(release)):
        row = release.row(index)
        assert regenerate(release, row["id"], row["number"])[0].verdict == "equal"
    assert export(release, old / "again", ExportOptions("release"))["images"] == 10
    again = Release(old / "again")
    assert verify(again.paths.root) == []
    assert again.metadata["sha256"].equals(release.metadata["sha256"])
    paths = release.paths.evaluation(NAME)
    assert read_evaluation(release, paths)["figures"]
    assert len(Predictions.read(paths.predictions, 99).table) == 4
    # A release grown from it takes its predictions along.
    keep_computed(release, ReleasePaths(old / "grown"))
    kept = Predictions.read(ReleasePaths(old / "grown").evaluation(NAME).earlier, 99).table
    assert (
        kept["sha256"].to_pylist() == release.subset(imagenet=True).metadata["sha256"].to_pylist()
    )
    sdwn("report", root)
    assert paths.report.exists()


def test_an_import_whose_classification_was_stopped_is_evaluated(old: Path) -> None:
    release = Release(old / "imported")
    assert release.manifest.origin == "import"
    work = release.paths.evaluation(NAME).work
    shard = work.shard(0).read_bytes()
    evaluate(release, EvaluationConfig(model=NAME))
    paths = release.paths.evaluation(NAME)
    before = old / "shard.parquet"
    before.write_bytes(shard)
    # Predictions of version 1 do not name the images' SHA-256; the release does.
    shard, images = Predictions.read(before, 99), release.subset(imagenet=True).metadata
    found = Predictions.read(paths.predictions, 99).table
    assert shard.keyed(before, images).table.equals(found)
    assert found["sha256"].to_pylist() == images["sha256"].to_pylist()
    assert verify(release.paths.root) == []


def test_a_lock_and_a_gpu_profile_are_read(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(old / "locked")
    model = read_plan(paths).config.model
    lock, weights = read_lock(paths, model), locked_weights(paths, model)
    assert lock is not None
    assert weights is not None
    assert (lock.source, lock.revision) == ("builtin", "f8295922c59da4df")
    assert weights.revision == lock.revision, "its run goes on"
    profile = read_profile(old / "gpu-profile.json")
    assert (profile.workload.model, profile.tuning.batch_size) == ("builtin:tiny", 32)
    # Its name was a hash alone; what is tuned since then goes before it.
    monkeypatch.setenv("SDWN_CACHE", str(old / "cache"))
    kept = old / "cache/gpus/0123456789abcdef.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(old / "gpu-profile.json", kept)
    assert find_profile(profile.workload) == profile
    name = re.compile(r"cpu_builtin-tiny_[0-9a-f]{8}\.json")
    later = store_profile(replace(profile, measured="2027-01-01"))
    assert name.fullmatch(later.path.name)
    assert read_json(later.path)["format_version"] == 2
    assert find_profile(profile.workload) == later
    assert read_json(old / "comparison/comparison.json")["format_version"] == 1
