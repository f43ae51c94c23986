"use strict";
// Everything can be read without this script; it adds sorting, a filter and a button that copies.

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

// Numbers by value, texts by alphabet; what is missing stays at the end in both directions.
function compare(a, b, direction) {
  const [x, y] = [a, b].map((cell) => cell.dataset.value ?? (cell.matches(".n") ? null : cell.textContent));
  if (x === null || y === null) return (x === null) - (y === null);
  const order = a.matches(".n") ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true });
  return direction === "ascending" ? order : -order;
}

function sort(table, header) {
  const first = header.dataset.first ?? "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const direction = header.getAttribute("aria-sort") === first ? other : first;
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  const [column, body] = [header.cellIndex, table.tBodies[0]];
  body.append(...[...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], direction)));
}

function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  const kinds = [...new Set(rows.map((row) => row.dataset.kind))];
  const select = document.createElement("select");
  select.append(...["all", ...kinds].map((kind) => new Option(kind)));
  const label = document.createElement("label");
  label.append("Kind ", select);
  const shown = document.createElement("span");
  shown.setAttribute("role", "status");
  const apply = () => {
    for (const row of rows) row.hidden = select.value !== "all" && row.dataset.kind !== select.value;
    shown.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  select.addEventListener("change", apply);
  apply();
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(label, shown);
  table.parentElement.before(tools);
}

// The clipboard is closed to pages from a disk in some browsers: the text is selected in any case.
async function copy(pre, made) {
  getSelection().selectAllChildren(pre);
  try {
    await navigator.clipboard.writeText(pre.textContent);
    made.textContent = "Copied";
  } catch {
    made.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }
}

const table = document.getElementById("candidates-table");
if (table) {
  for (const th of table.tHead.rows[0].cells) th.replaceChildren(button(th.textContent, () => sort(table, th)));
  addFilter(table);
}
for (const box of document.querySelectorAll(".copy")) {
  const made = button("Copy", () => copy(box.querySelector("pre"), made));
  box.append(made);
}
