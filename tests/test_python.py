"""A release in Python: the examples of its page, and what a notebook shows."""

from __future__ import annotations

import base64
import io
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdwn
from PIL import Image
from sdwn.errors import IntegrityError, SdwnError
from sdwn.releases.release import Release
from sdwn.wordnet.corpus import WordNet

import drawn
from conftest import REPOSITORY

ZEBRA, CRANE = "n02391049", "n02012849"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Path:
    """Two classes of ten images and a synset that is none, judged, with features."""
    wnids = (ZEBRA, CRANE)
    made = drawn.noise_release(tmp_path_factory.mktemp("run"), wordnet, wnids)
    drawn.evaluation(made, drawn.predictions(made))
    drawn.draw_features(made, np.arange(len(made) * 4).reshape(-1, 4))
    return made.paths.root


@pytest.fixture
def release(root: Path) -> Any:
    return sdwn.Release(root)


def test_the_examples_of_the_page_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, in one session, as somebody would who reads the page."""
    (tmp_path / "RELEASE").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    pages = [REPOSITORY / "docs/releases.md", REPOSITORY / "docs/python.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), session)
    assert session["features"].vectors.shape == (20, 4)
    assert session["label"] in (340, 134)


def test_an_image_is_a_dict_of_its_picture_and_its_record(release: Any) -> None:
    one = release[3]
    row = release.row(3)
    assert next(iter(one)) == "image"
    assert np.array_equal(np.asarray(one["image"]), release.array(3))
    assert (one["prompt"], one["seed"], one["id"]) == (row["prompt"], row["seed"], row["id"])
    assert not {"part", "offset", "task_run"} & set(one)
    assert release[-1]["number"] == release.row(-1)["number"]
    assert release[np.int64(3)]["seed"] == one["seed"]
    with pytest.raises(IndexError, match="no image 20"):
        release[20]


def test_iteration_gives_each_image_once_in_order(release: Any) -> None:
    seeds = [one["seed"] for one in release]
    assert seeds == release.metadata["seed"].to_pylist()


def test_slices_masks_and_names_are_releases_again(release: Any) -> None:
    seeds = release.metadata["seed"].to_pylist()
    odd = np.arange(20) % 2 == 1
    for which, expected in (
        (slice(2, 5), seeds[2:5]),
        (slice(None, None, -1), seeds[::-1]),
        ([7, 2], [seeds[7], seeds[2]]),
        (odd, seeds[1::2]),
        ("zebra", [row["seed"] for row in release.rows("zebra")]),
        (slice(0, 0), []),
    ):
        chosen = release[which]
        assert type(chosen) is type(release)
        assert [one["seed"] for one in chosen] == expected
    nested = pickle.loads(pickle.dumps(release["zebra"]))[1:3]
    assert [one["seed"] for one in nested] == [row["seed"] for row in release.rows("zebra")][1:3]
    assert nested.subset(status="ok").sample(1.0)[0]["seed"] == nested[0]["seed"]


def test_what_was_computed_is_in_the_order_of_the_images(release: Any) -> None:
    chosen = release[[15, 3, 8]]
    whole = release.predictions()
    assert whole["sha256"] == release.metadata["sha256"]
    for table in (chosen.predictions("drawn"), chosen.scores(), chosen.features().table):
        assert table["number"].to_pylist() == chosen.metadata["number"].to_pylist()
        assert table["id"].to_pylist() == chosen.metadata["id"].to_pylist()
    assert chosen.features("drawn").vectors[:, 0].tolist() == [60, 12, 32]
    right = [rank == 0 for rank in chosen.predictions()["label_rank"].to_pylist()]
    assert chosen.scores()["correct"].to_pylist() == right
    with pytest.raises(SdwnError, match="no evaluation 'other'; there is drawn"):
        release.predictions("other")
    with pytest.raises(SdwnError, match="has features of drawn, not of other"):
        release.features("other")


def test_images_are_chosen_by_any_column(release: Any) -> None:
    right = [rank == 0 for rank in release.predictions()["label_rank"].to_pylist()]
    chosen = release.subset(where="correct AND number < 8", below="zebra.n.01")
    rows = [row for row, yes in zip(release.metadata.to_pylist(), right, strict=True) if yes]
    expected = [row["seed"] for row in rows if row["wnid"] == ZEBRA and row["number"] < 8]
    assert [one["seed"] for one in chosen] == expected
    assert type(chosen) is type(release)
    with pytest.raises(SdwnError, match="numbr"):
        release.subset(where="numbr < 8")


def sheet(shown: str) -> Image.Image:
    (source,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', shown)
    return Image.open(io.BytesIO(base64.b64decode(source)))


def test_a_notebook_shows_counts_and_images(release: Any) -> None:
    text = repr(release)
    assert text.startswith(f"<Release {release.paths.root}: 20 images of 2 synsets (20 ok)")
    assert "evaluation drawn; features drawn" in text
    shown = release._repr_html_()
    assert "20 images of 2 synsets" in shown
    assert sheet(shown).width > 1000
    few = release["zebra"][:2]
    assert "2 images of 1 synset (2 ok)" in repr(few)
    assert sheet(few._repr_html_()).width < sheet(shown).width
    assert "<img" not in release[:0]._repr_html_()


def test_a_damaged_image_is_named(release: Any, tmp_path: Path) -> None:
    copy = sdwn.Release(shutil.copytree(release.paths.root, tmp_path / "copy"))
    part = copy.paths.part(0)
    content = bytearray(part.read_bytes())
    content[copy.row(0)["offset"] + 5] ^= 1
    part.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged at byte"):
        copy[0]


def test_the_plain_release_gives_what_it_gave(root: Path) -> None:
    """The package's own code opens releases without all that, and they pickle as what they are."""
    plain = Release(root)
    assert type(pickle.loads(pickle.dumps(plain.subset(status="ok")))) is Release
