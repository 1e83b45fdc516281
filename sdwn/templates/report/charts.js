"use strict";
// Draws the figures in the page's own colours, and again when these change.
const charts = (() => {
  const options = { displayModeBar: false, responsive: true, scrollZoom: false };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function themed(figure, place) {
    const made = structuredClone(figure);
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
    dark.addEventListener("change", draw);
  }
  return { ready, colour, dark };
})();
