"""An image made again from its record, by the pipelines that made it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sdwn.errors import UsageError
from sdwn.generation.regenerate import regenerate
from sdwn.paths import ReleasePaths
from sdwn.releases.merge import merge
from sdwn.releases.release import Release

from conftest import FEW, PlanRun, Sdwn

TINY: dict[str, Any] = {
    "catalog": {"roots": ["corgi.n.01"]},
    "images_per_synset": 4,
    "model": {"name": "builtin:tiny"},
    "generation": {"height": 64, "width": 64, "num_inference_steps": 2, "batch_size": 2},
}


@pytest.fixture
def generated(generated: PlanRun) -> PlanRun:
    return partial(generated, catalog=FEW)


@pytest.fixture
def tiny(generated: PlanRun) -> Release:
    paths, _ = generated(**TINY)
    return merge([paths], ReleasePaths(paths.release))


def test_an_image_comes_out_the_same(tiny: Release) -> None:
    found, image = regenerate(tiny, "pembroke", 3)
    assert (found.verdict, found.rms, found.largest) == ("equal", 0.0, 0)
    assert (found.batch_size, found.place) == (2, 1)
    assert found.reasons == []
    assert image.tobytes() == tiny.image(tiny.rows("pembroke")[3]).tobytes()


def test_an_image_is_compared_as_its_codec_keeps_it(generated: PlanRun) -> None:
    for storage in ({"codec": "raw"}, {"codec": "jpeg", "quality": 80}):
        paths, _ = generated(str(storage["codec"]), storage={**storage, "images_per_shard": 10})
        release = merge([paths], ReleasePaths(paths.release))
        for index in (0, len(release) - 1):
            row = release.row(index)
            found, _ = regenerate(release, row["wnid"], row["number"])
            assert found.verdict == "equal", found


def test_another_model_is_told(tiny: Release, tmp_path: Path, sdwn: Sdwn) -> None:
    from diffusers import StableDiffusionPipeline
    from sdwn.models.builtin import builtin_folder

    other = StableDiffusionPipeline.from_pretrained(builtin_folder("tiny"))
    for weight in other.unet.parameters():
        weight.data.mul_(0.5)
    other.save_pretrained(tmp_path / "other")
    found = sdwn.json(
        *("regenerate", tiny.paths.root, "pembroke", 1),
        *("--model", tmp_path / "other", "--save", "new.png"),
        code=1,
    )
    assert found["verdict"] == "different"
    assert found["rms"] > found["tolerance"]
    assert any(reason.startswith("revision: ") for reason in found["reasons"])
    old = tiny.array(tiny.rows("pembroke")[1]).astype(float)
    new = np.asarray(Image.open(sdwn.folder / "new.png")).astype(float)
    assert abs(np.sqrt(np.mean((old - new) ** 2)) - found["rms"]) < 0.01
    close, _ = regenerate(tiny, "pembroke", 1, str(tmp_path / "other"), tolerance=255)
    assert close.verdict == "within tolerance"


def test_what_changed_since_is_named(tiny: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    monkeypatch.setattr(diffusers, "__version__", "99.0")
    found, _ = regenerate(tiny, "pembroke", 0)
    assert found.verdict == "equal"
    assert len(found.reasons) == 1
    assert found.reasons[0].startswith("diffusers: ")
    assert found.reasons[0].endswith(" then, 99.0 now")


def test_what_is_not_there_is_told(tiny: Release) -> None:
    with pytest.raises(UsageError, match=r"pembroke\.n\.01 has no image 4; it has 0 to 3"):
        regenerate(tiny, "pembroke", 4)
    with pytest.raises(UsageError, match="no id, label, synset or lemma here"):
        regenerate(tiny, "unicorn", 0)


def test_part_of_a_run_is_enough(generated: PlanRun) -> None:
    from sdwn.releases.merge import MergeOptions

    paths, _ = generated()
    paths.shard(0).unlink()
    release = merge([paths], ReleasePaths(paths.release), MergeOptions(allow_missing=True))
    for row in (release.row(0), release.row(len(release) - 1)):
        found, _ = regenerate(release, row["synset"], row["number"])
        assert found.verdict == "equal"
