"""What goes into a paper: tables for LaTeX, references, figures as PDF, grids of images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdwn.measures.record import write_record
from sdwn.releases.release import Release
from sdwn.reports.paper import (
    concept_images,
    grid_figure,
    latex_table,
    ranked_images,
    references,
)
from sdwn.reports.report import write_report
from sdwn.wordnet.corpus import WordNet

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
    write_report(release)
    assert (folder / "figures" / "histogram.pdf").read_bytes() == pdf


def test_each_reference_is_of_something_that_sdwn_can_use() -> None:
    assert len(cited := keys(references(NAMES))) == len({*cited})
    text = Path("sdwn/templates/paper/references.bib").read_text()
    assert sorted(keys(text)) == sorted({*cited} - {"sdwn"})
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


def test_a_grid_has_the_concepts_or_the_best_and_worst_images(release: Release) -> None:
    best, worst = (ranked_images(release, 2, best) for best in (True, False))
    assert len(best) == len(worst) == 2
    assert best[0][0] != worst[0][0]
    cells = concept_images(release, ["zebra", "teapot"])
    assert [caption for _, caption in cells] == ["zebra", "", "", "", "teapot", "", "", ""]
    assert [release.row(index or 0)["synset"] for index, _ in cells[::4]] == [
        "zebra.n.01",
        "teapot.n.01",
    ]
    figure = grid_figure(release, cells, 4)
    assert len([axis for axis in figure.axes if axis.images]) == 8
