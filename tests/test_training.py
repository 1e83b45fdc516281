"""Making the miniature, in its short form: a few steps on classes that are drawn in place."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from sdwn.config import CatalogConfig
from sdwn.errors import SdwnError
from sdwn.wordnet.corpus import class_index, open_wordnet, read_catalog
from tools.miniature.backgrounds import SETTINGS
from tools.miniature.loop import Schedule, fit
from tools.miniature.make import SHORT, chosen, make
from tools.miniature.pictograms import SVG, archive_path, pictogram
from tools.miniature.pictures import Pictures, is_drawn
from tools.miniature.surfaces import SURFACES
from tools.miniature.table import Subject, glosses, read_table
from tools.miniature.things import THINGS

from conftest import REPOSITORY

pytestmark = pytest.mark.model


def test_the_classes_are_of_imagenet_and_of_the_published_catalog() -> None:
    subjects = read_table()
    published = {one.wnid: one for one in read_catalog(_PUBLISHED, open_wordnet())}
    assert 60 <= len(subjects) <= 100
    assert len({subject.wnid for subject in subjects}) == len(subjects)
    for subject in subjects:
        assert published[subject.wnid].name == subject.synset
        assert subject.wnid in class_index()


def test_no_two_classes_have_one_prompt() -> None:
    prompts = glosses(read_table())
    assert len(set(prompts)) == len(prompts)


def test_the_table_names_each_drawing_and_each_setting() -> None:
    subjects = read_table()
    names = [name for subject in subjects for name in subject.pictures]
    drawn = {name.split(":")[1] for name in names if is_drawn(name)}
    assert drawn == set(THINGS) | set(SURFACES)
    assert {setting for subject in subjects for setting in subject.settings} == set(SETTINGS)


def test_pictures_differ_by_class_and_by_stream_and_are_the_same_again(tmp_path: Path) -> None:
    pictures = Pictures(chosen(SHORT), tmp_path)
    first, again, other = (pictures.draw(0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, pictures.draw(1, np.random.default_rng(1)))


def test_a_pictogram_comes_out_of_its_package_without_its_empty_edges(tmp_path: Path) -> None:
    dot = '<circle cx="16" cy="16" r="8" fill="red"/>'
    icons = json.dumps({"icons": {"dot": {"body": dot}}, "width": 32, "height": 32}).encode()
    with tarfile.open(archive_path(SVG["noto"], tmp_path), "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(icons)
        archive.addfile(member, io.BytesIO(icons))
    drawn = pictogram("noto:dot", tmp_path)
    assert drawn.size == (64, 64), "half of 128 pixels"
    assert drawn.getpixel((32, 32)) == (255, 0, 0, 255)
    assert drawn.getpixel((0, 0)) == (0, 0, 0, 0)
    with pytest.raises(SdwnError, match="noto:dit: no such pictogram"):
        pictogram("noto:dit", tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    done = subprocess.run(
        [sys.executable, "-m", "tools.miniature", folder, "--short", "--judged", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.process
def test_the_short_form_makes_a_pipeline_that_diffusers_loads(made: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        made / "pipeline", dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = glosses(chosen(SHORT))[0]
    pixels = pipeline(prompt, num_inference_steps=2, output_type="np").images
    assert pixels.shape == (1, 64, 64, 3)
    assert np.isfinite(pixels).all()


def test_the_training_pictures_and_the_drawn_ones_are_judged(made: Path) -> None:
    with (made / "recognised.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["wnid"] for row in rows] == [subject.wnid for subject in chosen(SHORT)]
    # The judge knows the drawings; what a few steps have taught is nothing yet.
    assert sum(int(row["training_pictures"]) for row in rows) >= 2


@pytest.mark.process
def test_what_is_trained_is_not_trained_again(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.glob("*.pt")}
    make(SHORT, Pictures(chosen(SHORT), made / "packages"), made)
    assert {path: path.stat().st_mtime_ns for path in made.glob("*.pt")} == before


def test_a_folder_is_kept_to_what_it_began_with(made: Path) -> None:
    pictures = Pictures(chosen(SHORT), made / "packages")
    with pytest.raises(SdwnError, match="another recipe or table of classes"):
        make(replace(SHORT, latents=1), pictures, made)
    with (made / "made_from.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SdwnError, match="another process trains there"):
            make(SHORT, pictures, made)


@pytest.mark.parametrize(
    ("pictures", "settings", "told"),
    [
        (("nota:guitar",), ("room",), "guitar.n.01: no such picture: nota:guitar"),
        (("drawn:nothing",), ("room",), "no such picture: drawn:nothing"),
        ((), ("room",), "expected pictures to draw it from, found none"),
        (("noto:guitar",), (), "expected a setting for it, found none"),
        (("noto:guitar",), ("room", "moon"), "no such setting: moon; valid: grass"),
    ],
)
def test_a_row_that_names_what_is_not_there_is_told_before_hours_go_into_it(
    tmp_path: Path, pictures: tuple[str, ...], settings: tuple[str, ...], told: str
) -> None:
    with pytest.raises(SdwnError, match=told):
        Pictures([Subject("n03467517", "guitar.n.01", pictures, settings)], tmp_path)


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    schedule = Schedule(steps=8, rate=0.1, rising=2, save_every=0.0)

    def trained(name: str, model: torch.nn.Linear, interrupted_at: int | None) -> torch.Tensor:
        def loss(step: int) -> torch.Tensor:
            if step == interrupted_at:
                raise KeyboardInterrupt
            return (model(torch.full((1, 2), float(step))) - 1).square().mean()

        return fit(model, loss, schedule, tmp_path / name)["weight"]

    def model(seed: int) -> torch.nn.Linear:
        torch.manual_seed(seed)
        return torch.nn.Linear(2, 1)

    with pytest.raises(KeyboardInterrupt):
        trained("interrupted.pt", model(0), 5)
    # Other weights to begin with: all that counts is what was saved.
    resumed = trained("interrupted.pt", model(1), None)
    assert torch.equal(resumed, trained("undisturbed.pt", model(0), None))


def test_the_weights_take_at_most_sixteen_megabytes(made: Path) -> None:
    weights = list(made.glob("pipeline/*/*.safetensors"))
    assert len(weights) == 3
    assert sum(path.stat().st_size for path in weights) <= 16_000_000
    index = made / "pipeline/model_index.json"
    assert {path.stat().st_mode for path in weights} == {index.stat().st_mode}, "as readable"


_PUBLISHED = CatalogConfig(name="sdwn-26204")
