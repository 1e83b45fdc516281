from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.generation.batching import NoiseSampler
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release

from conftest import FEW, PlanRun, Sdwn, interrupt_at


@pytest.fixture
def planned(planned: PlanRun) -> PlanRun:
    return partial(planned, catalog=FEW)


@pytest.fixture
def generated(generated: PlanRun) -> PlanRun:
    return partial(generated, catalog=FEW)


@pytest.fixture
def run(generated: PlanRun) -> tuple[RunPaths, Plan]:
    return generated()


SMALL_PARTS = MergeOptions(part_bytes=1)


def target(paths: RunPaths) -> ReleasePaths:
    return ReleasePaths(paths.release)


def refused(runs: list[RunPaths], into: ReleasePaths) -> str:
    """Merge, expect a refusal, and return what it says; nothing may be left of the attempt."""
    with pytest.raises(IntegrityError) as error:
        merge(runs, into)
    assert not into.root.exists()
    assert not list(into.root.parent.glob(f".{into.root.name}*"))
    return str(error.value)


def test_a_release_holds_every_image_with_its_record(run: tuple[RunPaths, Plan]) -> None:
    paths, plan = run
    release = merge([paths], target(paths))
    specs = [spec for shard in plan.shards for spec in plan.specs(shard)]
    assert len(release) == plan.images == len(specs)
    sampler = NoiseSampler(plan.config)
    for index in (0, 7, len(specs) - 1):
        row, sample = release.row(index), sampler.sample([specs[index]])[0]
        assert (row["wnid"], row["number"]) == (specs[index].concept.wnid, specs[index].number)
        assert (row["seed"], row["prompt"]) == (specs[index].seed, specs[index].prompt)
        assert row["sha256"] == hashlib.sha256(release.payload(row)).hexdigest()
        assert release.image(index).tobytes() == sample.pixels.tobytes()
    assert verify(release.paths.root) == []


