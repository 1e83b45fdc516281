"use strict";
// Keys, copying, and what is said when an answer comes or fails. Without it all pages work as links.
(() => {
  const field = document.getElementById("q");
  const keys = document.getElementById("keys");
  const results = document.getElementById("results");
  const typing = (place) => place.closest("input, textarea, select, [contenteditable]");

  // What only works with scripts has its place, and shows itself now.
  document.documentElement.classList.add("scripted");
  document.querySelector("[data-opens]")?.addEventListener("click", () => keys.showModal());
  keys?.addEventListener("click", (event) => {
    if (event.target === keys) keys.close();
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copies]");
    if (!button) return;
    button.textContent = (await copied(button)) ? "Copied" : "Press Ctrl-C";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });

  async function copied(button) {
    try {
      await navigator.clipboard.writeText(button.dataset.copies);
      return true;
    } catch {
      // Off this machine a page without TLS has no clipboard: the text is marked instead.
      window.getSelection().selectAllChildren(button.previousElementSibling);
      return false;
    }
  }

  // From picture to picture: the nearest one in the key's direction.
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function middle(element) {
    const box = element.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  }

  function neighbour(from, all, [dx, dy]) {
    const [x, y] = middle(from);
    let best = null;
    let least = Infinity;
    for (const one of all) {
      const [ox, oy] = middle(one);
      const along = (ox - x) * dx + (oy - y) * dy;
      const aside = Math.abs((ox - x) * dy) + Math.abs((oy - y) * dx);
      // To the left and right one goes on into the next row, as one reads.
      if (along <= 1 || (dx && aside > 20)) continue;
      const cost = along + 3 * aside;
      if (cost < least) [best, least] = [one, cost];
    }
    if (best || !dx) return best;
    return all[all.indexOf(from) + dx] ?? null;
  }

  function move(event) {
    const all = [...document.querySelectorAll("[data-grid] a")];
    if (!all.length) return turn(event);
    const from = document.activeElement.closest("[data-grid] a");
    // Before a picture is chosen, up and down scroll as always.
    if (!from && event.key === "ArrowUp") return;
    const target = from ? neighbour(from, all, directions[event.key]) : firstSeen(all);
    if (!target && from && event.key === "ArrowUp") return field?.focus();
    if (!target) return;
    event.preventDefault();
    target.focus({ preventScroll: true });
    (target.closest("li") ?? target).scrollIntoView({ block: "nearest" });
  }

  function firstSeen(all) {
    const below = document.querySelector(".top").getBoundingClientRect().bottom;
    return all.find((one) => one.getBoundingClientRect().top >= below) ?? all[0];
  }

  function turn(event) {
    if (event.key === "ArrowLeft") follow("a[rel=prev]");
    if (event.key === "ArrowRight") follow("a[rel=next]");
  }

  function follow(selector) {
    document.querySelector(selector)?.click();
  }

  // Up from an image is its concept; up from there is what this tab searched for last.
  function back() {
    const up = document.querySelector("a[data-up]");
    if (up) return up.click();
    if (!results) location.assign(`/${sessionStorage.getItem("search") ?? ""}`);
  }

  const strokes = {
    "/": (event) => { event.preventDefault(); field?.focus(); field?.select(); },
    "?": () => keys?.showModal(),
    j: () => follow("a[rel=next]"),
    k: () => follow("a[rel=prev]"),
    Escape: back,
  };

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("dialog[open]")) return;
    if (typing(event.target)) {
      if (event.target !== field) return;
      if (event.key === "Escape") field.blur();
      if (event.key === "ArrowDown") move(event);
      return;
    }
    if (directions[event.key]) move(event);
    else strokes[event.key]?.(event);
  });

  // Searching as one types.
  if (!results) return;
  window.addEventListener("pagehide", () => sessionStorage.setItem("search", location.search));
  const trouble = document.getElementById("trouble");
  const said = document.getElementById("said");

  function showTrouble(message, event) {
    trouble.querySelector("p").textContent = message;
    trouble.querySelector("a").href = event?.detail.pathInfo?.finalRequestPath ?? location.href;
    trouble.hidden = !message;
  }
  document.addEventListener("htmx:beforeRequest", () => results.setAttribute("aria-busy", "true"));
  document.addEventListener("htmx:afterRequest", () => results.removeAttribute("aria-busy"));
  document.addEventListener("htmx:afterSwap", () => {
    showTrouble("");
    said.textContent = results.querySelector("[data-said]")?.textContent ?? "";
    const brand = document.querySelector(".brand").dataset;
    document.title = `${field.value.trim() || brand.all} · ${brand.name}`;
  });
  document.addEventListener("htmx:responseError", (event) => {
    const { status } = event.detail.xhr;
    showTrouble(status === 403 ? "This page needs the address that sdwn printed, with its token." : `The search failed with error ${status}.`, event);
  });
  for (const failed of ["htmx:sendError", "htmx:timeout"]) {
    document.addEventListener(failed, (event) => showTrouble("No answer: is sdwn browse, or the tunnel to it, still running?", event));
  }
})();
