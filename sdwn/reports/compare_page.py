"""A comparison becomes a self-contained HTML page, tables, and figures for print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdwn.evaluation.metrics import metrics_shown
from sdwn.io import csv_text, write_text
from sdwn.paths import ComparisonPaths
from sdwn.reports import thumbnails
from sdwn.reports.album import Album
from sdwn.reports.compare import LEVEL, Side
from sdwn.reports.compare_charts import charts, colours
from sdwn.reports.compare_figures import write_comparison_figures
from sdwn.reports.page import render

GALLERY_CLASSES = 8
MEASURES = (
    ("share of right images, mean over classes", "rate"),
    ("the same by top-5", "rate_top5"),
    ("probability on the synset's subtree, mean over synsets", "subtree_probability"),
)


def write_comparison(
    comparison: Mapping[str, Any], sides: Sequence[Side], paths: ComparisonPaths
) -> None:
    """Write a comparison's record, tables, figures and page."""
    write_text(paths.classes, _class_table(comparison))
    write_text(paths.groups, _group_table(comparison))
    write_comparison_figures(comparison, paths)
    write_text(paths.page, page(comparison, sides))
    # Last, for it is what says that the others are there.
    write_text(paths.comparison, json.dumps(comparison, indent=2) + "\n")


def verdict(pair: Mapping[str, Any]) -> str:
    """Say in a sentence what follows of a pair.

    >>> rate = {"mean": 0.1, "interval": (0.05, 0.15), "p_value": 0.0002, "pairs": 9}
    >>> verdict({"first": "a", "second": "b", "rate": rate})
    'b is recognised more often than a: +10.0 percentage points (+5.0 to +15.0, p < 0.001)'
    """
    rate, first, second = pair["rate"], pair["first"], pair["second"]
    if rate["interval"] is None:
        return f"{first} and {second} have one class in common, of which nothing follows"
    change, low, high = (points(end) for end in (rate["mean"], *rate["interval"]))
    chance = f"p = {rate['p_value']:.3f}" if rate["p_value"] >= 0.001 else "p < 0.001"
    told = f"{change} percentage points ({low} to {high}, {chance})"
    if rate["p_value"] > LEVEL:
        return f"{first} and {second} cannot be told apart by how often they are recognised: {told}"
    how = "more" if rate["mean"] > 0 else "less"
    return f"{second} is recognised {how} often than {first}: {told}"


def points(share: float) -> str:
    """Write a difference of shares in percentage points.

    >>> points(0.1), points(-0.0001)
    ('+10.0', '+0.0')
    """
    # What is rounded to nothing has no sign.
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def page(comparison: Mapping[str, Any], sides: Sequence[Side]) -> str:
    """Write the page as HTML that needs nothing but itself."""
    judges = list(dict.fromkeys(side["classifier"]["model"] for side in comparison["sides"]))
    return render(
        "comparison.html",
        {
            "comparison": comparison,
            "sides": [
                {**side, "colour": colour}
                for side, colour in zip(comparison["sides"], colours(comparison), strict=True)
            ],
            "judges": judges,
            "verdicts": [verdict(pair) for pair in comparison["pairs"]],
            "metrics": metrics_shown("comparison"),
            "measures": MEASURES,
            "level": LEVEL,
            "points": points,
            "notices": [
                (side.name, said) for side in sides if (said := side.release.manifest.notice)
            ],
            "galleries": _galleries(comparison, sides),
            "data": {"charts": charts(comparison), "classes": {}, "sheets": {}, "colours": {}},
        },
        scripts=("card.js", "charts.js", "tables.js"),
    )


def _galleries(
    comparison: Mapping[str, Any], sides: Sequence[Side]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Show the classes that differ most, of the last side from the first, by their pictures."""
    change = {row["wnid"]: _change(row) for row in comparison["classes"]}
    order = sorted(change, key=lambda wnid: (change[wnid], wnid))
    lost = [wnid for wnid in order if change[wnid] < 0][:GALLERY_CLASSES]
    won = [wnid for wnid in reversed(order) if change[wnid] > 0][:GALLERY_CLASSES]
    rows = {row["wnid"]: row for row in comparison["classes"]}
    albums = [Album(side.release, [*lost, *won], side.predictions) for side in sides]
    first, last = sides[0].name, sides[-1].name
    return [
        (f"{last} is better than {first}", [_shown(rows[wnid], sides, albums) for wnid in won]),
        (f"{last} is worse than {first}", [_shown(rows[wnid], sides, albums) for wnid in lost]),
    ]


def _change(row: Mapping[str, Any]) -> float:
    return float(row["correct"][-1] / row["images"][-1] - row["correct"][0] / row["images"][0])


def _shown(
    row: Mapping[str, Any], sides: Sequence[Side], albums: Sequence[Album]
) -> dict[str, Any]:
    found = [
        {
            "name": side.name,
            "correct": row["correct"][place],
            "images": row["images"][place],
            "prompt": side.release.synsets[row["wnid"]].prompt,
            "pictures": [
                thumbnails.shown(album, row["synset"], one) for one in album[row["wnid"]][:10]
            ],
        }
        for place, (side, album) in enumerate(zip(sides, albums, strict=True))
    ]
    return {**row, "name": albums[0].name(row["wnid"]), "sides": found}


def _class_table(comparison: Mapping[str, Any]) -> str:
    names = [side["name"] for side in comparison["sides"]]
    head = ["wnid", "synset", "group"]
    head += [f"{what} {name}" for what in ("images", "correct") for name in names]
    head += [f"adjusted p {name}" for name in names[1:]]
    rows = (
        [row["wnid"], row["synset"], row["group"], *row["images"], *row["correct"]]
        + row["adjusted_p_values"]
        for row in comparison["classes"]
    )
    return csv_text(head, rows)


def _group_table(comparison: Mapping[str, Any]) -> str:
    head = "name wnid classes mean p_value adjusted_p_value".split()
    rows = (
        (
            *(pair["first"], pair["second"], *map(row.get, head)),
            *(*row["rates"], *(row.get("interval") or (None, None))),
        )
        for pair in comparison["pairs"]
        for row in pair["groups"]
    )
    ends = ("rate_first", "rate_second", "low", "high")
    return csv_text(("first", "second", *head, *ends), rows)
