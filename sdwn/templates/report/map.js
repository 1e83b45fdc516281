"use strict";
// The map: pointing, tapping, arrow keys and a search all show a class's card; the legend toggles.
(() => {
  const map = document.getElementById("map-chart");
  if (!map) return;
  const panel = document.getElementById("map-card");
  const field = document.getElementById("map-find");
  const ring = document.getElementById("ring");
  const WHOLE = [-107, -107, 214, 214];
  // In pixels: how far from a circle's edge one may point.
  const REACH = 24;
  const groups = [...map.querySelectorAll("g")];
  const buttons = [...document.querySelectorAll(".legend [aria-pressed]")];
  const points = [...map.querySelectorAll("[data-wnid]")].map((circle) => ({
    wnid: circle.dataset.wnid,
    group: groups.indexOf(circle.parentNode),
    x: circle.cx.baseVal.value, y: circle.cy.baseVal.value, r: circle.r.baseVal.value,
  }));
  const names = new Map(points.map((point) => [card.data.classes[point.wnid].name, point]));
  let [view, chosen, drag, moved] = [WHOLE, null, null, false];

  const isOn = (at) => buttons[at].getAttribute("aria-pressed") === "true";
  const shown = () => points.filter((point) => isOn(point.group));

  function choose(point) {
    if (!point || point === chosen) return;
    chosen = point;
    card.fill(panel, point.wnid);
    for (const [name, value] of [["cx", point.x], ["cy", point.y], ["r", point.r + 1]]) ring.setAttribute(name, value);
  }

  // The cheapest of the circles that are shown, or none.
  function least(cost) {
    const ranked = shown().map((point) => [cost(point), point]);
    const [value, point] = ranked.reduce((one, other) => (other[0] < one[0] ? other : one), [Infinity, null]);
    return value < Infinity ? point : null;
  }

  function pointed(event) {
    const scale = map.getScreenCTM();
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(scale.inverse());
    return least((point) => {
      const apart = Math.hypot(point.x - x, point.y - y) - point.r;
      return apart <= REACH / scale.a ? apart : Infinity;
    });
  }

  function look(x, y, width) {
    const side = Math.min(WHOLE[2], Math.max(12, width));
    const within = (start) => Math.min(-WHOLE[0] - side, Math.max(WHOLE[0], start));
    view = [within(x - side / 2), within(y - side / 2), side, side];
    map.setAttribute("viewBox", view.join(" "));
    map.style.touchAction = side < WHOLE[2] ? "none" : "";
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  map.addEventListener("keydown", (event) => {
    const direction = arrows[event.key];
    if (!direction) return;
    event.preventDefault();
    choose(least((point) => {
      const [x, y] = [point.x - chosen.x, point.y - chosen.y];
      const along = x * direction[0] + y * direction[1];
      const aside = Math.abs(x * direction[1] + y * direction[0]);
      return along > 1e-6 && aside <= 2 * along ? along + 2 * aside : Infinity;
    }));
  });

  map.addEventListener("pointerdown", (event) => {
    moved = false;
    if (view[2] < WHOLE[2]) drag = { x: event.clientX, y: event.clientY, view };
  });
  map.addEventListener("pointermove", (event) => {
    if (!drag) return choose(event.pointerType === "mouse" ? pointed(event) : null);
    const scale = map.getScreenCTM().a;
    const [dx, dy] = [(event.clientX - drag.x) / scale, (event.clientY - drag.y) / scale];
    moved ||= Math.hypot(dx, dy) * scale > 4;
    if (moved) look(drag.view[0] - dx + view[2] / 2, drag.view[1] - dy + view[2] / 2, view[2]);
  });
  window.addEventListener("pointerup", () => { drag = null; });
  map.addEventListener("click", (event) => { if (!moved) choose(pointed(event)); });

  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => look(chosen.x, chosen.y, view[2] * Number(button.dataset.zoom)));
  }

  function toggle(at, on) {
    buttons[at].setAttribute("aria-pressed", String(on));
    groups[at].style.display = on ? "" : "none";
  }
  buttons.forEach((button, at) => button.addEventListener("click", () => toggle(at, !isOn(at))));
  for (const button of document.querySelectorAll(".legend [data-show]")) {
    button.addEventListener("click", () => buttons.forEach((_, at) => toggle(at, button.dataset.show === "true")));
  }

  document.getElementById("map-names").append(
    ...[...names.keys()].sort().map((name) => Object.assign(document.createElement("option"), { value: name })));
  field.addEventListener("input", () => choose(names.get(field.value)));
  field.addEventListener("change", () => choose(names.get(field.value)
    ?? points.find(({ wnid }) => card.data.classes[wnid].name.toLowerCase().startsWith(field.value.toLowerCase()))));

  choose(points[0]);
  map.dataset.ready = "true";
})();
