"""The comparison page's figures, as plotly reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from sdwn.reports.charts import TALL_ROW, plain_figure
from sdwn.reports.palette import COLOURS, GREY

# Names of classes that a circle tells before it says "and more".
NAMED = 6
LARGEST = 34.0


def charts(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Draw all figures of a comparison: plotly's data and layout by name."""
    drawn = {"histogram": histogram(comparison)}
    if ranked(comparison):
        drawn["groups"] = groups(comparison)
    for place in range(len(comparison["pairs"])):
        drawn[f"classes-{place}"] = classes(comparison, place)
    return {name: figure.to_plotly_json() for name, figure in drawn.items()}


def histogram(comparison: Mapping[str, Any]) -> go.Figure:
    """Draw how many classes have 0, 1, ... N right images, each side beside the others."""
    bars = [
        go.Bar(
            name=escape(side["name"]),
            x=list(range(len(side["figures"]["histogram"]))),
            y=side["figures"]["histogram"],
            marker={"color": colour},
            hovertemplate="%{x} right: %{y:,} classes<extra>%{fullData.name}</extra>",
        )
        for side, colour in zip(comparison["sides"], colours(comparison), strict=True)
    ]
    drawn = plain_figure(bars, 320, bargap=0.2, margin={"l": 58, "r": 8, "t": 8, "b": 44})
    _legend(drawn)
    most = max(len(bar.x) for bar in bars) - 1
    drawn.update_xaxes(title=f"right images of {most}", dtick=1 if most <= 20 else None)
    drawn.update_yaxes(title="classes", showgrid=True)
    return drawn


def groups(comparison: Mapping[str, Any]) -> go.Figure:
    """Draw each group's rate on every side, those that changed most at the top."""
    names, shown = ranked(comparison), [escape(name) for name in ranked(comparison)]
    dots = [
        go.Scatter(
            name=escape(side["name"]),
            x=[100 * rate for rate in group_rates(comparison, place, names)],
            y=shown,
            mode="markers",
            marker={"color": colour, "size": 10},
            hovertemplate="%{y}: %{x:.0f} %<extra>%{fullData.name}</extra>",
        )
        for place, (side, colour) in enumerate(
            zip(comparison["sides"], colours(comparison), strict=True)
        )
    ]
    height = 110 + TALL_ROW * len(names)
    drawn = plain_figure(dots, height, margin={"l": 8, "r": 8, "t": 8, "b": 44})
    _legend(drawn)
    for name, *found in zip(shown, *(dot.x for dot in dots), strict=True):
        line = {"width": 1.5, "color": GREY}
        ends = {"x0": min(found), "x1": max(found), "y0": name, "y1": name}
        drawn.add_shape(type="line", layer="below", line=line, **ends)
    drawn.update_xaxes(title="right images, %", range=[-2, 102], showgrid=True)
    drawn.update_yaxes(automargin=True, dtick=1, showgrid=True)
    return drawn


def classes(comparison: Mapping[str, Any], place: int) -> go.Figure:
    """Draw the classes by their rates on both sides of a pair; a circle is all of one place."""
    spots = class_spots(comparison, place)
    circles = go.Scatter(
        x=[x for x, _ in spots],
        y=[y for _, y in spots],
        mode="markers",
        text=[_told(names) for names in spots.values()],
        marker={
            "color": colours(comparison)[place + 1],
            "opacity": 0.75,
            "size": sizes(spots, LARGEST),
            "sizemin": 3,
        },
        hovertemplate="%{x:.0f} % to %{y:.0f} %<br>%{text}<extra></extra>",
    )
    drawn = plain_figure([circles], 460, margin={"l": 58, "r": 8, "t": 8, "b": 48})
    line = {"dash": "dot", "width": 1, "color": GREY}
    drawn.add_shape(type="line", x0=0, y0=0, x1=100, y1=100, layer="below", line=line)
    pair = comparison["pairs"][place]
    first, second = escape(pair["first"]), escape(pair["second"])
    drawn.update_xaxes(title=f"{first}: right images, %", range=[-7, 107], showgrid=True)
    drawn.update_yaxes(title=f"{second}: right images, %", range=[-7, 107], showgrid=True)
    return drawn


def colours(comparison: Mapping[str, Any]) -> list[str]:
    """Give each side its colour."""
    return [COLOURS[place % len(COLOURS)] for place in range(len(comparison["sides"]))]


def ranked(comparison: Mapping[str, Any]) -> list[str]:
    """Name the groups that have classes, what changed most last."""
    rows = [group for group in comparison["pairs"][0]["groups"] if group["classes"]]
    return [row["name"] for row in sorted(rows, key=lambda row: (row["mean"], row["name"]))]


def group_rates(comparison: Mapping[str, Any], place: int, names: Sequence[str]) -> list[float]:
    """Give the rates of these groups on a side."""
    pair = comparison["pairs"][max(0, place - 1)]
    found = {row["name"]: row["rates"] for row in pair["groups"] if row["classes"]}
    return [found[name][1 if place else 0] for name in names]


def class_spots(comparison: Mapping[str, Any], place: int) -> dict[tuple[float, float], list[str]]:
    """Gather the classes of a pair by their percentages of right images."""
    spots: dict[tuple[float, float], list[str]] = {}
    for row in comparison["classes"]:
        rate = [
            round(100 * row["correct"][side] / row["images"][side], 1) for side in (0, place + 1)
        ]
        spots.setdefault((rate[0], rate[1]), []).append(row["synset"])
    return spots


def sizes(spots: Mapping[Any, Sequence[str]], largest: float) -> list[float]:
    """Give each circle a diameter, so that areas are as the numbers of classes."""
    most = max(map(len, spots.values()))
    return [round(largest * (len(names) / most) ** 0.5, 1) for names in spots.values()]


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)}: {', '.join(names[:NAMED])}{more}"


def _legend(figure: go.Figure) -> None:
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "traceorder": "normal"},
        margin={"t": 36},
    )
