"""An evaluation becomes one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from sdwn.columns import BLACK
from sdwn.config import ModelConfig
from sdwn.errors import IntegrityError, SdwnError
from sdwn.evaluation.evaluate import imagenet_images
from sdwn.evaluation.record import read_evaluation
from sdwn.files import EvaluationPaths, write_text
from sdwn.release import Release

GALLERY_CLASSES = 12
THUMBNAIL_PIXELS = 128


def write_report(release: Release, name: str | None = None) -> Path:
    """Write the page of an evaluation, by default the latest, and return its path.

    Raises:
        SdwnError: there is no such evaluation, or it is of other images.
    """
    paths = _choose(release, name)
    evaluation = read_evaluation(paths)
    if evaluation.get("release") != release.digest:
        raise SdwnError(
            f"{paths.evaluation}: of another release than {release.paths.root}; "
            f"evaluate again with: sdwn evaluate {release.paths.root}"
        )
    write_text(paths.report, page(release, evaluation))
    return paths.report


def _choose(release: Release, name: str | None) -> EvaluationPaths:
    folder = release.paths.evaluations
    found = {path.parent.name: path for path in sorted(folder.glob("*/evaluation.json"))}
    if not found:
        raise SdwnError(
            f"{release.paths.root}: not evaluated yet; run: sdwn evaluate {folder.parent}"
        )
    if name is None:
        name = max(found, key=lambda known: found[known].stat().st_mtime)
    if name not in found:
        raise SdwnError(f"no evaluation {name!r}; there is {', '.join(found)}")
    return release.paths.evaluation(name)


def page(release: Release, evaluation: dict[str, Any]) -> str:
    """Write the page as HTML that needs nothing but itself."""
    environment = Environment(
        loader=PackageLoader("sdwn"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["plain"] = plain
    figures, manifest = evaluation["figures"], release.manifest
    classes = sorted(evaluation["classes"], key=lambda row: (-row["correct"], row["wnid"]))
    best, worst = gallery_classes(classes)
    some_right = classes[0]["correct"] > 0
    titles = (
        ("Recognised best", "Recognised worst") if some_right else ("First classes", "Last classes")
    )
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        figures=figures,
        manifest=manifest,
        settings=manifest.settings,
        paper=evaluation.get("paper"),
        black=BLACK,
        builtin=_is_builtin(manifest.settings),
        histogram=Markup(histogram_svg(figures["histogram"], evaluation.get("paper"))),
        classes=[{**row, **_names(release, row["wnid"])} for row in classes],
        galleries=[
            (titles[0], _gallery(release, best)),
            (
                "Recognised worst" if best[0]["correct"] else "Last classes",
                _gallery(release, worst),
            ),
        ],
    )


def _is_builtin(settings: dict[str, Any] | None) -> bool:
    return settings is not None and ModelConfig(**settings["model"]).builtin is not None


def plain(value: Any) -> str:
    """Write a setting as a person would.

    >>> plain(None), plain(True), plain([3, 224]), plain({"torch": "2.4"})
    ('none', 'yes', '3, 224', 'torch 2.4')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, list) else str(value)


def gallery_classes(
    classes: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pick the best and the worst classes, none twice, from a list with the best first."""
    half = min(GALLERY_CLASSES, (len(classes) + 1) // 2)
    return classes[:half], classes[half:][-GALLERY_CLASSES:][::-1]


def histogram_svg(counts: list[int], paper: dict[str, Any] | None) -> str:
    """Draw how many classes have 0, 1, ... N right images, as inline SVG."""
    # Text stays text: it can be searched, and takes the page's colour.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sdwn", "font.size": 11}):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axes = figure.subplots()
        bars = axes.bar(range(len(counts)), counts, color="#4477aa", width=0.85)
        axes.bar_label(bars, padding=2)
        axes.set_xticks(range(len(counts)))
        axes.set_xlabel(f"correct images of {len(counts) - 1}")
        axes.set_ylabel("classes")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
        if paper:
            axes.axvline(
                paper["mean_correct"], color="#cc6677", linestyle="--", label="paper's mean"
            )
            axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]


def _names(release: Release, wnid: str) -> dict[str, str]:
    row = release.synsets[wnid]
    return {
        "synset": row.synset,
        "lemmas": row.lemmas.replace("_", " "),
        "prompt": row.prompt,
    }


def _gallery(release: Release, classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = {row["wnid"] for row in classes}
    rows: dict[str, list[dict[str, Any]]] = {wnid: [] for wnid in wanted}
    for row in imagenet_images(release).to_pylist():
        if row["wnid"] in wanted:
            rows[row["wnid"]].append(row)
    return [
        {**row, **_names(release, row["wnid"]), "pictures": _pictures(release, rows[row["wnid"]])}
        for row in classes
    ]


def _pictures(release: Release, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: row["number"])
    return [
        {"number": row["number"], "status": row["status"], "source": thumbnail(release, row)}
        for row in rows
    ]


def thumbnail(release: Release, row: dict[str, Any]) -> str:
    """Give a small picture as a data URL; an empty one where the image is damaged."""
    try:
        image = release.image(row)
    except IntegrityError:
        image = Image.new("RGB", (1, 1))
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
