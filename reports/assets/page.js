// A click on a heading sorts the rows of each section by that column; a second click turns the order round.
const key = (row, at) => {
  const cell = row.cells[at];
  return cell.dataset.value === undefined ? (at ? null : cell.textContent) : Number(cell.dataset.value);
};
const sort = (heading) => {
  const table = heading.closest("table");
  const at = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") ? heading.getAttribute("aria-sort") === "ascending" : at > 0;
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter((row) => !row.classList.contains("section"));
    rows.sort((one, other) => {
      const [a, b] = [key(one, at), key(other, at)];
      if (a === null || b === null) return (a === null) - (b === null); // a hole is always last
      const order = typeof a === "number" ? a - b : a.localeCompare(b);
      return down ? -order : order;
    });
    body.append(...rows);
  }
};
document.querySelectorAll("th[data-sort]").forEach((heading) => {
  heading.tabIndex = 0;
  heading.addEventListener("click", () => sort(heading));
  heading.addEventListener("keydown", (event) => event.key === "Enter" && sort(heading));
});
