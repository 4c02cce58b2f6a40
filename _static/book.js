/* What is wider than its box can be scrolled with the keyboard: such a box can be focused and has a name. */
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
  const later = () => window.MathJax?.startup?.promise ? window.MathJax.startup.promise.then(mark) : mark();
  window.addEventListener("load", later);
  window.addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);
  document.addEventListener("click", () => setTimeout(mark));
})();
