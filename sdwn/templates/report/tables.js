"use strict";
// Tables that sort by the buttons in their heads, and filter by a field.
(() => {
  function value(row, column, numeric) {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    if (!numeric) return text.toLowerCase();
    return text === "" ? null : Number(text.replaceAll(",", ""));
  }

  function compare(one, other) {
    return typeof one === "number" ? one - other : one.localeCompare(other, "en");
  }

  function sort(table, head) {
    const heads = [...head.parentNode.cells];
    const column = heads.indexOf(head);
    const numeric = head.dataset.kind === "number";
    // Numbers begin with the largest, names with A.
    const first = numeric ? "descending" : "ascending";
    const second = numeric ? "ascending" : "descending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row, column, numeric), row]);
    rows.sort(([one], [other]) => {
      // What has no value stands last either way.
      if (one === null || other === null) return (one === null) - (other === null);
      return sign * compare(one, other);
    });
    body.append(...rows.map(([, row]) => row));
  }

  function filter(field) {
    const table = document.getElementById(field.dataset.filter);
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = !words.every((word) => row.dataset.search.includes(word));
      shown += !row.hidden;
    }
    const count = document.querySelector(`[data-count="${table.id}"]`);
    const all = table.tBodies[0].rows.length;
    const of = shown === all ? "" : ` of ${all.toLocaleString("en")}`;
    count.textContent = `${shown.toLocaleString("en")}${of} classes`;
  }

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    for (const head of table.tHead.querySelectorAll("th[data-kind]")) {
      head.querySelector("button").addEventListener("click", () => sort(table, head));
    }
  }
  for (const field of document.querySelectorAll("[data-filter]")) {
    field.addEventListener("input", () => filter(field));
  }
})();
