"""A release in Python: rows, images, subsets, torch's DataLoader, and its record."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import resource
import shutil
import threading
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sdwn
import torch
from huggingface_hub import DatasetCard
from PIL.ImageFile import ImageFile
from sdwn.errors import IntegrityError, SdwnError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import select_listed
from sdwn.generation.batching import NoiseSampler
from sdwn.generation.task import generate
from sdwn.io import file_sha256
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.planning.plan import Plan, make_plan, write_plan
from sdwn.releases.merge import MergeOptions, merge
from sdwn.releases.release import Release
from sdwn.storage.images import decode, encode
from sdwn.wordnet.corpus import Synset, read_catalog
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from conftest import FEW, PlanRun, Sdwn, noise_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, wordnet: Any) -> tuple[Release, Plan]:
    """Corgis, terriers and dogs' own synset: 3 images each, several parts."""
    catalog = {"roots": ["corgi.n.01", "terrier.n.01"], "file": None}
    config = noise_config(catalog=catalog, images_per_synset=3)
    plan = make_plan(config, read_catalog(config.catalog, wordnet))
    paths = RunPaths(tmp_path_factory.mktemp("made"))
    write_plan(plan, paths)
    generate(paths.root, range(len(plan.shards)))
    return merge([paths], ReleasePaths(paths.release), MergeOptions(part_bytes=8000)), plan


@pytest.fixture
def release(made: tuple[Release, Plan]) -> Release:
    return Release(made[0].paths.root)


def test_the_package_gives_both_classes() -> None:
    assert issubclass(sdwn.Release, Release)
    assert sdwn.ReleaseDataset.__module__ == "sdwn.releases.dataset"
    assert {"Release", "ReleaseDataset"} <= set(dir(sdwn))
    with pytest.raises(AttributeError, match="no attribute 'Relaese'"):
        _ = sdwn.Relaese


def test_rows_are_found_by_index_wnid_synset_and_lemma(release: Release) -> None:
    for name in ("n02113023", "pembroke.n.01", "Pembroke", "pembroke_welsh_corgi"):
        rows = release.rows(name)
        assert [row["wnid"] for row in rows] == ["n02113023"] * 3
        assert [row["number"] for row in rows] == [0, 1, 2]
    index = int(release.find("pembroke.n.01")[1])
    assert release.row(index) == release.rows("pembroke.n.01")[1]
    assert release.row(-1) == release.row(len(release) - 1)
    for outside in (len(release), -len(release) - 1):
        with pytest.raises(IndexError, match="it holds"):
            release.row(outside)
        with pytest.raises(IndexError, match="it holds"):
            release.image(outside)


def test_a_lemma_of_several_synsets_gives_all_of_them(release: Release) -> None:
    wnids = {row.wnid for row in release.concepts.values() if "terrier" in row.lemmas.split(", ")}
    wnids |= {row.wnid for row in release.concepts.values() if "Scotch_terrier" in row.lemmas}
    found = {row["wnid"] for row in release.rows("scotch terrier")}
    assert found
    assert found <= wnids


def test_an_unknown_name_says_what_is_like_it(release: Release) -> None:
    with pytest.raises(UsageError, match=r"no id, label, synset or lemma .* did you mean pembroke"):
        release.rows("pembrok")
    with pytest.raises(UsageError, match=r"terrier\.n\.01 and below: no image of pembroke here"):
        release.subset(below="terrier.n.01").rows("pembroke")


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_is_found_however_its_accents_are_written(tmp_path: Path, stored: Any) -> None:
    name, lemma = (unicodedata.normalize(stored, text) for text in ("café.n.01", "Café_Liégeois"))
    synset = Synset("n00000001", name, (lemma,), "a coffee")
    plan = make_plan(noise_config(images_per_synset=1), (synset,))
    paths = RunPaths(tmp_path / "run")
    write_plan(plan, paths)
    generate(paths.root, [0])
    made = merge([paths], ReleasePaths(paths.release), MergeOptions())
    listing = tmp_path / "list.txt"
    for form in ("NFC", "NFD"):
        for asked in ("café.n.01", "café liégeois"):
            assert made.find(unicodedata.normalize(form, asked)).tolist() == [0]
        listing.write_text(unicodedata.normalize(form, "café.n.01"), encoding="utf-8")
        assert len(select_listed(made, listing)) == 1


