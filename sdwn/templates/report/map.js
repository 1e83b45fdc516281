"use strict";
// The map: pointing, tapping, arrow keys and a search all show a class's card; the legend toggles.
(() => {
  const found = charts.ready.map;
  if (!found) return;
  const { place } = found;
  const panel = document.getElementById("map-card");
  const field = document.getElementById("map-find");
  const buttons = [...document.querySelectorAll(".legend [data-trace]")];
  const figure = card.data.charts.map;
  const ranges = structuredClone([figure.layout.xaxis.range, figure.layout.yaxis.range]);
  const points = figure.data.flatMap((trace, group) =>
    trace.customdata.map((wnid, at) => ({ wnid, group, x: trace.x[at], y: trace.y[at] })));
  let chosen = null;

  // The chosen class's ring is a trace of its own, the last.
  const ring = { x: [], y: [], mode: "markers", hoverinfo: "skip", marker: { symbol: "circle-open", size: 28, line: { width: 2.5 } } };
  figure.data.push(ring);

  function choose(point) {
    if (!point) return;
    chosen = point;
    card.fill(panel, point.wnid);
    ring.x = [point.x];
    ring.y = [point.y];
    const line = charts.colour("--text");
    Plotly.restyle(place, { x: [ring.x], y: [ring.y], "marker.color": line }, [figure.data.length - 1]);
  }

  const shown = () => points.filter((point) => buttons[point.group].getAttribute("aria-pressed") === "true");

  function next(dx, dy) {
    const near = (point) => {
      const [x, y] = [point.x - chosen.x, point.y - chosen.y];
      const along = x * dx + y * dy;
      const aside = Math.abs(x * dy) + Math.abs(y * dx);
      return along > 1e-6 && aside <= 2 * along ? along + 2 * aside : Infinity;
    };
    const ranked = shown().map((point) => [near(point), point]).filter(([cost]) => cost < Infinity);
    return ranked.length ? ranked.reduce((best, one) => (one[0] < best[0] ? one : best))[1] : null;
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  place.addEventListener("keydown", (event) => {
    const direction = arrows[event.key];
    if (!direction) return;
    event.preventDefault();
    choose(chosen ? next(...direction) : shown()[0]);
  });

  function show(visible) {
    visible.forEach((on, at) => {
      buttons[at].setAttribute("aria-pressed", String(on));
      figure.data[at].visible = on;
    });
    Plotly.restyle(place, { visible }, buttons.map((_, at) => at));
  }
  const pressed = (at) => buttons[at].getAttribute("aria-pressed") === "true";
  buttons.forEach((button, at) => button.addEventListener("click", () => {
    show(buttons.map((_, other) => (other === at) !== pressed(other)));
  }));
  for (const button of document.querySelectorAll(".legend [data-show]")) {
    button.addEventListener("click", () => show(buttons.map(() => button.dataset.show === "true")));
  }

  const names = new Map(points.map((point) => [card.data.classes[point.wnid].name, point]));
  document.getElementById("map-names").append(
    ...[...names.keys()].sort().map((name) => Object.assign(document.createElement("option"), { value: name })));
  field.addEventListener("input", () => choose(names.get(field.value)));
  field.addEventListener("change", () => choose(names.get(field.value)
    ?? points.find((point) => card.data.classes[point.wnid].name.toLowerCase().startsWith(field.value.toLowerCase()))));

  document.getElementById("map-reset").addEventListener("click", () => {
    Plotly.relayout(place, { "xaxis.range": [...ranges[0]], "yaxis.range": [...ranges[1]] });
  });

  const first = points[0];
  const touch = !window.matchMedia("(hover: hover)").matches;
  figure.layout.dragmode = touch ? false : "zoom";
  found.drawn
    .then(() => Plotly.addTraces(place, structuredClone(ring)))
    .then(() => Plotly.relayout(place, { dragmode: figure.layout.dragmode }))
    .then(() => {
      const one = (event) => points.find((point) => point.wnid === event.points[0].customdata);
      place.on("plotly_hover", (event) => choose(one(event)));
      place.on("plotly_click", (event) => choose(one(event)));
      choose(first);
      place.dataset.ready = "true";
    });
})();
