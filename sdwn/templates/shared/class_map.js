"use strict";
// The map of classes: pointing, tapping and arrow keys choose a circle; buttons, dragging and the
// wheel show a part. `onChoose` is given the circle's link; where links are not to be followed,
// a click chooses as well. Returns the links and a function that chooses one.
function classMap({ follow, onChoose }) {
  const map = document.getElementById("class-map");
  const ring = document.getElementById("ring");
  const WHOLE = [-107, -107, 214, 214];
  // In pixels: how far from a circle's edge one may point.
  const REACH = 24;
  const points = [...map.querySelectorAll("a")].map((link) => {
    const { cx, cy, r } = link.firstElementChild;
    return { link, x: cx.baseVal.value, y: cy.baseVal.value, r: r.baseVal.value };
  });
  let [view, chosen, drag, moved] = [WHOLE, null, null, false];

  function choose(point) {
    if (!point || point === chosen) return;
    chosen?.link.setAttribute("tabindex", "-1");
    chosen = point;
    point.link.setAttribute("tabindex", "0");
    for (const [name, value] of [["cx", point.x], ["cy", point.y], ["r", point.r + 1]]) ring.setAttribute(name, value);
    onChoose(point.link);
  }

  function place(event) {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
    return { x, y };
  }

  // The circle of least cost among those that are not dimmed, or none.
  function least(cost) {
    const ranked = points.filter(({ link }) => !link.closest(".dim")).map((point) => [cost(point), point]);
    const [value, point] = ranked.reduce((one, other) => (other[0] < one[0] ? other : one), [Infinity, null]);
    return value < Infinity ? point : null;
  }

  function nearest(event) {
    const { x, y } = place(event);
    const reach = REACH / map.getScreenCTM().a;
    return least((point) => {
      const apart = Math.hypot(point.x - x, point.y - y) - point.r;
      return apart <= reach ? apart : Infinity;
    });
  }

  function next(dx, dy) {
    return least((point) => {
      const [x, y] = [point.x - chosen.x, point.y - chosen.y];
      const along = x * dx + y * dy;
      const aside = Math.abs(x * dy) + Math.abs(y * dx);
      return along > 1e-6 && aside <= 2 * along ? along + 2 * aside : Infinity;
    });
  }

  function show(x, y, width) {
    const side = Math.min(WHOLE[2], Math.max(12, width));
    const within = (start) => Math.min(-WHOLE[0] - side, Math.max(WHOLE[0], start));
    view = [within(x), within(y), side, side];
    map.setAttribute("viewBox", view.join(" "));
    map.style.touchAction = side < WHOLE[2] ? "none" : "";
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.disabled = button.dataset.zoom !== "in" && side >= WHOLE[2];
    }
  }

  function enlarge(factor, x, y) {
    show(x - (x - view[0]) * factor, y - (y - view[1]) * factor, view[2] * factor);
  }

  function keepInView({ x, y }) {
    const edge = 0.05 * view[2];
    const inside = x > view[0] + edge && x < view[0] + view[2] - edge && y > view[1] + edge && y < view[1] + view[3] - edge;
    if (!inside) show(x - view[2] / 2, y - view[3] / 2, view[2]);
  }

  map.addEventListener("pointermove", (event) => {
    if (!drag) return event.pointerType === "mouse" && choose(nearest(event));
    const scale = map.getScreenCTM().a;
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    moved ||= Math.hypot(dx, dy) > 4;
    if (moved) show(drag.view[0] - dx / scale, drag.view[1] - dy / scale, drag.view[2]);
  });
  map.addEventListener("pointerdown", (event) => {
    moved = false;
    if (view[2] < WHOLE[2]) drag = { x: event.clientX, y: event.clientY, view };
  });
  window.addEventListener("pointerup", () => { drag = null; });
  map.addEventListener("dragstart", (event) => event.preventDefault());
  map.addEventListener("wheel", (event) => {
    // The page scrolls as always; with Ctrl, as for enlarging a page, the map grows.
    if (!event.ctrlKey) return;
    event.preventDefault();
    const { x, y } = place(event);
    enlarge(event.deltaY < 0 ? 0.8 : 1.25, x, y);
  }, { passive: false });

  map.addEventListener("focusin", (event) => choose(points.find(({ link }) => link === event.target)));
  map.addEventListener("click", (event) => {
    if (moved) return event.preventDefault();
    const point = nearest(event);
    // A finger covers many circles: the first tap tells which, the link in the card opens it.
    if (!follow || event.pointerType === "touch") event.preventDefault();
    else if (point && !event.target.closest("a")) point.link.dispatchEvent(new MouseEvent("click", { bubbles: false, cancelable: true }));
    choose(point);
  });

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  map.addEventListener("keydown", (event) => {
    const direction = arrows[event.key];
    if (!direction) return;
    event.preventDefault();
    const point = next(...direction);
    if (!point) return;
    choose(point);
    keepInView(point);
    point.link.focus({ preventScroll: true });
  });

  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => {
      const [x, y] = chosen ? [chosen.x, chosen.y] : [0, 0];
      if (button.dataset.zoom === "all") show(...WHOLE);
      else enlarge(button.dataset.zoom === "in" ? 0.6 : 1 / 0.6, x, y);
    });
  }

  // One stop for Tab; from there the arrow keys.
  for (const { link } of points) link.setAttribute("tabindex", "-1");
  choose(least(() => 0));
  show(...WHOLE);
  map.dataset.ready = "true";
  return { links: points.map(({ link }) => link), choose: (link) => choose(points.find((point) => point.link === link)) };
}
