"use strict";
// Unknown values are last in both directions.
function sortBy(button) {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const numeric = head.classList.contains("num");
  const first = numeric ? "descending" : "ascending", other = numeric ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  const key = (row) => {
    const cell = row.cells[head.cellIndex], text = cell.dataset.value ?? cell.textContent.trim();
    return numeric ? (text === "" ? NaN : Number(text)) : text;
  };
  const compare = (a, b) => {
    if (!numeric) return sign * a.localeCompare(b, "en");
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
    return sign * (a - b);
  };
  const rows = Array.from(body.rows, (row) => [key(row), row]).sort((a, b) => compare(a[0], b[0]));
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  body.append(...rows.map((pair) => pair[1]));
  limit(table);
}

function limit(table) {
  const button = document.querySelector(`.more[aria-controls="${table.id}"]`);
  if (!button) return;
  const rows = Array.from(table.tBodies[0].rows), all = button.getAttribute("aria-expanded") === "true";
  const most = Number(button.dataset.shown);
  rows.forEach((row, i) => { row.hidden = !all && i >= most; });
  button.textContent = all ? `Show ${most} of ${rows.length}` : `Show all ${rows.length}`;
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sortBy(button));

for (const button of document.querySelectorAll(".more")) {
  const table = document.getElementById(button.getAttribute("aria-controls"));
  button.hidden = false;
  limit(table);
  button.addEventListener("click", () => {
    button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") !== "true"));
    limit(table);
  });
}