@pytest.mark.process
def test_other_tools_read_a_release(
    run: tuple[RunPaths, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = run
    release = merge([paths], target(paths)).paths
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=release.root,
        capture_output=True,
        check=False,
    )
    assert check.returncode == 0, check.stderr
    table = pq.read_table(release.metadata)
    assert table.num_rows == plan.images
    assert table["imagenet_class"].null_count < table.num_rows
    row = table.slice(3, 1).to_pylist()[0]
    with h5py.File(release.root / row["part"]) as part:
        start, stop = part["offsets"][row["row"] : row["row"] + 2]
        payload = bytes(part["blob"][start:stop])
        assert hashlib.sha256(payload).hexdigest() == row["sha256"]
        assert len(payload) == row["bytes"]
    card = release.card.read_text()
    assert card.startswith("---\n")
    assert f"{plan.images} synthetic images of {len(plan.concepts)} WordNet synsets" in card
    assert "says nothing about Stable Diffusion" in card
    example = card.split("```python\n")[1].split("```")[0] + "image.load()"
    monkeypatch.chdir(release.root)
    exec(example, {})  # as a reader would paste it


def test_parts_are_whole_shards_and_one_table_covers_them(run: tuple[RunPaths, Plan]) -> None:
    paths, plan = run
    one = merge([paths], ReleasePaths(paths.root / "one"))
    many = merge([paths], ReleasePaths(paths.root / "many"), MergeOptions(part_bytes=1))
    assert len(list(one.paths.root.glob("*.h5"))) == 1
    assert len(list(many.paths.root.glob("*.h5"))) == len(plan.shards)
    assert many.metadata["sha256"] == one.metadata["sha256"]
    assert many.image(len(many) - 1).tobytes() == one.image(len(one) - 1).tobytes()
    assert verify(many.paths.root) == []


def test_small_images_end_a_part_by_their_number(
    run: tuple[RunPaths, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = run
    monkeypatch.setattr("sdwn.releases.merge.PART_IMAGES", plan.shards[-1].images)
    release = merge([paths], target(paths))
    parts = len(list(release.paths.root.glob("*.h5")))
    assert parts == len(plan.shards) > 1
    assert pq.ParquetFile(release.paths.metadata).num_row_groups == parts, "written as they come"
    manifest = release.manifest
    assert manifest.images == sum(manifest.statuses.values()) == plan.images
    assert (manifest.concepts, manifest.truncated) == (len(plan.concepts), 0)


def test_merging_again_keeps_the_release(run: tuple[RunPaths, Plan]) -> None:
    paths, _ = run
    digest = merge([paths], target(paths)).digest
    assert merge([paths], target(paths)).digest == digest


def test_runs_of_one_plan_merge_together(generated: PlanRun, planned: PlanRun) -> None:
    first, plan = generated("first")
    second, _ = planned("second")
    second.shards.mkdir()
    for index in range(0, len(plan.shards), 2):
        first.shard(index).rename(second.shard(index))
    release = merge([first, second], ReleasePaths(first.root / "release"))
    assert len(release) == plan.images


def test_missing_shards_are_named(run: tuple[RunPaths, Plan]) -> None:
    paths, plan = run
    for index in (1, 2, 4):
        paths.shard(index).unlink()
    assert len(plan.shards) > 5
    message = refused([paths], target(paths))
    assert "3 shards (1-2, 4) missing" in message
    assert f"sdwn submit {paths.root} --wait" in message


def test_duplicate_shards_are_named(generated: PlanRun) -> None:
    first, _ = generated("first")
    second, _ = generated("second")
    for path in second.shards.iterdir():
        if path != second.shard(1):
            path.unlink()
    message = refused([first, second], target(first))
    assert message == (
        f"shard 1: duplicate: {first.shard(1)}, {second.shard(1)}; remove all but one"
    )


def test_foreign_shards_are_named(generated: PlanRun) -> None:
    paths, _ = generated("mine")
    other, plan = generated("other", seed=5)
    shutil.copy(other.shard(0), paths.shard(0))
    shutil.copy(paths.shard(2), paths.shard(1))
    shutil.copy(paths.shard(2), paths.shard(999))
    message = refused([paths], target(paths))
    assert f"{paths.shards}: foreign: shard 0 of plan {plan.digest[:12]}, not " in message
    assert f"{paths.shard(1)}: expected shard 1, found shard 2 of this plan; move it" in message
    assert f"{paths.shard(999)}: expected shard 999, found shard 2 of this plan" in message
    assert len(message.splitlines()) == 3
    assert "rm " not in message, "each of them is whole"


@pytest.mark.parametrize("fewer", [False, True])
def test_a_plan_that_was_replaced_is_named_and_no_shard_to_be_deleted(
    generated: PlanRun, planned: PlanRun, fewer: bool
) -> None:
    """Also where the other plan has fewer shards, of more images."""
    paths, plan = generated("mine")
    new, _ = planned("new", seed=7, **({"storage": {"images_per_shard": 40}} if fewer else {}))
    for name in ("plan.json", "concepts.parquet"):
        shutil.copy(new.root / name, paths.root / name)
    message = refused([paths], target(paths)).splitlines()[0]
    assert f"shards (0-{len(plan.shards) - 1}) of plan {plan.digest[:12]}" in message
    assert "plan.json was replaced" in message
    assert "rm " not in message


@pytest.mark.process
def test_status_and_submit_name_the_plan_that_was_replaced(planned: PlanRun, sdwn: Sdwn) -> None:
    paths, plan = planned("mine")
    sdwn("submit", paths.root, "--wait", "--profile", "local")
    new, _ = planned("new", seed=7)
    for name in ("plan.json", "concepts.parquet"):
        shutil.copy(new.root / name, paths.root / name)
    told = f"jobs were submitted here for plan {plan.digest[:12]}"
    assert told in sdwn("status", paths.root).stderr
    assert told in sdwn("submit", paths.root, code=2).stderr


def test_damaged_shards_are_named_with_the_remedy(run: tuple[RunPaths, Plan]) -> None:
    paths, _ = run
    whole = paths.shard(0).read_bytes()
    paths.shard(0).write_bytes(whole[:-20])
    message = refused([paths], target(paths))
    assert f"{paths.shard(0)}: damaged: " in message
    assert f"rm {paths.shard(0)} && sdwn submit {paths.root} --wait" in message
    paths.shard(0).write_bytes(whole)
    for index in (0, 3):
        with h5py.File(paths.shard(index), "r+") as file:
            file["blob"][5] ^= 1
    message = refused([paths], target(paths))
    assert f"{paths.shard(0)}: image 0 is damaged" in message
    assert f"{paths.shard(3)}: image 0 is damaged" in message


def test_a_damaged_table_of_the_plan_is_named_and_no_shard_to_be_deleted(
    run: tuple[RunPaths, Plan],
) -> None:
    paths, _ = run
    for damage in (b"PAR1", None):
        paths.concepts.write_bytes(damage) if damage else paths.concepts.unlink()
        message = refused([paths], target(paths))
        assert message.startswith(f"{paths.concepts}: ")
        assert "rm " not in message


def test_runs_of_different_plans_do_not_merge(generated: PlanRun) -> None:
    first, _ = generated("first")
    second, _ = generated("second", seed=1)
    with pytest.raises(UsageError, match="only runs of the same plan make a release"):
        merge([first, second], target(first))


def test_nothing_is_overwritten(generated: PlanRun, tmp_path: Path) -> None:
    first, _ = generated("first")
    second, _ = generated("second", seed=1)
    release = merge([first], target(first))
    with pytest.raises(UsageError, match="holds the release of another plan"):
        merge([second], target(first))
    assert verify(release.paths.root) == []
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(UsageError, match="expected an empty folder or none, found other files"):
        merge([first], ReleasePaths(tmp_path / "thesis"))
    assert (tmp_path / "thesis/chapter1.tex").read_text() == "years of work"


def journal(into: ReleasePaths) -> Path:
    return into.root.parent / f".{into.root.name}.unfinished/.journal.jsonl"


def test_a_killed_merge_goes_on_where_it_was(run: tuple[RunPaths, Plan]) -> None:
    paths, plan = run
    undisturbed = merge([paths], ReleasePaths(paths.root / "undisturbed"), SMALL_PARTS)
    unfinished, told = journal(target(paths)).parent, list[int]()
    with pytest.raises(KeyboardInterrupt):
        merge([paths], target(paths), SMALL_PARTS, interrupt_at(35))
    kept = {path.name: path.stat().st_ino for path in unfinished.glob("images-0000[012].h5")}
    assert len(kept) == 3
    (unfinished / ".images-00003.h5.elsewhere-1-0.tmp").write_bytes(b"half")
    with journal(target(paths)).open("a") as file:
        file.write('{"name": "images-000')
    release = merge([paths], target(paths), SMALL_PARTS, told.append)
    assert sum(told) == plan.images
    found = {path.name: path.stat().st_ino for path in paths.release.glob("images-0000[012].h5")}
    assert found == kept, "finished parts are not written again"
    assert verify(paths.release) == []
    assert parts(release) == parts(undisturbed)
    assert not unfinished.exists()


def parts(release: Release) -> dict[str, str]:
    return {file.file: file.sha256 for file in release.manifest.files if "README" not in file.file}


@pytest.mark.process
@pytest.mark.parametrize("parts", [0, 1, 3, 6])
def test_a_merge_may_be_killed_at_any_moment(run: tuple[RunPaths, Plan], parts: int) -> None:
    """At once, and as soon as so many of its parts are there or all is done."""
    paths, plan = run
    command = [sys.executable, "-m", "sdwn", "merge", paths.root, "--release", paths.release]
    command += ["--part-size", "1e-6"]
    process = subprocess.Popen(command)
    unfinished = journal(target(paths)).parent
    while len(list(unfinished.glob("images-*.h5"))) < parts and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert len(merge([paths], target(paths), MergeOptions(part_bytes=1000))) == plan.images
    assert verify(paths.release) == []
    assert not list(paths.root.glob(".release*"))


def test_a_shard_made_again_is_merged_again(run: tuple[RunPaths, Plan]) -> None:
    paths, _ = run
    whole = paths.shard(4).read_bytes()
    with h5py.File(paths.shard(4), "r+") as file:
        file["blob"][5] ^= 1
    with pytest.raises(IntegrityError, match="image 0 is damaged"):
        merge([paths], target(paths), SMALL_PARTS)
    assert journal(target(paths)).exists(), "four parts are finished"
    paths.shard(4).write_bytes(whole)
    other = paths.shard(1)
    other.write_bytes(other.read_bytes())  # the same bytes, but who knows that without reading
    merge([paths], target(paths), SMALL_PARTS)
    assert verify(paths.release) == []


def test_a_run_given_twice_is_refused(run: tuple[RunPaths, Plan]) -> None:
    paths, _ = run
    with pytest.raises(UsageError, match="is given twice"):
        merge([paths, RunPaths(paths.root / ".." / paths.root.name)], target(paths))


def alter(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def replaced(name: str, values: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: file.__delitem__("rows/seed"), "its rows are not those of the plan"),
        (replaced("rows/width", np.zeros(10, dtype="u4")), "its rows are not those of the plan"),
        (replaced("rows/wnid", np.arange(10)), "damaged: "),
        (replaced("rows/status", np.full(10, 200, dtype="u1")), "status: 200 is none of 5 values"),
        (
            replaced("task_runs", np.array([b"garbage"])),
            "damaged: JSONDecodeError",
        ),
    ],
)
def test_a_shard_with_wrong_contents_is_named(
    run: tuple[RunPaths, Plan], change: Callable[[h5py.File], None], expected: str
) -> None:
    paths, _ = run
    alter(paths.shard(0), change)
    message = refused([paths], target(paths))
    assert message.startswith(f"{paths.shard(0)}: ")
    assert expected in message


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, wordnet: Any) -> Path:
    from sdwn.generation.task import generate
    from sdwn.planning.plan import make_plan, write_plan
    from sdwn.wordnet.corpus import read_catalog

    from conftest import noise_config

    config = noise_config(catalog={"roots": ["corgi.n.01"]})
    plan = make_plan(config, read_catalog(config.catalog, wordnet))
    paths = RunPaths(tmp_path_factory.mktemp("released"))
    write_plan(plan, paths)
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], target(paths)).paths.root


