"""Features: of timm's and transformers' own values, resumed, read by key, carried along."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sdwn.errors import IntegrityError, OutOfMemoryError, SdwnError, UsageError
from sdwn.evaluation.verify import verify
from sdwn.exchange.export import ExportOptions, export
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.jobs.task import read_record
from sdwn.paths import ReleasePaths, RunPaths
from sdwn.prediction import plan as image_plan
from sdwn.prediction.plan import FeaturePlan, open_feature_plan
from sdwn.prediction.pretrained import encoder_file, load_encoder
from sdwn.prediction.table import Features, FeatureTable, open_features, vectors_of, with_vectors
from sdwn.prediction.task import predict
from sdwn.releases.merge import merge
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

from conftest import PlanRun, Sdwn, Testbed, profile_for_testbed, wait_until, workers
from drawn import draw_features, evaluate, noise_release
from small_clip import CAPTIONS, drawings
from test_extend import grow

# Of 30 images in shards of four.
SHARD, LITE = 4, "efficientnet-lite0"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_plan, "IMAGES_PER_SHARD", SHARD)


@pytest.fixture(scope="session")
def drawn_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of drawings of six classes, five each, with their captions as prompts."""
    folder = tmp_path_factory.mktemp("drawn")
    wnids = list(CAPTIONS)[:6]
    for wnid in wnids:
        (folder / "images" / wnid).mkdir(parents=True)
        text = f"prompt: {CAPTIONS[wnid]}\nwnid: {wnid}\n"
        (folder / "images" / wnid / f"{wnid}.txt").write_text(text)
    for seed in range(5):
        for wnid, image in zip(wnids, drawings(wnids, seed), strict=True):
            image.save(folder / "images" / wnid / f"{wnid}_{seed}.png")
    images, target = list_source(folder / "images"), ReleasePaths(folder / "release")
    import_images(images, target, ImportOptions("folders"))
    return folder / "release"


