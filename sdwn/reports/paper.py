"""What goes into a paper: tables for LaTeX, references for BibTeX, grids of images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sdwn import __version__
from sdwn.errors import UsageError, command
from sdwn.evaluation.metrics import Metric, metrics_shown
from sdwn.io import write_text
from sdwn.measures.record import MEASURES, all_records
from sdwn.measures.scores import score_table
from sdwn.paths import EvaluationPaths
from sdwn.releases.release import Release
from sdwn.reports.figures import DPI, STYLE
from sdwn.storage.columns import numbers

# In inches, the width of the text of most papers, and the height of a caption. Images a row.
WIDTH, CAPTION, COLUMNS = 6.8, 0.18, 8

_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
_LATEX |= {"\u2013": "--"}
_OWN = """\
@software{sdwn,
  title   = {sdwn: large synthetic image datasets from text-to-image models and {WordNet}},
  version = {%s}
}
"""
_ENTRY = re.compile(r"^% for: (?P<used>.+)\n(?P<entry>@(?:.+\n)+?\}\n)", re.MULTILINE)


# --- Tables and references ---------------------------------------------------------------------
def write_paper_files(
    paths: EvaluationPaths, release: Release, evaluation: Mapping[str, Any]
) -> None:
    """Write an evaluation's tables for LaTeX, and the references of all that was used."""
    figures, shown = evaluation["figures"], metrics_shown("terminal")
    rows = [[one.heading(figures), with_interval(one, figures)] for one in shown]
    if evaluation["classes"]:
        write_text(paths.latex("figures"), latex_table(["", "value (95 % interval)"], rows))
    columns = metrics_shown("group columns")
    groups = [group for group in evaluation["groups"] if group["classes"]]
    head = ["group", "classes", *(one.heading(figures, short=True) for one in columns)]
    rows = [
        [group["name"], f"{group['classes']:,}", *(one.number(group) for one in columns)]
        for group in groups
    ]
    if groups:
        write_text(paths.latex("groups"), latex_table(head, rows))
    rows = [
        [measure.label, measure.text(figure), f"{figure['images']:,}", record["features"]["name"]]
        for record in all_records(release).values()
        for name, measure in MEASURES.items()
        if (figure := record["figures"].get(name))
    ]
    if rows:
        head = ["measure", "value (95 % interval)", "images", "features"]
        write_text(paths.latex("measures"), latex_table(head, rows))
    write_text(paths.references, references(names_used(release, evaluation)))


def with_interval(metric: Metric, figures: Mapping[str, Any]) -> str:
    """Write a metric's value with its 95 % interval, without the unit."""
    ends = (figures.get("intervals") or {}).get(metric.name)
    span = " to ".join(metric.form.format(metric.scale * end) for end in ends or ())
    return f"{metric.number(figures)} ({span})" if span else metric.number(figures)


def latex_text(text: str) -> str:
    r"""Write text so that LaTeX prints it.

    >>> latex_text("50 % of dog_01 & cat")
    '50 \\% of dog\\_01 \\& cat'
    """
    return "".join(_LATEX.get(sign, sign) for sign in text)


def latex_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for LaTeX with booktabs; all columns but the first are set to the right."""
    first, *rest = (" & ".join(map(latex_text, row)) + r" \\" for row in (head, *rows))
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    lines = [r"% \usepackage{booktabs}", begin, r"\toprule", first, r"\midrule", *rest]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def names_used(release: Release, evaluation: Mapping[str, Any]) -> set[str]:
    """List the models, libraries and measures that a release and its evaluation rest on."""
    used = {"timm", evaluation["classifier"]["model"]}
    for plan in release.manifest.plans:
        used |= {"diffusers", plan.settings["model"]["name"]}
    if release.has_tree:
        used |= {"wordnet", "imagenet"}
    for record in all_records(release).values():
        used |= {record["features"]["encoder"]["model"], *record["figures"]}
    return used


def references(used: Iterable[str]) -> str:
    """Return BibTeX entries for what was used: names of models, libraries and measures."""
    source = files("sdwn").joinpath("templates/paper/references.bib").read_text(encoding="utf-8")
    names = ["all", *used]
    entries = [
        one["entry"]
        for one in _ENTRY.finditer(source)
        if any(re.search(one["used"], name) for name in names)
    ]
    return "\n".join([_OWN % __version__, *entries])


# --- Grids of images ---------------------------------------------------------------------------
def ranked_images(release: Release, most: int, best: bool) -> list[tuple[int, str]]:
    """Pick the images that show their concept best, or worst, one of each concept.

    Returns:
        Index and caption of up to ``most`` images, by the classifier's probability of the class.
    """
    shares = numbers(score_table(release)["label_probability"], np.nan)
    known = np.flatnonzero(~np.isnan(shares))
    if not len(known):
        advice = command("evaluate", release.paths.root)
        raise UsageError(f"{release}: no image of a class is evaluated; run: {advice}")
    order = known[np.argsort(-shares[known] if best else shares[known], kind="stable")]
    chosen = dict[str, int]()
    for row, id_ in zip(
        order.tolist(), release.metadata["id"].take(order).to_pylist(), strict=True
    ):
        chosen.setdefault(id_, row)
    return [
        (row, f"{release.concepts[id_].label or id_}, {100 * shares[row]:.0f} %")
        for id_, row in list(chosen.items())[:most]
    ]


def concept_images(release: Release, names: Sequence[str]) -> list[tuple[int | None, str]]:
    """Pick the first images of each concept for a row of a grid, whose first has the caption."""
    each = [release.find(release.find_one(name)).tolist() for name in names]
    columns = min(COLUMNS, max(map(len, each)))
    return [
        (rows[at] if at < len(rows) else None, "" if at else name)
        for name, rows in zip(names, each, strict=True)
        for at in range(columns)
    ]


def grid_figure(release: Release, cells: Sequence[tuple[int | None, str]], columns: int) -> Figure:
    """Draw images of a release, by index, with captions below them, so many a row."""
    rows, side = -(-len(cells) // columns), WIDTH / columns
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, rows * (side + CAPTION)))
        below = CAPTION / (rows * (side + CAPTION))
        gaps = {"left": 0, "right": 1, "top": 1, "bottom": below, "hspace": CAPTION / side}
        axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**gaps, "wspace": 0.05})
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (index, caption) in zip(axes.flat, cells, strict=False):
            if index is not None:
                image = release.image(index)
                image.thumbnail((round(side * DPI),) * 2)
                axis.imshow(image, interpolation="none")
                axis.text(0, -0.03, caption, transform=axis.transAxes, va="top", fontsize=7)
    return figure
