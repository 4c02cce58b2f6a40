/* What is wider than its box can be scrolled with the keyboard: such a box can be focused and has a name. */
(() => {
  const boxes = ".bd-content pre, .bd-content table, .bd-content div.math, .bd-content mjx-container[display=true], .bd-content .output";
  const mark = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const wide = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
      if (wide && !box.hasAttribute("tabindex")) {
        box.tabIndex = 0;
        if (!box.closest("table") && !box.hasAttribute("role")) {
          box.setAttribute("role", "group");
          box.setAttribute("aria-label", "wide content, scrolls sideways");
        }
      }
    }
  };
  const later = () => window.MathJax?.startup?.promise ? window.MathJax.startup.promise.then(mark) : mark();
  window.addEventListener("load", later);
  window.addEventListener("resize", mark);
  document.addEventListener("toggle", mark, true);
})();
