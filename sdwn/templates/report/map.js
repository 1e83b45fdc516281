"use strict";
// The report's map: what is chosen, by a search as well, shows its card; the legend dims groups.
(() => {
  if (!document.getElementById("map-card")) return;
  const panel = document.getElementById("map-card");
  const field = document.getElementById("map-find");
  const groups = [...document.querySelectorAll("#class-map g")];
  const buttons = [...document.querySelectorAll(".legend [aria-pressed]")];
  const { links, choose } = classMap({ follow: false, onChoose: (link) => card.fill(panel, link.dataset.wnid) });

  function toggle(at, on) {
    buttons[at].setAttribute("aria-pressed", String(on));
    groups[at].classList.toggle("dim", !on);
  }
  buttons.forEach((button, at) => button.addEventListener("click", () => toggle(at, button.getAttribute("aria-pressed") !== "true")));
  for (const button of document.querySelectorAll(".legend [data-show]")) {
    button.addEventListener("click", () => buttons.forEach((_, at) => toggle(at, button.dataset.show === "true")));
  }

  const names = links.map((link) => link.dataset.name).sort();
  document.getElementById("map-names").append(
    ...names.map((name) => Object.assign(document.createElement("option"), { value: name })));
  const find = (fits) => choose(links.find((link) => fits(link.dataset.name.toLowerCase(), field.value.toLowerCase())));
  field.addEventListener("input", () => find((name, typed) => name === typed));
  field.addEventListener("change", () => find((name, typed) => typed && name.startsWith(typed)));
})();