def test_images_are_those_that_were_made(made: tuple[Release, Plan], release: Release) -> None:
    _, plan = made
    specs = [spec for shard in plan.shards for spec in plan.specs(shard)]
    samples = NoiseSampler(plan.config).sample(specs)
    for index, sample in enumerate(samples):
        assert np.array_equal(release.array(index), sample.pixels)
    assert release.image(release.row(4)).tobytes() == release.image(4).tobytes()
    assert release.image(-1).tobytes() == samples[-1].pixels.tobytes()
    assert release.array(0).dtype == np.uint8
    assert release.metadata.num_rows == len(release) == plan.images
    assert len(release.metadata.to_pandas()) == plan.images


def test_subsets_hold_what_was_asked_for(release: Release) -> None:
    classes = release.subset(imagenet=True)
    assert 0 < len(classes) < len(release)
    assert classes.metadata["imagenet_class"].null_count == 0
    corgis = release.subset(below="corgi.n.01")
    assert {row.synset for row in corgis.present} == {"pembroke.n.01", "cardigan.n.02"}
    own = release.subset(below="pembroke.n.01")
    assert {row["synset"] for row in own.metadata.to_pylist()} == {"pembroke.n.01"}
    both = release.subset(below="corgi.n.01", imagenet=True, status="ok")
    assert len(both) == 6
    assert len(both.subset(rows=[0, 5]).subset(rows=np.array([False, True]))) == 1
    assert both.subset(rows=[5]).row(0) == both.row(5)
    assert both.subset(rows=[5]).image(0).tobytes() == both.image(5).tobytes()
    assert len(release.subset(status=["nsfw", "nan"])) == 0
    assert both.described.images == 6
    assert both.described.concepts == 2
    assert both.described.statuses == {"ok": 6}
    assert both.described.name.startswith("below corgi.n.01 + below terrier.n.01 (")
    assert release.described is release.manifest
    with pytest.raises(UsageError, match="no status 'good'; valid: ok, nsfw"):
        release.subset(status="good")
    with pytest.raises(UsageError, match="no such synset"):
        release.subset(below="unicorn.n.09")


def test_a_sample_is_of_whole_synsets_and_nested(release: Release) -> None:
    tenth, half = release.sample(0.1), release.sample(0.5)
    synsets = {row.wnid for row in tenth.present}
    assert len(synsets) == round(0.1 * len(release.present))
    assert len(tenth) == 3 * len(synsets)
    assert synsets < {row.wnid for row in half.present}
    assert len(release.sample(0.0001).present) == 1
    assert len(release.sample(1)) == len(release)
    for wrong in (0, -1, 1.1):
        with pytest.raises(UsageError, match="more than 0 and at most 1"):
            release.sample(wrong)


def test_a_release_travels_to_other_processes(release: Release) -> None:
    chosen = release.subset(imagenet=True)
    chosen.image(0)
    copy = pickle.loads(pickle.dumps(chosen))
    assert copy.image(1).tobytes() == chosen.image(1).tobytes()
    assert copy.selection == chosen.selection
    assert len(pickle.dumps(release)) < 1000


def test_threads_share_a_release(release: Release) -> None:
    expected = [release.array(i) for i in range(len(release))]
    release = Release(release.paths.root)
    wrong: list[int] = []

    def read() -> None:
        wrong.extend(
            i for i in range(len(release)) if not np.array_equal(release.array(i), expected[i])
        )

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files_are_closed_again(release: Release) -> None:
    folder = Path("/proc/self/fd")
    before = len(list(folder.iterdir()))
    opened = Release(release.paths.root)
    for index in range(len(opened)):
        opened.image(index)
    assert len(list(folder.iterdir())) > before
    del opened
    assert len(list(folder.iterdir())) == before


@pytest.mark.process
@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_a_loader_with_workers_gives_every_pair_once(
    release: Release, context: str, workers: int
) -> None:
    release.image(0)  # an open file must not be shared by its position
    dataset = sdwn.ReleaseDataset(release, pil_to_tensor)
    loader = DataLoader(dataset, 7, num_workers=workers, multiprocessing_context=context)
    images, labels = zip(*loader, strict=True)
    pixels = torch.cat(images).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(pixels[i], release.array(i)) for i in range(len(release)))
    assert torch.cat(labels).tolist() == dataset.targets.tolist()


