"""Charts of the pages, as plotly reads them; the colours of text and lines are the page's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from sdwn.reports.chart_data import (
    ACCENT,
    GREY,
    Bars,
    MeanLine,
    changed_groups,
    class_rates,
    diameters,
    group_means,
    map_circles,
    report_bars,
    side_bars,
)

SYMBOLS = {"disc": "circle", "ring": "circle-open", "target": "circle-open-dot"}
# In pixels, of a class with none and with all of its images correct; of a circle of classes.
SMALLEST, LARGEST, LARGEST_OF_CLASSES = 4.0, 19.0, 34.0
ROW_HEIGHT = 22
# Bars, above which they are not labelled one by one.
MANY = 20
# Names of classes that a circle lists before "and more".
NAMED = 6


def report_charts(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return all charts of an evaluation: plotly's data and layout by name."""
    drawn = {}
    if evaluation["classes"]:
        drawn["histogram"] = histogram_chart(*report_bars(evaluation))
    if group_means(evaluation):
        drawn["groups"] = group_means_chart(evaluation)
    if evaluation["map"]:
        drawn["map"] = map_chart(evaluation)
    return {name: figure.to_plotly_json() for name, figure in drawn.items()}


def comparison_charts(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return all charts of a comparison: plotly's data and layout by name."""
    drawn = {"histogram": histogram_chart(side_bars(comparison))}
    if changed_groups(comparison):
        drawn["groups"] = group_rates_chart(comparison)
    for pair in range(len(comparison["pairs"])):
        drawn[f"classes-{pair}"] = class_rates_chart(comparison, pair)
    return {name: figure.to_plotly_json() for name, figure in drawn.items()}


def histogram_chart(sides: Sequence[Bars], means: Sequence[MeanLine] = ()) -> go.Figure:
    """Plot how many classes have 0, 1, ... N correct images: one evaluation, or side by side."""
    most, several = max(len(side.counts) for side in sides) - 1, len(sides) > 1
    labelled = most <= MANY and not several
    bars = [
        go.Bar(
            name=escape(side.name),
            x=list(range(len(side.counts))),
            y=side.counts,
            text=[f"{count:,}" for count in side.counts] if labelled else None,
            textposition="outside",
            cliponaxis=False,
            marker={"color": side.colour},
            hovertemplate=f"%{{x}} of {most} correct: %{{y:,}} classes"
            f"<extra>{'%{fullData.name}' if several else ''}</extra>",
        )
        for side in sides
    ]
    figure = _figure(bars, 310, bargap=0.17, margin={"l": 60, "r": 8, "t": 40, "b": 44})
    figure.update_xaxes(title=f"correct images of {most}", dtick=1 if most <= MANY else None)
    figure.update_yaxes(title={"text": "classes", "standoff": 8}, showgrid=True)
    if several:
        _add_legend(figure)
    # Of two labels the one of the smaller mean is on the left of its line.
    for rank, line in enumerate(sorted(means, key=lambda line: line.mean)):
        side = "right" if rank == 0 and len(means) > 1 else "left"
        _add_vertical(figure, line, side)
    return figure


def group_means_chart(evaluation: Mapping[str, Any]) -> go.Figure:
    """Plot each group's mean with its interval, the best at the top."""
    rows = group_means(evaluation)
    dots = go.Scatter(
        x=[row.mean for row in rows],
        y=[row.name for row in rows],
        mode="markers",
        marker={"color": ACCENT, "size": 9},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row.high - row.mean for row in rows],
            "arrayminus": [row.mean - row.low for row in rows],
            "color": ACCENT,
            "thickness": 1.5,
            "width": 0,
        },
        customdata=[[row.classes, row.low, row.high] for row in rows],
        hovertemplate=(
            "%{y}: %{x:.2f} (%{customdata[1]:.2f} to %{customdata[2]:.2f}), "
            "%{customdata[0]} classes<extra></extra>"
        ),
    )
    most, mean = evaluation["figures"]["images_per_class"], evaluation["figures"]["mean_correct"]
    margin = {"l": 8, "r": 8, "t": 40, "b": 44}
    figure = _figure([dots], 90 + ROW_HEIGHT * len(rows), margin=margin)
    title, span = f"correct images of {most}, mean", [-0.02 * most, 1.02 * most]
    figure.update_xaxes(title=title, range=span, showgrid=True)
    figure.update_yaxes(automargin=True, dtick=1, showgrid=True)
    _add_vertical(figure, MeanLine(mean, "all classes", ACCENT), "left")
    return figure


