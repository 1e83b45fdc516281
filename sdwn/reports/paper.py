"""Tables for LaTeX, references for BibTeX and grids of images, for a paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from sdwn import __version__
from sdwn.errors import UsageError, command
from sdwn.evaluation.metrics import Metric, metrics_shown
from sdwn.io import atomic, write_text
from sdwn.measures.record import MEASURES, Records, all_records, score_table
from sdwn.paths import ComparisonPaths, EvaluationPaths
from sdwn.releases.release import Release
from sdwn.reports.figures import DPI, KINDS, STYLE, plain_text
from sdwn.storage.columns import numbers

# In inches, the width of the text of most papers, and the height of a caption. Images a row.
WIDTH, CAPTION, COLUMNS, RANKED_COLUMNS = 6.8, 0.18, 8, 5

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
    paths: EvaluationPaths, release: Release, evaluation: Mapping[str, Any], records: Records
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
        for record in records.values()
        for name, measure in MEASURES.items()
        if (figure := record["figures"].get(name))
    ]
    if rows:
        head = ["measure", "value (95 % interval)", "images", "features"]
        write_text(paths.latex("measures"), latex_table(head, rows))
    used = names_used(release, evaluation["classifier"]["model"], records)
    write_text(paths.references, references(used))


def write_comparison_files(
    comparison: Mapping[str, Any], releases: Mapping[str, Release], paths: ComparisonPaths
) -> None:
    """Write a comparison's figures as a table for LaTeX, a row a side, and all references."""
    sides, shown = comparison["sides"], metrics_shown("compared")
    measured = [
        (MEASURES[name], figures)
        for record in comparison["measures"]
        for name, figures in record["figures"].items()
    ]
    head = [one.heading(sides[0]["figures"], short=True) for one in shown]
    head += [one.label for one, _ in measured]
    rows = [
        [
            side["name"],
            *(with_interval(one, side["figures"]) for one in shown),
            *(one.text(figures[at]) for one, figures in measured),
        ]
        for at, side in enumerate(sides)
    ]
    write_text(paths.latex("figures"), latex_table(["", *head], rows))
    used = set[str]()
    for side in sides:
        release = releases[side["name"]]
        used |= names_used(release, side["classifier"]["model"], all_records(release))
    write_text(paths.references, references(used))


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


def names_used(release: Release, classifier: str, records: Records) -> set[str]:
    """List the models, libraries and measures that an evaluated release rests on."""
    used = {"timm", classifier}
    for plan in release.manifest.plans:
        used |= {"diffusers", plan.settings["model"]["name"]}
    if release.has_tree:
        used |= {"wordnet", "imagenet"}
    for record in records.values():
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
# A cell of a grid: the image's index, None where there is none, and its caption.
Cell = tuple[int | None, str]


def write_grid(
    release: Release, names: Sequence[str], ranked: int, evaluation: str | None, path: Path
) -> int:
    """Write images with captions as PNG or PDF; return how many.

    Args:
        release: a release or a subset of one.
        names: of concepts, a row each, whose first image has the caption; or none.
        ranked: without names, how many images, of each concept the surest; below 0 the least sure.
        evaluation: whose probabilities count; the latest unless named.
        path: the file, which ends in ``.png`` or ``.pdf``.
    """
    cells, columns = _ranked(release, ranked, evaluation), RANKED_COLUMNS
    if names:
        each = [release.find(release.find_one(name)).tolist() for name in names]
        columns = min(COLUMNS, max(map(len, each)))
        cells = [
            (rows[at] if at < len(rows) else None, "" if at else name)
            for name, rows in zip(names, each, strict=True)
            for at in range(columns)
        ]
    kind = path.suffix[1:].lower()
    with mpl.rc_context(STYLE), atomic(path) as temporary:
        figure = _grid(release, cells, columns)
        figure.savefig(temporary, format=kind, dpi=DPI, metadata=KINDS[kind])
    return sum(index is not None for index, _ in cells)


def _ranked(release: Release, ranked: int, evaluation: str | None) -> list[Cell]:
    """Pick one image of each concept, the surest or least sure, by the classifier."""
    if not ranked:
        return []
    shares = numbers(score_table(release, evaluation)["label_probability"], np.nan)
    known = np.flatnonzero(~np.isnan(shares))
    if not len(known):
        advice = command("evaluate", release.paths.root)
        raise UsageError(f"{release}: no image of a class is evaluated; run: {advice}")
    order = known[np.argsort(-ranked * shares[known], kind="stable")]
    ids, chosen = release.metadata["id"].take(order).to_pylist(), dict[str, int]()
    for row, id_ in zip(order.tolist(), ids, strict=True):
        chosen.setdefault(id_, row)
    return [
        (row, f"{release.concepts[id_].label or id_}, {100 * shares[row]:.0f} %")
        for id_, row in list(chosen.items())[: abs(ranked)]
    ]


def _grid(release: Release, cells: Sequence[Cell], columns: int) -> Figure:
    rows, side = -(-len(cells) // columns), WIDTH / columns
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
            text = plain_text(caption)
            axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=7)
    return figure