def test_labels_are_synsets_or_imagenet_classes(release: Release) -> None:
    dataset = sdwn.ReleaseDataset(release, target_transform=str)
    image, label = dataset[4]
    wnid = release.row(4)["wnid"]
    assert dataset.classes[int(label)] == wnid
    assert dataset.class_to_idx[wnid] == int(label)
    assert dataset.classes == sorted(row.wnid for row in release.present)
    assert image.mode == "RGB"
    with pytest.raises(UsageError, match=r"of no ImageNet-1k class; .*subset\(imagenet=True\)"):
        sdwn.ReleaseDataset(release, labels="imagenet")
    classes = sdwn.ReleaseDataset(release.subset(imagenet=True), labels="imagenet")
    assert len(classes.classes) == 1000
    assert classes.targets.tolist() == classes.release.metadata["imagenet_class"].to_pylist()
    assert classes.targets.flags.writeable
    with pytest.raises(UsageError, match=r"expected one of synset, label, .*, found 'caption'"):
        sdwn.ReleaseDataset(release, labels="caption")


def test_labels_are_prompts_or_values_of_any_column(release: Release) -> None:
    prompts = sdwn.ReleaseDataset(release, pil_to_tensor, labels="prompt")
    loader = DataLoader(prompts, 7, shuffle=True, num_workers=2)
    captions = [caption for _, batch in loader for caption in batch]
    assert sorted(captions) == sorted(release.metadata["prompt"].to_pylist())
    assert prompts.classes == []
    for name in ("seed", "truncated", "number"):
        labels = sdwn.ReleaseDataset(release, labels=name).targets.tolist()
        assert labels == release.metadata[name].to_pylist()


def test_provenance_is_enough_to_make_an_image_again(release: Release) -> None:
    found = release.provenance(4)
    assert found["task_run"]["model"] == "builtin:noise"
    assert {"device", "job", "host", "started"} <= set(found["task_run"])
    assert found["settings"]["generation"]["guidance_scale"] == 7.5
    assert {"seed", "prompt", "batch", "batch_size", "place", "attempt"} <= set(found["row"])


def test_the_card_is_what_a_hub_expects(release: Release) -> None:
    card = DatasetCard(release.paths.card.read_text())
    assert card.data.license == "other"
    assert card.data.pretty_name == "builtin:noise x below corgi.n.01 + below terrier.n.01"
    assert card.data.size_categories == "n<1K"
    assert card.data.configs == [{"config_name": "default", "data_files": "metadata.parquet"}]
    for needed in ("Princeton", "arXiv:2211.01777", "are black", "was cut off", "Apache-2.0"):
        assert needed in card.text


def test_a_cards_names_stay_in_their_places(planned: PlanRun) -> None:
    from sdwn.releases.writer import CardLayout, card

    paths, plan = planned(
        catalog=FEW, generation={"negative_prompt": "ugly | bad\n# Heading `x` <script>"}
    )
    generate(paths.root, range(len(plan.shards)))
    release = merge([paths], ReleasePaths(paths.release))
    hostile = release.manifest.model_copy(update={"catalog": "a: b\n---\n# Not mine"})
    columns = release.metadata.column_names
    text = card(hostile, plan.table, columns, CardLayout("release", None))
    header, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert DatasetCard(text).data.pretty_name == "builtin:noise x a: b\n---\n# Not mine"
    assert header.count("\n---") == 0
    assert "\n# Not mine" not in body
    assert "\n# Heading" not in body
    assert "<script>" not in body


def test_a_real_models_card_names_its_licence(release: Release) -> None:
    from sdwn.releases.writer import CardLayout, card

    assert release.manifest.settings
    model = {"name": "CompVis/stable-diffusion-v1-4", "revision": "abc", "variant": None}
    settings = {**release.manifest.settings, "model": model}
    (plan,) = release.manifest.plans
    plans = [plan.model_copy(update={"settings": settings})]
    real = release.manifest.model_copy(update={"plans": plans})
    text = card(real, release.concept_tables[0], ["wnid", "seed"], CardLayout("release", None))
    assert DatasetCard(text).data.license == "creativeml-openrail-m"
    assert "https://huggingface.co/CompVis/stable-diffusion-v1-4" in text
    assert "built-in" not in text


