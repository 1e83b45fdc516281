"""Tables for LaTeX, references, figures as PDF and grids of images, for a paper."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sdwn.measures.record import write_record
from sdwn.releases.release import Release
from sdwn.reports.figures import latex_table, references
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet

from conftest import Sdwn
from drawn import draw_features, evaluation, noise_release, predictions

WNIDS = ["n02391049", "n02510455", "n04398044"]
NAMES = [
    *("wordnet", "imagenet", "diffusers", "timm", "paper", "efficientnet-lite0", "dinov2"),
    *("CompVis/stable-diffusion-v1-4", "stabilityai/stable-diffusion-xl-base-1.0"),
    *("stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-3.5-medium"),
    *("black-forest-labs/FLUX.1-schnell", "PixArt-alpha/PixArt-XL-2-512x512"),
    *("Efficient-Large-Model/Sana_600M_512px_diffusers", "Qwen/Qwen-Image"),
    *("Tongyi-MAI/Z-Image-Turbo", "clip:openai/clip-vit-base-patch32", "clip_score"),
    *("frechet_distance", "kernel_distance", "cmmd", "coverage", "vendi", "transfer_accuracy"),
]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, wordnet: WordNet) -> Release:
    found = noise_release(tmp_path_factory.mktemp("paper"), wordnet, WNIDS, images_per_synset=4)
    evaluation(found, predictions(found, lambda _: 0.5))
    return found


def keys(bibtex: str) -> list[str]:
    return re.findall(r"^@\w+\{(.+),$", bibtex, re.MULTILINE)


def test_a_report_brings_tables_references_and_figures_for_a_paper(release: Release) -> None:
    features = draw_features(release, np.eye(12))
    vendi = {"value": 9.51, "low": 9.0, "high": 9.9, "images": 12, "reference_images": None}
    write_record("measures", release, features, None, {"figures": {"vendi": vendi}})
    folder = write_report(release).parent
    figures = (folder / "figures.tex").read_text()
    assert r"correct images per class, mean, of 4 & " in figures
    assert r"top-1, \% & " in figures
    assert "Vendi score & 9.5 (9.0 to 9.9) & 12 & drawn" in (folder / "measures.tex").read_text()
    cited = keys((folder / "references.bib").read_text())
    assert {"sdwn", "stoeckl2022evaluating", "miller1995wordnet", "friedman2023vendi"} <= {*cited}
    assert "heusel2017gans" not in cited
    pdf = (folder / "figures" / "histogram.pdf").read_bytes()
    # Fonts are inside, as TrueType: Type 3 is refused by many a publisher.
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf


def test_each_reference_is_of_something_that_sdwn_can_use() -> None:
    assert len(cited := keys(references(NAMES))) == len({*cited})
    text = Path("sdwn/templates/paper/references.bib").read_text()
    assert sorted(keys(text)) == sorted(cited)
    assert keys(references(["CompVis/stable-diffusion-v1-4"])) == [
        "sdwn",
        "stoeckl2022evaluating",
        "rombach2022high",
    ]


@given(st.text(st.sampled_from("ab &%$#_{}~^\\"), max_size=9))
def test_no_cell_of_a_table_is_read_as_a_command_or_another_column(text: str) -> None:
    row = latex_table(["a", "b"], [[text, "1"]]).splitlines()[5]
    printed = r"\\text(asciitilde|asciicircum|backslash)\{\}|\\[&%$#_{}]"
    plain = re.sub(printed, "", row)
    assert re.fullmatch(r"[ab ]* & 1 \\\\", plain)


def test_a_grid_has_the_concepts_or_the_best_and_worst_images(
    release: Release, tmp_path: Path, sdwn: Sdwn
) -> None:
    grid = tmp_path / "grid.png"
    found = sdwn.json("show", release.paths.root, "zebra", "teapot", "--save", grid)
    assert found == {"path": str(grid), "images": 8}
    # Two rows of four squares.
    width, height = Image.open(grid).size
    assert 0.5 < height / width < 0.6
    for which in ("--best", "--worst"):
        path = tmp_path / f"{which}.pdf"
        assert sdwn.json("show", release.paths.root, which, 2, "--save", path)["images"] == 2
        assert path.read_bytes().startswith(b"%PDF")
    assert (tmp_path / "--best.pdf").read_bytes() != (tmp_path / "--worst.pdf").read_bytes()
    assert "with --save" in sdwn("show", release.paths.root, "--best", 2, code=2).stderr


def test_a_comparison_brings_a_row_a_side(release: Release, tmp_path: Path, sdwn: Sdwn) -> None:
    other = evaluation(release, predictions(release, lambda _: 0.9), "other", model="other")
    first = release.paths.evaluation("drawn").root
    sdwn("compare", f"one={first}", f"two_2={other.root}", "--out", tmp_path / "C")
    table = (tmp_path / "C/figures.tex").read_text().splitlines()
    assert [line.split(" & ")[0] for line in table[5:7]] == ["one", r"two\_2"]
    assert "rombach2022high" not in (tmp_path / "C/references.bib").read_text()
