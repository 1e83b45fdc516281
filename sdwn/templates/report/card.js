"use strict";
// A class's card: its name, its rate, its images. Fills a panel, or opens as a dialog.
const card = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLUMNS = 5;

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function sheet(wnid, known) {
    const shown = Math.min(known.marks.length, 10);
    const rows = Math.max(1, Math.ceil(shown / COLUMNS));
    const label = `${shown} images of ${known.name}`;
    const made = element("div", { className: "sheet", role: "img", ariaLabel: label });
    for (let at = 0; at < shown; at += 1) {
      const cell = element("span", { className: known.marks[at] ? "right" : "" });
      const row = Math.floor(at / COLUMNS);
      cell.style.backgroundImage = `url("${data.sheets[wnid]}")`;
      cell.style.backgroundSize = `${100 * COLUMNS}% ${100 * rows}%`;
      cell.style.backgroundPosition =
        `${(100 * (at % COLUMNS)) / (COLUMNS - 1)}% ${rows > 1 ? (100 * row) / (rows - 1) : 0}%`;
      made.append(cell);
    }
    return made;
  }

  function fill(panel, wnid) {
    const known = data.classes[wnid];
    const black = known.black ? `, ${known.black} black` : "";
    panel.replaceChildren(
      element("h3", { textContent: known.name }),
      element("p", { className: "quiet", textContent: [known.synset, wnid, known.group].filter(Boolean).join(" · ") }),
      element("p", { className: "rate" },
        element("strong", { textContent: `${known.correct} of ${known.images}` }),
        element("span", { textContent: `correct; ${known.correct_top5} in the top 5${black}` })),
      sheet(wnid, known),
      element("p", { className: "prompt", textContent: known.prompt }),
    );
  }

  const dialog = document.getElementById("dialog");
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-class]");
    if (!button) return;
    fill(dialog.querySelector(".card"), button.dataset.class);
    dialog.showModal();
  });
  return { data, fill };
})();