@pytest.fixture
def release(drawn_source: Path, tmp_path: Path) -> Release:
    return Release(shutil.copytree(drawn_source, tmp_path / "release"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of timm's smallest ViT, as its ``save_for_hf`` writes it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    network = timm.create_model("test_vit", num_classes=7)
    timm.models.save_for_hf(network, folder, model_args={}, safe_serialization=True)
    return folder


def near(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare what is kept in half precision, of a batch, with what one image alone gives."""
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-10, atol=2e-4)


# What is kept


def test_features_are_those_of_timms_own_model_and_transform(release: Release, tiny: Path) -> None:
    model = f"local-dir:{tiny}"
    found = evaluate(release, model)
    network = timm.create_model(model, pretrained=True, num_classes=0).eval()
    settings = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**settings, is_training=False)
    images = [release.image(index) for index in range(len(release))]
    with torch.inference_mode():
        expected = network(torch.stack([transform(image) for image in images])).numpy()
    features = open_features(release)
    near(features.vectors, expected)
    assert (found["features"], found["dimensions"]) == (features.name, expected.shape[1])
    assert features.encoder["checkpoint"] == "model.safetensors"
    hashes = [int(str(imagehash.phash(image)), 16) for image in images]
    assert features.table["phash"].to_pylist() == hashes
    assert features.table["clip_score"].null_count == len(release)


def test_equal_pixels_have_one_hash_and_others_another(tiny: Path) -> None:
    encoder = load_encoder(f"local-dir:{tiny}")
    one, other = (Image.fromarray(np.full((8, 4, 3), value, np.uint8)) for value in (7, 8))
    turned = Image.fromarray(np.full((4, 8, 3), 7, np.uint8))
    hashes = [encoder.describe(image)["pixels_hash"] for image in (one, one.copy(), other, turned)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_a_clip_gives_transformers_embeddings_and_how_near_prompts_are(
    release: Release, small_clip: Path
) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    evaluate(release, f"clip:{small_clip}")
    features = open_features(release)
    model = CLIPModel.from_pretrained(small_clip).eval()
    images = [release.image(index) for index in range(len(release))]
    words = AutoTokenizer.from_pretrained(small_clip)
    prompts = release.metadata["prompt"].to_pylist()
    with torch.inference_mode():
        pixels = CLIPImageProcessor.from_pretrained(small_clip)(images, return_tensors="pt")
        seen = model.get_image_features(**pixels)
        read = model.get_text_features(**words(prompts, padding=True, return_tensors="pt"))
        seen, read = (getattr(one, "pooler_output", one) for one in (seen, read))
    near(features.vectors, seen.numpy())
    scores = np.array(features.table["clip_score"].to_pylist())
    cosines = 100 * torch.cosine_similarity(seen, read).clamp(min=0).numpy()
    np.testing.assert_allclose(scores, cosines, atol=1e-2)
    permuted = 100 * torch.cosine_similarity(seen, read.roll(5, 0)).clamp(min=0).numpy()
    assert scores.mean() > permuted.mean() + 10


def test_prompts_that_find_no_room_are_one_line(small_clip: Path) -> None:
    clip = load_encoder(f"clip:{small_clip}").network
    prompts = [f"{number} " + 80 * "dog " for number in range(500)]
    before = resource.getrlimit(resource.RLIMIT_AS)
    sizes = re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())
    assert sizes is not None
    # A layer of the text tower takes 40 MB.
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(sizes[1]) + 20_000_000, before[1]))
    try:
        with pytest.raises(OutOfMemoryError, match=r"^out of memory: .*allocate memory"):
            clip.encode_prompts(prompts)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_folder_is_named_by_the_model_and_weights_of_ones_own(tmp_path: Path) -> None:
    names = {
        ("dinov2", None): "dinov2",
        ("clip:openai/clip-vit-base-patch32", None): "clip-openai-clip-vit-base-patch32",
        ("clip:/data/my clip", "0123456789"): "clip-my-clip-01234567",
        ("local-dir:/data/tiny", "0123456789"): "tiny-01234567",
    }
    for (model, digest), name in names.items():
        plan = FeaturePlan(
            release="r", checkpoint_sha256=digest, images=1, images_per_shard=1, model=model
        )
        assert plan.name == name


# Resumed


def test_finished_shards_are_kept_and_damaged_ones_named(release: Release, tiny: Path) -> None:
    model = f"local-dir:{tiny}"
    work, _ = open_feature_plan(release, model)
    predict(work.root, [0, 1, 3])
    kept = FeatureTable.read(work.shard(0), 99)
    marked = np.full_like(vectors_of(kept.table), 7)
    table = with_vectors(kept.table.drop_columns(["vector"]), marked)
    FeatureTable(table, kept.release, kept.plan, kept.network, kept.made_on).write(work.shard(0))
    work.shard(3).write_bytes(work.shard(3).read_bytes()[:-30])
    with pytest.raises(IntegrityError, match=r"3\.parquet: damaged.*: rm .*03\.parquet &&"):
        evaluate(release, model)
    work.shard(3).unlink()
    evaluate(release, model)
    vectors = open_features(release).vectors
    assert (vectors[:SHARD] == 7).all(), "what was there is kept"
    assert not (vectors[SHARD:] == 7).any()
    assert not work.root.exists(), "nothing is left of the work"


@pytest.mark.process
def test_the_command_resumes_after_a_kill(release: Release, tiny: Path) -> None:
    work, plan = open_feature_plan(release, f"local-dir:{tiny}")
    code = """
import os, signal, sys
from sdwn.evaluation.evaluate import make_results, open_image_plan
from sdwn.releases.release import Release
left = 3 * 4
def advance(images):
    global left
    left -= images
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
release = Release(sys.argv[1])
make_results(release, *open_image_plan(release, sys.argv[2]), advance)
"""
    words = [sys.executable, "-c", code, str(release.paths.root), plan.model]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert work.done_shards() == {0, 1}
    before = work.shard(1).stat().st_mtime_ns
    predict(work.root, range(len(plan.shards)))
    assert work.shard(1).stat().st_mtime_ns == before
    assert evaluate(release, plan.model)["images"] == len(release)


def test_weights_that_changed_since_are_refused(
    release: Release, tiny: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tiny, tmp_path / "own")
    work, plan = open_feature_plan(release, f"local-dir:{own}")
    state = load_file(own / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in state.items()}, own / "model.safetensors")
    with pytest.raises(
        SdwnError, match=r"that this was planned for, found .*; restore it, or make"
    ):
        predict(work.root, [0])
    assert open_feature_plan(release, f"local-dir:{own}")[1].name != plan.name


# Read


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    folder = tmp_path_factory.mktemp("features")
    return noise_release(folder, wordnet, ["n02391049", "n02510455"], images_per_synset=3)


def test_features_come_in_the_order_of_the_images_that_are_chosen(noise: Release) -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 5))
    draw_features(noise, vectors, "test", clip_score=[20.5] + [None] * 5)
    found = open_features(noise)
    assert found.vectors.dtype == np.float16
    assert np.array_equal(found.vectors, vectors.astype(np.float16))
    assert found.table["clip_score"].to_pylist() == [20.5] + [None] * 5
    some = open_features(noise.subset(rows=[4, 1]))
    assert np.array_equal(some.vectors, vectors[[4, 1]].astype(np.float16))
    assert some.table["number"].to_pylist() == [1, 1]


def test_features_that_are_missing_or_damaged_are_refused(
    noise: Release, wordnet: WordNet, tmp_path: Path
) -> None:
    draw_features(noise, np.ones((6, 5)), "test")
    with pytest.raises(SdwnError, match="not of other; make them with: sdwn features"):
        open_features(noise, "other")
    other = noise_release(tmp_path, wordnet, ["n02391049"], images_per_synset=2)
    with pytest.raises(SdwnError, match="has no features; make them with"):
        open_features(other)
    found = draw_features(other, np.ones((2, 3)))
    path = other.paths.features(found.name).features
    FeatureTable(found.table, other.digest, "", found.encoder, ()).write(path)
    with pytest.raises(IntegrityError, match="no table of features; make the features again"):
        open_features(other)


# Into other releases


def encoded_anew(release: Release, model: str) -> tuple[Features, int]:
    """Encode a release by a task; return its features, and how many images that encoded."""
    work, plan = open_feature_plan(release, model)
    predict(work.root, range(len(plan.shards)))
    count = read_record(work.task("none", 0)).done
    evaluate(release, model)
    return open_features(release), count


def test_a_smaller_release_encodes_nothing_again(
    release: Release, tiny: Path, tmp_path: Path
) -> None:
    model = f"local-dir:{tiny}"
    evaluate(release, model)
    chosen = release.subset(rows=[17, 3, 4, 29])
    export(chosen, tmp_path / "part", ExportOptions("release"))
    part = Release(tmp_path / "part")
    found, count = encoded_anew(part, model)
    assert count == 0
    assert np.array_equal(found.vectors, open_features(release.subset(rows=[17, 3, 4, 29])).vectors)
    assert not part.paths.features(found.name).earlier.exists()
    assert verify(part.paths.root) == []


def test_a_grown_release_encodes_only_what_is_new(
    generated: PlanRun, tiny: Path, tmp_path: Path
) -> None:
    paths, _ = generated("small", catalog={"roots": ["corgi.n.01"]}, images_per_synset=2)
    model, small = f"local-dir:{tiny}", merge([paths], ReleasePaths(tmp_path / "first"))
    evaluate(small, model)
    grown = grow(small, tmp_path / "grown", "images_per_synset=3")
    found, count = encoded_anew(grown, model)
    assert count == len(grown) - len(small)
    shutil.rmtree(grown.paths.evaluations)
    evaluate(grown, model)
    near(found.vectors, open_features(grown).vectors.astype(np.float32))


def test_verify_names_features_that_are_damaged_or_of_other_images(
    release: Release, tiny: Path
) -> None:
    evaluate(release, f"local-dir:{tiny}")
    assert verify(release.paths.root, quick=True) == []
    (name,) = [path.name for path in release.paths.evaluations.glob("features/*")]
    path = release.paths.features(name).features
    found = FeatureTable.read(path, 99)
    other = found.table.take(pa.array([1, 0, *range(2, len(release))]))
    FeatureTable(other, found.release, found.plan, found.network, ()).write(path)
    (problem,) = verify(release.paths.root, quick=True)
    assert problem.startswith(f"evaluations/features/{name}/features.parquet: number: of other")
    path.write_bytes(path.read_bytes()[:-9])
    (problem,) = verify(release.paths.root, quick=True)
    assert problem.startswith(f"evaluations/features/{name}/features.parquet: damaged: ")


# What is refused


def test_what_is_no_encoder_is_refused_at_once(release: Release, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    wrong = {
        "dinov": "did you mean dinov2",
        f"clip:{tmp_path / 'none'}": r"expected clip:FOLDER, or clip:ORG/NAME on the hub",
        f"clip:{tmp_path / 'bert'}": "expected a CLIPModel of transformers",
    }
    for model, message in wrong.items():
        with pytest.raises(UsageError, match=message):
            evaluate(release, model)
    assert not release.paths.evaluations.exists()


def test_without_the_network_the_command_to_fetch_an_encoder_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: Any, local_files_only: bool = False, **__: Any) -> str:
        raise FileNotFoundError if local_files_only else OSError("no network")

    monkeypatch.setattr("sdwn.prediction.pretrained.snapshot_download", offline)
    assert encoder_file("clip:lab/clip") is None
    with pytest.raises(SdwnError, match="prefetch CONFIG --features clip:lab/clip; or take one"):
        load_encoder("clip:lab/clip")


# The command


def test_the_command_says_what_there_is_and_what_is_next(
    sdwn: Sdwn, release: Release, tiny: Path
) -> None:
    words = ("features", release.paths.root, "--model", f"local-dir:{tiny}")
    done = sdwn(*words)
    (name,) = [path.name for path in release.paths.evaluations.glob("features/*")]
    assert "30, 64 numbers each" in done.stdout
    assert done.stdout.endswith(f"next: sdwn measure {release.paths.root} --features {name}\n")
    assert "need --profile" in sdwn(*words, "--wait", code=2).stderr


@pytest.mark.process
def test_two_tasks_of_this_machine_encode_and_status_follows_them(
    sdwn: Sdwn, release: Release, tiny: Path
) -> None:
    words = ("features", release.paths.root, "--model", f"local-dir:{tiny}", "--profile", "local")
    found = sdwn.json(*words, "--shards-per-task", "4")
    work = RunPaths(Path(found["work"]))
    assert (found["submitted"], found["shards"]) == (2, 8)
    assert found["features"] == work.root.parent.name
    done = sdwn.json(*words, "--wait")
    assert done["images"] == 30
    status = sdwn.json("status", work.root)
    assert (status["shards_done"], status["images_done"]) == (8, 30)
    assert not work.shards.exists()


@pytest.mark.slurm
def test_an_array_encodes_and_the_job_behind_it_merges(
    sdwn: Sdwn, release: Release, tiny: Path, cluster: Testbed, tmp_path: Path
) -> None:
    site = profile_for_testbed(tmp_path, "stages: {evaluate: {shards_per_task: 4}}")
    words = ("features", release.paths.root, "--model", f"local-dir:{tiny}", "--profile", site)
    first = sdwn.json(*words)
    work = RunPaths(Path(first["work"]))
    wait_until(lambda: workers(work))
    os.kill(workers(work)[0], signal.SIGKILL)
    wait_until(lambda: not cluster.run("squeue", "--noheader"))
    assert sdwn.json(*words, "--wait")["images"] == 30
    assert len(open_features(release).vectors) == 30
    assert sdwn.json("status", work.root)["shards_done"] == 8