# Without shrinking: the first find is as good as the smallest, and takes seconds, not minutes.
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(st.data())
def test_every_flipped_bit_is_found(released: Path, data: st.DataObject) -> None:
    files = sorted(path for path in released.iterdir() if path.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    altered = bytearray(whole)
    altered[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(altered)
    try:
        problems = verify(released)
    except SdwnError as error:
        problems = [str(error)]
    finally:
        path.write_bytes(whole)
    assert problems
    assert any(path.name in problem for problem in problems)


def test_damaged_missing_and_extra_things_are_named(released: Path, tmp_path: Path) -> None:
    root = shutil.copytree(released, tmp_path / "copy")
    with h5py.File(root / "images-00000.h5", "r+") as file:
        file["blob"][int(file["offsets"][3])] ^= 16
        synset, number = file["rows/synset"].asstr()[3], file["rows/number"][3]
    (root / "concepts.parquet").unlink()
    (root / "notes.txt").write_text("mine")
    problems = verify(root)
    assert f"images-00000.h5: {synset} {number} is damaged" in problems
    assert "concepts.parquet: missing" in problems
    assert "notes.txt: not part of the release" in problems
    assert len(problems) == 3


def test_a_later_release_is_refused(released: Path, tmp_path: Path) -> None:
    root = shutil.copytree(released, tmp_path / "copy")
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "format_version": 3}))
    with pytest.raises(IntegrityError, match="expected sdwn-release 2, found sdwn-release 3"):
        Release(root)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"file": 3, "bytes": 1, "sha256": ""}]},
        {"images": -1},
        {"plans": [{"digest": 3}]},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_refused(
    released: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    root = shutil.copytree(released, tmp_path / "copy")
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(IntegrityError, match=r"manifest\.json: damaged"):
        Release(root)


def test_a_damaged_image_is_not_shown(released: Path, tmp_path: Path) -> None:
    root = shutil.copytree(released, tmp_path / "copy")
    with h5py.File(root / "images-00000.h5", "r+") as file:
        file["blob"][int(file["offsets"][3]) + 40] ^= 16
    release = Release(root)
    with pytest.raises(IntegrityError, match=r"3: images-00000\.h5 is damaged .*: sdwn verify"):
        release.image(3)


def test_a_folder_that_is_no_release_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SdwnError, match="no release here; make one with: sdwn merge RUN"):
        Release(tmp_path)
