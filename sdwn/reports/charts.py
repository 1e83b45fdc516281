"""The page's figures, as plotly reads them; their colours of text and lines are the page's."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from sdwn.reports.palette import ACCENT, PAPER, Circle, GroupStyle, circles, ranked_groups

SYMBOLS = {"disc": "circle", "ring": "circle-open", "target": "circle-open-dot"}
# In pixels, of a class with none and with all of its images right.
SMALLEST, LARGEST = 4.0, 19.0
TALL_ROW = 22
# Bars, above which they are not labelled one by one.
MANY = 20


def charts(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Draw all figures of an evaluation: plotly's data and layout by name."""
    drawn = {}
    if evaluation["classes"]:
        drawn["histogram"] = histogram(evaluation)
    if ranked_groups(evaluation):
        drawn["groups"] = groups(evaluation)
    if evaluation["map"]:
        drawn["map"] = class_map(evaluation)
    return {name: figure.to_plotly_json() for name, figure in drawn.items()}


def histogram(evaluation: dict[str, Any]) -> go.Figure:
    """Draw how many classes have 0, 1, ... N right images, and the means."""
    counts, figures = evaluation["figures"]["histogram"], evaluation["figures"]
    most = len(counts) - 1
    bars = go.Bar(
        x=list(range(most + 1)),
        y=counts,
        text=[f"{count:,}" for count in counts] if most <= MANY else None,
        textposition="outside",
        cliponaxis=False,
        marker={"color": ACCENT},
        hovertemplate=f"%{{x}} of {most} right: %{{y:,}} classes<extra></extra>",
    )
    drawn = plain_figure([bars], 300, bargap=0.15, margin={"l": 60, "r": 8, "t": 40, "b": 44})
    drawn.update_xaxes(title=f"right images of {most}", dtick=1 if most <= MANY else None)
    drawn.update_yaxes(title={"text": "classes", "standoff": 8}, showgrid=True)
    # Of the two labels the one of the smaller mean stands on the left of its line.
    paper = evaluation.get("paper")
    means = [(figures["mean_correct"], "mean", ACCENT)]
    means += [(paper["mean_correct"], "paper's mean", PAPER)] if paper else []
    for place, (mean, name, colour) in enumerate(sorted(means)):
        side = "right" if place == 0 and len(means) > 1 else "left"
        _vertical(drawn, mean, f"{name} {mean:.2f}", colour, side)
    return drawn


def groups(evaluation: dict[str, Any]) -> go.Figure:
    """Draw each group's mean with its interval, the best at the top."""
    rows = ranked_groups(evaluation)
    means = [row["mean_correct"] for row in rows]
    spans = [row["intervals"]["mean_correct"] or [row["mean_correct"]] * 2 for row in rows]
    dots = go.Scatter(
        x=means,
        y=[row["name"] for row in rows],
        mode="markers",
        marker={"color": ACCENT, "size": 9},
        error_x=_bars(means, spans),
        customdata=[[row["classes"], *span] for row, span in zip(rows, spans, strict=True)],
        hovertemplate=(
            "%{y}: %{x:.2f} (%{customdata[1]:.2f} to %{customdata[2]:.2f}), "
            "%{customdata[0]} classes<extra></extra>"
        ),
    )
    most, mean = evaluation["figures"]["images_per_class"], evaluation["figures"]["mean_correct"]
    drawn = plain_figure(
        [dots], 90 + TALL_ROW * len(rows), margin={"l": 8, "r": 8, "t": 40, "b": 44}
    )
    drawn.update_xaxes(
        title=f"mean of right images of {most}", range=[-0.02 * most, 1.02 * most], showgrid=True
    )
    drawn.update_yaxes(automargin=True, dtick=1, showgrid=True)
    _vertical(drawn, mean, f"all classes {mean:.2f}", ACCENT, "left")
    return drawn


def _bars(means: list[float], spans: list[list[float]]) -> dict[str, Any]:
    """Give each mean the line from one end of its interval to the other."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - mean for mean, (_, high) in zip(means, spans, strict=True)],
        "arrayminus": [mean - low for mean, (low, _) in zip(means, spans, strict=True)],
        "color": ACCENT,
        "thickness": 1.5,
        "width": 0,
    }


def class_map(evaluation: dict[str, Any]) -> go.Figure:
    """Draw a circle for each class; a point's customdata is its wnid, a trace a group."""
    drawn = plain_figure(
        [_trace(style, found) for style, found in circles(evaluation)],
        None,
        margin={"l": 4, "r": 4, "t": 4, "b": 4},
        hoverdistance=12,
    )
    points = [circle for _, found in circles(evaluation) for circle in found]
    drawn.update_xaxes(visible=False, range=_around([circle.x for circle in points]))
    drawn.update_yaxes(visible=False, range=_around([circle.y for circle in points]))
    return drawn


def _around(values: list[float]) -> list[float]:
    return [min(values) - 0.07, max(values) + 0.07]


def _trace(style: GroupStyle, found: list[Circle]) -> go.Scatter:
    return go.Scatter(
        name=style.name,
        x=[circle.x for circle in found],
        y=[circle.y for circle in found],
        customdata=[circle.wnid for circle in found],
        mode="markers",
        hoverinfo="none",
        marker={
            "color": style.colour,
            "symbol": SYMBOLS[style.shape],
            "opacity": 0.8,
            "size": [round(SMALLEST + (LARGEST - SMALLEST) * circle.size, 1) for circle in found],
            "line": {"width": 0.6 if style.shape == "disc" else 2},
        },
    )


def plain_figure(traces: list[Any], height: int | None, **layout: Any) -> go.Figure:
    """Draw traces without colours of text, ground and lines, which are the page's."""
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


def _vertical(figure: go.Figure, at: float, text: str, colour: str, side: str) -> None:
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=line)
    figure.add_annotation(
        x=at, y=1, yref="paper", yanchor="bottom", xanchor=side, text=text, showarrow=False
    )
