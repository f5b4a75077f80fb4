for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const th = button.parentElement, row = th.parentElement, body = row.closest("table").tBodies[0];
    const up = th.getAttribute("aria-sort") !== "ascending", i = th.cellIndex;
    for (const other of row.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = tr => Number(tr.cells[i].dataset.v);
    body.append(...[...body.rows].sort((a, b) => up ? value(a) - value(b) : value(b) - value(a)));
  });
}