def map_chart(evaluation: Mapping[str, Any]) -> go.Figure:
    """Plot a circle for each class; a point's customdata is its wnid, a trace a group."""
    groups = map_circles(evaluation)
    traces = [
        go.Scatter(
            name=style.name,
            x=[circle.x for circle in circles],
            y=[circle.y for circle in circles],
            customdata=[circle.wnid for circle in circles],
            mode="markers",
            hoverinfo="none",
            marker={
                "color": style.colour,
                "symbol": SYMBOLS[style.shape],
                "opacity": 0.8,
                "size": [
                    round(SMALLEST + (LARGEST - SMALLEST) * circle.size, 1) for circle in circles
                ],
                "line": {"width": 0.6 if style.shape == "disc" else 2},
            },
        )
        for style, circles in groups
    ]
    figure = _figure(traces, None, margin={"l": 4, "r": 4, "t": 4, "b": 4}, hoverdistance=12)
    x = [circle.x for _, circles in groups for circle in circles]
    y = [circle.y for _, circles in groups for circle in circles]
    figure.update_xaxes(visible=False, range=[min(x) - 0.07, max(x) + 0.07])
    figure.update_yaxes(visible=False, range=[min(y) - 0.07, max(y) + 0.07])
    return figure


def group_rates_chart(comparison: Mapping[str, Any]) -> go.Figure:
    """Plot each group's rate on every side, the most changed at the top."""
    rows = [(escape(name), rates) for name, rates in changed_groups(comparison)]
    dots = [
        go.Scatter(
            name=escape(side.name),
            x=[rates[index] for _, rates in rows],
            y=[name for name, _ in rows],
            mode="markers",
            marker={"color": side.colour, "size": 10},
            hovertemplate="%{y}: %{x:.0f} %<extra>%{fullData.name}</extra>",
        )
        for index, side in enumerate(side_bars(comparison))
    ]
    margin = {"l": 8, "r": 8, "t": 40, "b": 44}
    figure = _figure(dots, 110 + ROW_HEIGHT * len(rows), margin=margin)
    _add_legend(figure)
    for name, rates in rows:
        ends = {"x0": min(rates), "x1": max(rates), "y0": name, "y1": name}
        line = {"width": 1.5, "color": GREY}
        figure.add_shape(type="line", layer="below", line=line, **ends)
    figure.update_xaxes(title="correct images, %", range=[-2, 102], showgrid=True)
    figure.update_yaxes(automargin=True, dtick=1, showgrid=True)
    return figure


def class_rates_chart(comparison: Mapping[str, Any], pair: int) -> go.Figure:
    """Plot the classes by their rates on both sides of a pair, equal ones as one circle."""
    classes = class_rates(comparison, pair)
    texts = [
        f"{len(names)}: {', '.join(names[:NAMED])}"
        + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for names in classes.values()
    ]
    circles = go.Scatter(
        x=[x for x, _ in classes],
        y=[y for _, y in classes],
        mode="markers",
        text=texts,
        marker={
            "color": side_bars(comparison)[pair + 1].colour,
            "opacity": 0.75,
            "size": diameters(classes, LARGEST_OF_CLASSES),
            "sizemin": 3,
        },
        hovertemplate="%{x:.0f} % to %{y:.0f} %<br>%{text}<extra></extra>",
    )
    figure = _figure([circles], 460, margin={"l": 58, "r": 8, "t": 8, "b": 48})
    line = {"dash": "dot", "width": 1, "color": GREY}
    figure.add_shape(type="line", x0=0, y0=0, x1=100, y1=100, layer="below", line=line)
    for side, update in (("first", figure.update_xaxes), ("second", figure.update_yaxes)):
        title = f"{escape(comparison['pairs'][pair][side])}: correct images, %"
        update(title=title, range=[-7, 107], showgrid=True)
    return figure


def _figure(traces: list[Any], height: int | None, **layout: Any) -> go.Figure:
    """Return a figure of traces without colours of text, ground and lines: the page has them."""
    figure = go.Figure(traces)
    figure.update_layout(
        # The default one is several kilobytes of colours that the page sets itself.
        template=go.layout.Template(),
        height=height,
        showlegend=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        **layout,
    )
    figure.update_xaxes(zeroline=False, fixedrange=height is not None, showgrid=False)
    figure.update_yaxes(zeroline=False, fixedrange=height is not None, showgrid=False)
    return figure


def _add_legend(figure: go.Figure) -> None:
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "traceorder": "normal"}
    figure.update_layout(showlegend=True, legend=legend)


def _add_vertical(figure: go.Figure, line: MeanLine, side: str) -> None:
    at, text = line.mean, f"{line.name} {line.mean:.2f}"
    look = {"color": line.colour, "width": 1.5, "dash": "dash"}
    figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=look)
    figure.add_annotation(
        x=at, y=1, yref="paper", yanchor="bottom", xanchor=side, text=text, showarrow=False
    )
