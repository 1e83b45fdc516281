"use strict";
// Draws the figures in the page's own colours, and again when these change.
const charts = (() => {
  // A name with two dollar signs is no formula.
  const options = { displayModeBar: false, responsive: true, scrollZoom: false, typesetMath: false };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const wide = window.matchMedia("(min-width: 62rem)");

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function themed(figure, place) {
    let text = JSON.stringify(figure);
    if (place.dataset.chart !== "map") {
      // The groups' colours stay what they are on paper; these two may be lighter in the dark.
      for (const [name, printed] of Object.entries(card.data.colours)) {
        text = text.replaceAll(`"${printed}"`, `"${colour(name)}"`);
      }
    }
    const made = JSON.parse(text);
    const layout = made.layout;
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--text") };
    layout.hoverlabel = { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text") } };
    for (const axis of [layout.xaxis, layout.yaxis]) {
      axis.gridcolor = colour("--line");
      axis.tickcolor = colour("--line");
    }
    // Where the map is small its circles are smaller, but none vanishes.
    const scale = Math.min(1, Math.max(0.45, place.clientWidth / 760));
    for (const trace of made.data) {
      if (Array.isArray(trace.marker?.size)) {
        trace.marker.size = trace.marker.size.map((size) => Math.max(3, scale * size));
      }
      if (trace.hoverinfo === "skip") trace.marker.color = colour("--text");
      // Rings are drawn by their lines; discs have the ground's colour between them.
      if (trace.mode === "markers" && trace.marker.symbol === "circle") {
        trace.marker.line.color = colour("--raised");
      }
    }
    return made;
  }

  const ready = {};
  for (const place of document.querySelectorAll("[data-chart]")) {
    const name = place.dataset.chart;
    const figure = card.data.charts[name];
    const draw = () => {
      const made = themed(figure, place);
      return Plotly.react(place, made.data, made.layout, options);
    };
    ready[name] = { place, drawn: draw() };
    for (const media of [dark, wide]) media.addEventListener("change", draw);
  }
  return { ready, colour };
})();