def test_a_partial_run_is_released_only_when_told(generated: PlanRun) -> None:
    paths, plan = generated(catalog=FEW)
    for index in (1, 2, 4):
        paths.shard(index).unlink()
    target = ReleasePaths(paths.release)
    with pytest.raises(IntegrityError, match=r"3 shards \(1-2, 4\) missing.*--allow-missing"):
        merge([paths], target)
    release = merge([paths], target, MergeOptions(allow_missing=True))
    assert verify(release.paths.root) == []
    missing = release.manifest.missing
    assert missing is not None
    assert (missing.shards, missing.concepts, missing.images) == ("1-2, 4", 6, 30)
    assert len(release) == plan.images - 30
    absent = release.paths.missing.read_text().splitlines()[1:]
    shards = {
        row.wnid: shard.index
        for shard in plan.shards
        for row in plan.concepts[shard.start : shard.stop]
    }
    assert {shards[line.split(",")[0]] for line in absent} == {1, 2, 4}
    text = release.paths.card.read_text()
    assert "**Incomplete.**" in text
    assert "6 synsets (shards 1-2, 4)" in text
    assert release.manifest.name.endswith(", incomplete")
    with pytest.raises(IntegrityError, match=r"3 shards \(1-2, 4\) missing"):
        merge([paths], target)
    assert len(merge([paths], target, MergeOptions(allow_missing=True))) == len(release)
    generate(paths.root, [2])
    with pytest.raises(UsageError, match="an incomplete release, and other shards are made by now"):
        merge([paths], target, MergeOptions(allow_missing=True))


def test_nothing_at_all_is_no_release(planned: PlanRun) -> None:
    paths, _ = planned()
    with pytest.raises(IntegrityError, match=r"20 shards \(0-19\) missing"):
        merge([paths], ReleasePaths(paths.release), MergeOptions(allow_missing=True))


def test_a_quick_check_finds_what_is_cheap_to_find(release: Release, tmp_path: Path) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    assert verify(root, quick=True) == []
    part = root / "images-00001.h5"
    part.write_bytes(part.read_bytes()[:-1])
    (root / "metadata.parquet").rename(root / "elsewhere.parquet")
    problems = verify(root, quick=True)
    assert any(p.startswith("images-00001.h5: expected") for p in problems)
    assert "metadata.parquet: missing" in problems
    assert "elsewhere.parquet: not part of the release" in problems


def test_a_part_that_its_disk_does_not_give_is_named_beside_what_else_is_wrong(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(release.paths.root, tmp_path / "copy"))
    (root / "README.md").write_text("changed")
    opened = os.open

    def failing(path: Any, *arguments: Any, **how: Any) -> int:
        if str(path).endswith("images-00000.h5"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *arguments, **how)

    monkeypatch.setattr(os, "open", failing)
    found = "\n".join(verify(root))
    assert "images-00000.h5: its disk fails" in found
    assert "README.md" in found


