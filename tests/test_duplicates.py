"""Duplicates: exact, near and of a reference, found where they were planted and nowhere else."""

from __future__ import annotations

import colorsys
import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from sdwn.errors import UsageError
from sdwn.exchange.import_images import ImportOptions, import_images, list_source
from sdwn.measures import duplicates
from sdwn.measures.duplicates import find_duplicates
from sdwn.measures.record import all_records
from sdwn.paths import ReleasePaths
from sdwn.prediction.table import open_features
from sdwn.releases.release import Release
from sdwn.reports.report import write_duplicates_page
from sdwn.wordnet.corpus import WordNet
from tools.miniature.backgrounds import SETTINGS, background

from drawn import draw_features, evaluate, evaluation, noise_release, predictions

# The side of a drawing, in pixels.
SIDE = 192
ZEBRA, CORGI = "n02391049", "n02113023"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    folder = tmp_path_factory.mktemp("duplicates")
    return noise_release(folder, wordnet, [CORGI, ZEBRA], images_per_synset=6)


def unlike(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw vectors of length 1 at right angles, and perceptual hashes that are far apart."""
    random = np.random.default_rng(0)
    vectors = np.linalg.qr(random.normal(size=(40, 40)))[0][:images]
    return vectors, random.integers(0, 2**64, images, np.uint64)


def turned(vector: np.ndarray, other: np.ndarray, similarity: float) -> np.ndarray:
    """Turn a vector towards another until it is so similar to itself."""
    return similarity * vector + (1 - similarity**2) ** 0.5 * other


# Enough where few bits of the hashes differ, and else not.
ALIKE = 0.9


@pytest.fixture
def copied(release: Release) -> Release:
    """Twelve images with copies among them."""
    vectors, phash = unlike(14)
    pixels = np.arange(12)
    # 0, 3 and 7 have the same pixels; 8 is one of them made smaller; 4 is 1, cropped.
    pixels[[3, 7]], vectors[[3, 7]], phash[[3, 7]] = 0, vectors[0], phash[0]
    vectors[8], phash[8] = turned(vectors[0], vectors[12], ALIKE), phash[0] ^ np.uint64(0b11)
    vectors[4] = turned(vectors[1], vectors[12], 0.999)
    # 11 is as similar to 10, but of another hash; 6 has the hash of 5 alone.
    vectors[11], phash[6] = turned(vectors[10], vectors[13], ALIKE), phash[5]
    draw_features(release, vectors[:12], pixels_hash=pixels, phash=phash[:12])
    return release


def test_pairs_make_groups_and_of_each_the_first_is_kept(copied: Release) -> None:
    found = find_duplicates(copied)
    scores = pq.read_table(found.paths.scores)
    _ = None
    assert scores["duplicate_group"].to_pylist() == [0, 1, _, 0, 1, _, _, 0, 0, _, _, _]
    assert np.flatnonzero(scores["duplicate_of_better"]).tolist() == [3, 4, 7, 8]
    assert "nearest_reference" not in scores.column_names
    record = all_records(copied)["duplicates", "drawn"]
    figures = {name: figure["value"] for name, figure in record["figures"].items()}
    assert figures == {"exact_duplicates": 2, "near_duplicates": 2}
    with found.paths.table("pairs").open() as file:
        rows = [(row["kind"], row["number"], row["other_number"]) for row in csv.DictReader(file)]
    assert rows == [
        ("exact", "0", "3"),
        ("exact", "0", "1"),
        ("near", "1", "4"),
        ("near", "0", "2"),
    ]


def test_a_copy_of_the_same_hash_is_found_among_many_that_are_more_similar(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "NEIGHBOURS", 3)
    vectors, phash = unlike(14)
    # 4 is 0, compressed until its features are as similar to those of 1, 2 and 3.
    vectors[:4] = [turned(vectors[12], vectors[index], ALIKE) for index in range(4)]
    vectors[4], phash[4] = vectors[12], phash[0]
    vectors[0] = turned(vectors[12], vectors[13], 0.7)
    draw_features(release, vectors[:12], phash=phash[:12])
    pairs = find_duplicates(release).pairs.select(["row", "other", "bits"]).to_pylist()
    assert pairs == [{"row": 0, "other": 4, "bits": 0}]


def test_the_image_that_is_classified_best_is_kept(copied: Release) -> None:
    table = predictions(copied, every=True)
    best = np.zeros(12)
    best[[7, 4]] = 0.9
    columns = {"label_probability": best, "label_rank": np.where(best > 0, 0, 40)}
    for name, values in columns.items():
        column = pa.array(values, table.schema.field(name).type)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    evaluated = evaluation(copied, table)
    found = find_duplicates(copied)
    scores = pq.read_table(found.paths.scores)
    assert np.flatnonzero(scores["duplicate_of_better"]).tolist() == [0, 1, 3, 8]
    assert set(found.pairs["row"].to_pylist()) == {4, 7}
    shutil.rmtree(evaluated.root)


def test_copies_of_reference_images_are_found(
    copied: Release, wordnet: WordNet, tmp_path: Path
) -> None:
    reference = noise_release(tmp_path, wordnet, [CORGI], images_per_synset=4)
    ours, (vectors, phash) = open_features(copied), unlike(24)
    vectors, phash, pixels = vectors[20:], phash[20:], np.arange(100, 104)
    # 1 has the pixels of 9, and so has 3; 2 is 5, recompressed.
    vectors[[1, 3]], phash[[1, 3]] = ours.vectors[9], ours.table["phash"][9].as_py()
    pixels[[1, 3]] = ours.table["pixels_hash"][9].as_py()
    vectors[2], phash[2] = ours.vectors[5], ours.table["phash"][5].as_py() ^ 1
    draw_features(reference, vectors, pixels_hash=pixels, phash=phash)
    found = find_duplicates(copied, reference)
    beside = found.pairs.filter(pc.ends_with(found.pairs["kind"], "reference"))
    pairs = beside.select(["kind", "row", "bits"]).to_pydict()
    # 6 has the hash of 5, but other features.
    assert pairs == {"kind": ["exact reference", "near reference"], "row": [9, 5], "bits": [0, 1]}
    assert found.content["figures"]["near_reference"]["value"] == 2
    nearest = pq.read_table(found.paths.scores)["nearest_reference"].to_pylist()
    assert nearest[9] == pytest.approx(1, abs=1e-3)
    assert max(nearest[:5]) < 0.5
    write_duplicates_page(copied, reference, found)
    page = found.paths.page.read_text()
    assert "4 of 12 images repeat another one" in page
    assert f"2 of 12 repeat, or nearly, one of the 4 images of {reference.paths.name}" in page
    assert "similarity 1.000, 1 of 64 bits differ" in page
    # Of a group of equal pixels one pair, two near ones, two with the reference.
    assert page.count('<img src="data:image/webp;base64,') == 2 * (1 + 2 + 2)


def test_black_images_are_no_duplicates_of_each_other(tmp_path: Path) -> None:
    for name, colour in {"a": "black", "b": "black", "c": "red", "d": "red"}.items():
        path = tmp_path / "pictures" / "cat" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(path)
    paths = ReleasePaths(tmp_path / "release")
    source = list_source(tmp_path / "pictures")
    release = import_images(source, paths, ImportOptions("imagefolder")).release
    draw_features(release, np.ones((4, 3)), pixels_hash=[0, 0, 1, 1], phash=[0] * 4)
    found = find_duplicates(release)
    assert found.content["black_left_out"] == 2
    assert found.content["figures"]["exact_duplicates"] == {
        "value": 1,
        "low": None,
        "high": None,
        "images": 2,
        "reference_images": None,
    }
    extra = pq.read_table(found.paths.scores)["duplicate_of_better"].to_pylist()
    assert extra == [None, None, False, True]
    black = release.subset(status="black")
    with pytest.raises(UsageError, match="all images are black"):
        find_duplicates(black)


def test_a_release_of_equal_images_has_a_pair_for_each_copy(release: Release) -> None:
    draw_features(release, np.ones((12, 3)), pixels_hash=[7] * 12, phash=[0] * 12)
    found = find_duplicates(release)
    assert found.pairs["row"].to_pylist() == [0] * 11
    assert found.content["groups_found"] == 1
    one = find_duplicates(release.subset(rows=[5]))
    assert len(one.pairs) == one.content["groups_found"] == 0


def drawing(prompt: int, number: int) -> Image.Image:
    """Draw shapes on a background: of one prompt alike in colour, kind and setting."""
    own, random = np.random.default_rng([prompt, 1]), np.random.default_rng([prompt, number, 2])
    setting, shape = own.choice(list(SETTINGS)), own.choice(["ellipse", "rectangle", "polygon"])
    hue, count = own.random(), int(own.integers(2, 9))
    image = Image.fromarray(background(str(setting), random)).resize((SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        shade = hue + 0.04 * random.normal(), *random.uniform(0.4, 1, 2)
        colour = tuple(int(255 * value) for value in colorsys.hsv_to_rgb(*shade))
        left, top, width, height = random.integers(8, SIDE // 2, 4).tolist()
        box = [left, top, left + width, top + height]
        points = random.integers(0, SIDE, 8).tolist() if shape == "polygon" else box
        getattr(draw, str(shape))(points, fill=colour)
    grain = random.normal(0, 4, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def near_copy(image: Image.Image, kind: int, random: np.random.Generator) -> Image.Image:
    """Recompress, resize or crop an image."""
    if kind < 2:
        buffer = io.BytesIO()
        image.save(buffer, ("JPEG", "WEBP")[kind], quality=int(random.integers(60, 96)))
        return Image.open(buffer).convert("RGB")
    if kind == 2:
        side = int(random.uniform(0.5, 1.5) * SIDE)
        return image.resize((side, side), Image.Resampling.BICUBIC)
    side = int(random.uniform(0.94, 0.98) * SIDE)
    left, top = random.integers(0, SIDE - side + 1, 2).tolist()
    return image.crop((left, top, left + side, top + side))


@pytest.mark.parametrize(
    ("images", "copies"), [(20, 4), pytest.param(10_000, 50, marks=pytest.mark.long)]
)
def test_planted_copies_are_found_and_little_else(tmp_path: Path, images: int, copies: int) -> None:
    random = np.random.default_rng(0)
    chosen = random.choice(images, 2 * copies, replace=False).tolist()
    planted = set()
    for index in range(images):
        folder = tmp_path / "pictures" / f"prompt{index // 10:04}"
        folder.mkdir(parents=True, exist_ok=True)
        image = drawing(*divmod(index, 10))
        image.save(folder / f"{index % 10}.png")
        if index in chosen:
            # Of one exact and one near copy each the other half.
            which = chosen.index(index)
            copy = image if which < copies else near_copy(image, which % 4, random)
            (folder.parent / "copies").mkdir(exist_ok=True)
            copy.save(folder.parent / "copies" / f"{which:03}.png")
            planted.add(frozenset({(folder.name, index % 10), ("copies", which)}))
    paths = ReleasePaths(tmp_path / "release")
    source = list_source(tmp_path / "pictures")
    release = import_images(source, paths, ImportOptions("imagefolder")).release
    evaluate(release, "efficientnet-lite0")
    pairs = find_duplicates(release).pairs.to_pylist()
    found = {
        frozenset({(pair["id"], pair["number"]), (pair["other_id"], pair["other_number"])})
        for pair in pairs
    }
    assert len(found & planted) >= 0.98 * len(planted)
    assert len(found & planted) >= 0.98 * len(found)
