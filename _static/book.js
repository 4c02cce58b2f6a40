/* Wide formulas and tables fit their column, what cannot can be scrolled by keys, and every control has a name. */
(() => {
  const boxes = ".bd-content pre, .bd-content table, .bd-content div.math, .bd-content mjx-container[display=true], .bd-content .output";
  const mark = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const wide = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (wide && box.tabIndex < 0) {
        box.tabIndex = 0;
        if (!box.closest("table") && !box.hasAttribute("role")) {
          box.setAttribute("role", "group");
          box.setAttribute("aria-label", "wide content, scrolls sideways");
        }
      }
    }
  };
  // A table fades where it goes on.
  const fade = ({ target }) => {
    target.classList.toggle("more", target.scrollWidth - target.scrollLeft > target.clientWidth + 1);
  };
  // Formulas and tables that are wider than the column get smaller, as far as they can still be read.
  const fit = () => {
    for (const formula of document.querySelectorAll(".bd-content mjx-container[display=true]")) {
      formula.dataset.size ??= formula.style.fontSize;  // MathJax's own
      formula.style.fontSize = formula.dataset.size;
      const ratio = formula.clientWidth / formula.scrollWidth;
      if (formula.clientWidth && ratio < 1) {
        const size = parseFloat(getComputedStyle(formula).fontSize);
        formula.style.fontSize = `${Math.max(12, size * ratio * 0.98)}px`;
      }
    }
    for (const table of document.querySelectorAll(".bd-content table")) {
      const rows = [...table.rows].map(row => [...row.cells]);
      const long = new Set(rows.flatMap(cells => cells.map((c, i) => c.tagName === "TD" && c.innerText.length > 22 ? i : -1)));
      for (const cells of rows) cells.forEach((c, i) => c.classList.toggle("words", long.has(i)));
      table.classList.remove("tight");
      if (table.clientWidth && table.scrollWidth > table.clientWidth + 1) table.classList.add("tight");
      table.style.removeProperty("--shown");
      if (table.clientWidth && table.scrollWidth > table.clientWidth + 1) {
        table.style.setProperty("--shown", `calc(${table.clientWidth}px - 1.5rem)`);
        table.addEventListener("scroll", fade, { passive: true });
      }
      fade({ target: table });
    }
  };
  const settle = () => { fit(); mark(); };
  // Names for what the theme leaves without one, or with one that its text does not bear out.
  const name = () => {
    document.querySelectorAll(".bd-content details.hide > summary").forEach(s => s.removeAttribute("aria-label"));
    document.querySelectorAll(".search-button-field").forEach(b => b.removeAttribute("aria-label"));
    document.querySelectorAll(".theme-switch-button i, .theme-switch-button svg").forEach(i => {
      i.removeAttribute("title");
      i.setAttribute("aria-hidden", "true");
      i.querySelectorAll("title").forEach(title => title.remove());
    });
    document.querySelectorAll(".citation[role]").forEach(entry => entry.setAttribute("role", "listitem"));
    document.querySelectorAll(".bd-content th:empty").forEach(th => th.setAttribute("role", "presentation"));
    document.querySelectorAll(".bd-sidebar-primary summary").forEach(s => {
      const link = s.closest("li")?.querySelector("a");
      s.setAttribute("aria-label", `Pages of ${link ? link.innerText.trim() : "this chapter"}`);
    });
    const side = document.querySelector(".bd-sidebar-primary");
    if (side && !side.hasAttribute("role")) {
      side.setAttribute("role", "region");
      side.setAttribute("aria-label", "Book");
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    name();
    const icons = new MutationObserver(name);  // the icons are put in later
    document.querySelectorAll(".theme-switch-button").forEach(b => icons.observe(b, { childList: true }));
  });
  window.addEventListener("load", () => setTimeout(name));
  const later = () => window.MathJax?.startup?.promise ? window.MathJax.startup.promise.then(settle) : settle();
  window.addEventListener("load", later);
  window.addEventListener("resize", settle);
  document.addEventListener("toggle", settle, true);
  document.addEventListener("click", () => setTimeout(settle));
})();