def test_what_a_desktop_or_a_file_server_left_is_named_and_no_problem(
    release: Release, tmp_path: Path, sdwn: Sdwn
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    (root / "evaluations/x").mkdir(parents=True)
    left = [
        *(".DS_Store", "._README.md", "Thumbs.db", ".nfs00000000012ab34c00000001"),
        *("@eaDir", "lost+found", ".snapshot", "evaluations/.DS_Store", "evaluations/x/@eaDir"),
    ]
    for name in left:
        if name.endswith(("@eaDir", "lost+found", ".snapshot")):
            (root / name).mkdir()
            (root / name / "images-00000.h5").symlink_to("nowhere")
        else:
            (root / name).touch()
    found = sdwn.json("verify", root, "--check", "quick")
    assert found["problems"] == []
    assert sorted(found["left_by_desktop_or_server"]) == sorted(left)
    (root / "notes.txt").touch()
    assert sdwn.json("verify", root, "--check", "quick", code=1)["problems"] == [
        "notes.txt: not part of the release"
    ]


def test_a_table_that_claims_more_rows_than_the_release_has_takes_no_memory(
    release: Release, tmp_path: Path
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    million = pa.table({"x": pa.array(np.zeros(1_000_000))})
    with pq.ParquetWriter(root / "metadata.parquet", million.schema) as writer:
        for _ in range(50):
            writer.write_table(million)
    assert (root / "metadata.parquet").stat().st_size < 1_000_000
    seal(root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = verify(root, quick=True)
    told = "metadata.parquet: expected at most 1,234 rows, it claims 50,000,000"
    assert any(problem.startswith(told) for problem in problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.mark.parametrize("name", ["manifest.json", "concepts.parquet", "metadata.parquet"])
def test_files_that_are_far_too_large_are_not_read(
    release: Release, tmp_path: Path, name: str
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    os.truncate(root / name, 2_000_000_000)  # a hole, which takes no space
    with pytest.raises(IntegrityError, match=rf"{name}: .*expected at most .*, found 2\.0 GB"):
        _ = Release(root).concepts, Release(root).metadata


def test_an_image_that_claims_another_size_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = encode(np.zeros((3000, 4000, 3), dtype="u1"), "webp")
    assert len(payload) < 100_000
    monkeypatch.setattr(ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(IntegrityError, match="it is 4000x3000"):
        decode(payload, "webp", 16, 8)


def test_a_full_merge_finds_what_no_program_can_show(generated: PlanRun) -> None:
    import hashlib

    import h5py

    paths, _ = generated()
    with h5py.File(paths.shard(2), "r+") as file:
        start, stop = file["offsets"][3:5].tolist()
        junk = np.full(stop - start, 7, dtype="u1")
        file["blob"][start:stop] = junk
        file["rows/sha256"][3] = np.frombuffer(hashlib.sha256(junk.tobytes()).digest(), "u1")
        name = f"{file['rows/synset'].asstr()[3]} {file['rows/number'][3]}"
    quick = merge([paths], ReleasePaths(paths.root / "quick"))
    assert verify(quick.paths.root, quick=True) == []
    assert verify(quick.paths.root)[0].startswith(f"images-00000.h5: {name}: expected a webp image")
    with pytest.raises(IntegrityError) as error:
        merge([paths], ReleasePaths(paths.root / "full"), MergeOptions(decode=True))
    assert f"{paths.shard(2)}: {name}: expected a webp image" in str(error.value)
    assert f"rm {paths.shard(2)} && sdwn submit" in str(error.value)


def test_a_folder_in_the_place_of_derived_files_is_known_by_what_it_is(
    release: Release, tmp_path: Path
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    (root / "evaluations").mkdir()
    assert verify(root, quick=True) == []
    (root / "evaluations").rmdir()
    (root / "evaluations").write_text("mine")
    (root / ".hidden").write_text("x")
    assert verify(root, quick=True) == [
        ".hidden: not part of the release",
        "evaluations: not part of the release",
    ]


def seal(root: Path) -> None:
    """Make the manifest and the checksums fit whatever the files hold."""
    manifest = json.loads((root / "manifest.json").read_text())
    for file in manifest["files"]:
        file["bytes"] = (root / file["file"]).stat().st_size
        file["sha256"] = file_sha256(root / file["file"])
    (root / "manifest.json").write_text(json.dumps(manifest))
    digests = {file["file"]: file["sha256"] for file in manifest["files"]}
    digests["manifest.json"] = file_sha256(root / "manifest.json")
    lines = (f"{digest}  {name}\n" for name, digest in digests.items())
    (root / "SHA256SUMS").write_text("".join(lines))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *[("offset", value) for value in (0, 2**63, 1.5, None)],
        *[("bytes", value) for value in (0, 2**32 - 1)],
        *[("part", value) for value in ("images-00001.h5", "../../x", None)],
        *[("codec", "exe"), ("width", 2**31 - 1), ("sha256", "0" * 64)],
    ],
    ids=str,
)
def test_a_table_that_lies_is_found_though_its_checksum_fits(
    release: Release, tmp_path: Path, column: str, value: Any
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    table = pq.read_table(root / "metadata.parquet")
    values = [value if i == 4 else one for i, one in enumerate(table[column].to_pylist())]
    try:
        changed = pa.array(values, table[column].type if column != "part" else pa.string())
    except (pa.ArrowException, OverflowError, TypeError):
        changed = pa.array([value] * len(values))
    changed = changed.dictionary_encode() if column == "part" else changed
    table = table.set_column(table.column_names.index(column), column, changed)
    pq.write_table(table, root / "metadata.parquet")
    seal(root)
    (problem, *_) = verify(root)
    assert problem.startswith(("metadata.parquet: ", "images-00000.h5: "))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": 3}, "manifest.json: images: expected 117, found 3"),
        ({"concepts": 3}, "manifest.json: concepts: expected 39, found 3"),
        ({"statuses": {"ok": 5}}, "manifest.json: statuses: expected {'ok': 117}"),
        ({"truncated": 9}, "manifest.json: truncated: expected 0, found 9"),
    ],
)
def test_a_manifest_that_counts_wrongly_is_found(
    release: Release, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, **change}))
    seal(root)
    assert any(problem.startswith(expected) for problem in verify(root, quick=True))
    assert len(Release(root)) == len(release), "what can be looked at is what is there"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000,
        '{"format": "sdwn-release", "format_version": 1, "images": 9999999999999999999999}',
        "",
    ],
    ids=["deep", "huge", "empty"],
)
def test_a_manifest_of_any_bytes_is_refused(release: Release, tmp_path: Path, text: str) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    (root / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json: "):
        verify(root)


@pytest.mark.parametrize("name", ["SHA256SUMS", "metadata.parquet", "images-00000.h5", "README.md"])
def test_pipes_and_long_names_stop_no_check(release: Release, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    (root / name).unlink()
    os.mkfifo(root / name)
    assert any(name in problem for problem in verify(root))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"].append({"file": "x" * 5000, "bytes": 1, "sha256": ""})
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert any("xxx" in problem for problem in verify(root))
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")
    with pytest.raises(SdwnError, match="no release here"):
        Release(root)


def test_rows_are_taken_in_the_order_asked_for(release: Release) -> None:
    chosen = release.subset(rows=[5, -1, 3, 5])
    assert [chosen.row(i) for i in range(4)] == [release.row(i) for i in (5, -1, 3, 5)]
    assert len(release.subset(rows=[])) == len(release.subset(status=[])) == 0
    with pytest.raises(IndexError):
        release.subset(rows=[len(release)])
    for wrong in ([1.5], ["a"], [True, False]):
        with pytest.raises(IndexError):
            release.subset(rows=wrong)


def test_a_release_is_read_from_wherever_one_goes(
    release: Release, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(release.paths.root.parent)
    relative = Release(release.paths.root.name)
    monkeypatch.chdir(tmp_path)
    assert relative.subset(rows=[1]).image(0).tobytes() == release.image(1).tobytes()


def test_concepts_without_a_column_are_named_though_their_checksum_fits(
    release: Release, tmp_path: Path
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    path = root / "concepts.parquet"
    pq.write_table(pq.read_table(path).drop_columns("label"), path)
    seal(root)
    fault = "concepts.parquet: damaged: expected the columns of a plan's concepts"
    with pytest.raises(IntegrityError, match=fault):
        _ = Release(root).concepts
    assert any(fault in problem for problem in verify(root, quick=True))


@pytest.mark.parametrize("name", ["../outside.parquet", "", "concepts.parquet/x"])
def test_the_concepts_of_a_plan_lie_in_the_release(
    release: Release, tmp_path: Path, name: str
) -> None:
    root = shutil.copytree(release.paths.root, tmp_path / "copy")
    shutil.copy(root / "concepts.parquet", tmp_path / "outside.parquet")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["plans"][0]["concepts"] = name
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="is no file of the release"):
        _ = Release(root).concepts


def test_a_release_gives_back_its_plan(made: tuple[Release, Plan], release: Release) -> None:
    plan = release.plan(made[1].digest)
    assert list(plan.concepts) == list(made[1].concepts)
    assert plan.shards == made[1].shards
    # Recomputed from what the release holds.
    assert dataclasses.replace(plan, recorded_digest=None).digest == made[1].digest
    with pytest.raises(IntegrityError, match="lists no plan"):
        release.plan("0" * 64)
