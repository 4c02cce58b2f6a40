// What all figures to touch share: the frame, sliders, points, curves, text, colours, keys. Needs JSXGraph (JXG).
(function () {
  "use strict";
  const L = (window.lossbookTouch = window.lossbookTouch || {});

  // ---------------------------------------------------------------- numbers, as lossbook computes them
  L.softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
  L.sigmoid = (x) => (x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x)));
  L.logSumExp = (values) => {
    const top = Math.max(...values);
    return Number.isFinite(top) ? top + Math.log(values.reduce((sum, v) => sum + Math.exp(v - top), 0)) : top;
  };
  L.softmax = (values) => {
    const all = L.logSumExp(values);
    return values.map((v) => Math.exp(v - all));
  };
  L.range = (start, end, n) => Array.from({ length: n }, (_, i) => start + ((end - start) * i) / (n - 1));
  L.clip = (x, low, high) => Math.min(Math.max(x, low), high);

  // Colour and line of each loss, as in lossbook.plotting.LOSS.
  L.looks = {
    "cross-entropy": ["orange", "-"], BCE: ["orange", "-"], "normalised softmax": ["orange", "-."],
    "multi-label softmax": ["blue", "-"],
    "focal loss": ["green", "-"], EMO: ["green", "-"], "EMO + CE": ["blue", "--"],
    "soft truncation": ["magenta", "-"], "hard truncation": ["magenta", "--"], EXACT: ["magenta", "-"],
    "AM-softmax": ["violet", "-"], ArcFace: ["violet", "--"],
  };
  L.color = (name) => `var(--touch-${L.looks[name] ? L.looks[name][0] : name})`;
  L.dash = (name) => ({ "--": 2, ":": 1, "-.": 5 })[(L.looks[name] || [])[1]] || 0;
  const minus = (text) => text.replace(/-(?=[\d.])/g, "−");
  L.number = (x, digits = 2) => minus(x.toFixed(digits)).replace(/^−(0(?:\.0*)?)$/, "$1");
  // two digits that count, also of small numbers
  L.small = (x) => {
    if (x === 0) return "0";
    if (Math.abs(x) < 0.001) return minus(x.toExponential(0)).replace(/e[−-](\d+)/, (_, n) => ` × 10${raised(n)}`);
    return L.number(x, Math.abs(x) < 0.1 ? 3 : 2);
  };
  const raised = (n) => "⁻" + [...n].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("");
  L.percent = (x) => (x > 0 && x < 0.001 ? "< 0.1 %" : x > 0.999 && x < 1 ? "> 99.9 %" : `${(100 * x).toFixed(1)} %`);

  // ---------------------------------------------------------------- the frame
  const make = (tag, name, parent, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  let count = 0;

  // A figure: {controls, state, draw(panel), says(state)} and the axes' ranges x and y, or several panels, each with
  // its ranges and its draw. What depends on the state is given as functions, which are read again after each change.
  // `before(state)` may put what is slow to compute into the state first.
  L.figures = L.figures || {};
  L.define = (name, figure) => {
    L.figures[name] = figure;
    const now = () => L.mountAll();
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", now);
    else [0, 50, 250, 1000, 3000].forEach((wait) => setTimeout(now, wait)); // a notebook shows its output later
  };

  class Stage {
    constructor(root, figure) {
      this.figure = figure;
      this.state = structuredClone(figure.state);
      this.updates = [];
      this.live = make("div", "touch-live", root);
      this.controls = make("div", "touch-controls", this.live);
      (figure.controls || []).forEach((c) => this.addControl(c));
      if (figure.before) figure.before(this.state);
      const panels = make("div", `touch-panels${figure.stacked ? " touch-stacked" : ""}`, this.live);
      this.after = make("div", "", this.live);
      this.panels = (figure.panels || [figure]).map((part) => new Panel(this, part, panels));
      this.says = make("p", "touch-says", this.live);
      this.says.setAttribute("aria-live", "polite");
      const reset = make("button", "touch-reset", this.live, "Reset");
      reset.type = "button";
      reset.addEventListener("click", () => this.set(structuredClone(figure.state)));
      this.update();
    }

    set(changes) {
      Object.assign(this.state, changes);
      this.update();
    }

    update() {
      if (this.figure.before) this.figure.before(this.state);
      this.updates.forEach((f) => f());
      this.panels.forEach((panel) => panel.board.fullUpdate());
      const text = this.figure.says(this.state);
      if (this.says.textContent !== text) this.says.textContent = text;
    }

    addControl(c) {
      if (c.choices) {
        const group = make("div", "touch-switch", this.controls);
        group.setAttribute("role", "radiogroup");
        group.setAttribute("aria-label", c.label);
        if (c.title) make("span", "", group, c.title);
        const name = `touch-${c.name}-${(count += 1)}`;
        c.choices.forEach(([value, label]) => {
          const row = make("label", "", group), input = make("input", "", row);
          Object.assign(input, { type: "radio", name, value });
          row.append(label);
          input.addEventListener("change", () => this.set({ [c.name]: value }));
          this.updates.push(() => (input.checked = this.state[c.name] === value));
        });
        return;
      }
      const row = make("label", "touch-control", this.controls);
      const label = make("span", "", row, c.label), shown = make("b", "", row), input = make("input", "", row);
      if (c.color) {
        row.style.setProperty("--touch-accent", L.color(c.color));
        label.style.color = L.color(c.color);
      }
      const show = c.show || ((v) => L.number(v, 1));
      Object.assign(input, { type: "range", min: c.min, max: c.max, step: c.step });
      input.dataset.name = c.name;
      input.setAttribute("aria-label", c.label);
      input.addEventListener("input", () => this.set({ [c.name]: Number(input.value) }));
      this.updates.push(() => {
        const value = this.state[c.name];
        input.value = value;
        shown.textContent = show(value, this.state);
        input.setAttribute("aria-valuetext", show(value, this.state));
      });
    }

    // Horizontal bars below the plot: rows of {label, color, value(state) in [0, 1], show(value)}.
    bars(title, rows) {
      const box = make("div", "touch-bars", this.after);
      make("span", "touch-title", box, title);
      rows.forEach(({ label, color, value, show = L.percent }) => {
        make("span", "", box, label).style.color = L.color(color);
        const bar = make("div", "touch-bar", box), fill = make("i", "", bar), number = make("span", "", box);
        fill.style.background = L.color(color);
        this.updates.push(() => {
          const v = value(this.state);
          fill.style.width = `${100 * L.clip(v, 0, 1)}%`;
          number.textContent = show(v, this.state);
        });
      });
    }
  }

  class Panel {
    constructor(stage, part, parent) {
      this.stage = stage;
      this.part = part;
      this.state = stage.state;
      this.box = make("div", "touch-board", parent);
      this.box.id = `touch-board-${Date.now().toString(36)}-${(count += 1)}`;
      if (part.widest) this.box.style.maxWidth = `${part.widest}px`;
      const width = this.box.clientWidth || Math.min(560, part.widest || 560);
      this.size(width);
      this.board = JXG.JSXGraph.initBoard(this.box.id, {
        boundingbox: this.bounds(width), axis: false, keepaspectratio: false, showCopyright: false,
        showNavigation: false, showInfobox: false, pan: { enabled: false }, zoom: { enabled: false, wheel: false },
        keyboard: { enabled: false }, resize: { enabled: false }, selection: { enabled: false }, renderer: "svg",
        title: part.words, registerEvents: { keyboard: false, resize: false, wheel: false },
      });
      this.box.classList.remove("jxgbox");
      this.box.setAttribute("role", "group");
      part.draw(this);
      new ResizeObserver(() => this.resize()).observe(this.box);
    }

    size(width) {
      const { height = 300, square, x, y } = this.part, [top, right, bottom, left] = this.margins;
      this.height = square
        ? Math.round(((width - left - right) * (y[1] - y[0])) / (x[1] - x[0]) + top + bottom)
        : typeof height === "function" ? height(width) : height;
      this.width = width;
      this.box.style.height = `${this.height}px`;
    }

    get margins() {
      return this.part.margins || [24, 12, 42, 32];
    }

    // The part of the plane that is shown: the ranges of the axes, and margins in pixels around them.
    bounds(width) {
      const { x, y } = this.part, [top, right, bottom, left] = this.margins;
      const dx = (x[1] - x[0]) / (width - left - right), dy = (y[1] - y[0]) / (this.height - top - bottom);
      return [x[0] - left * dx, y[1] + top * dy, x[1] + right * dx, y[0] - bottom * dy];
    }

    resize() {
      const width = this.box.clientWidth;
      if (!width || width === this.width) return;
      this.size(width);
      this.board.resizeContainer(width, this.height, true, true);
      this.board.setBoundingBox(this.bounds(width), false);
      this.stage.update();
    }

    // x and y for each pixel
    get unit() {
      return [1 / this.board.unitX, 1 / this.board.unitY];
    }

    // A point that can be dragged or moved with the arrow keys. `at` gives its place, `move` takes the wanted one,
    // `says` is what a screen reader hears; `axis` is "x", "y" or "xy" and says along what the keys move it. With
    // `turn` the keys turn it by degrees instead, left and up against the clock.
    handle({ at, move, turn, label, says, color = "blue", axis = "xy", step, size = 8, face = "o" }) {
      const point = this.board.create("point", at(this.state), {
        name: "", withLabel: false, size, face, fillColor: L.color(color), strokeColor: "none", strokeWidth: 20,
        highlight: false, showInfobox: false, layer: 9, tabindex: 0, cssClass: "touch-handle",
        highlightCssClass: "touch-handle",
      });
      const node = point.rendNode, { x, y } = this.part;
      node.classList.add("touch-handle");
      node.style.color = L.color(color);
      node.setAttribute("tabindex", "0");
      node.setAttribute("role", "slider");
      node.setAttribute("aria-label", label);
      const go = (px, py) => {
        move(this.state, px, py);
        this.stage.set({});
      };
      point.on("drag", () => go(point.X(), point.Y()));
      const steps = step || [(x[1] - x[0]) / 50, (y[1] - y[0]) / 50];
      const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
      node.addEventListener("keydown", (event) => {
        if (!keys[event.key] || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        event.stopPropagation();
        const n = event.shiftKey ? 5 : 1;
        let [dx, dy] = keys[event.key];
        if (turn) {
          turn(this.state, 2 * n * (dy - dx));
          this.stage.set({});
          return;
        }
        if (axis === "x") [dx, dy] = [dx + dy, 0];
        if (axis === "y") [dx, dy] = [0, dx + dy];
        const [px, py] = at(this.state);
        go(px + n * dx * steps[0], py + n * dy * steps[1]);
      });
      this.stage.updates.push(() => {
        const place = at(this.state), along = axis === "y" ? 1 : 0, range = along ? y : x;
        point.setPositionDirectly(JXG.COORDS_BY_USER, place);
        node.setAttribute("aria-valuenow", place[along].toFixed(3));
        node.setAttribute("aria-valuemin", range[0]);
        node.setAttribute("aria-valuemax", range[1]);
        node.setAttribute("aria-valuetext", says(this.state));
      });
      return point;
    }

    // A curve through the points that `points(state)` gives as [xs, ys]; NaN lifts the pen.
    curve(points, { color = "ink", width = 2.5, dash = 0, fill = 0, opacity = 1, layer, arrow = false } = {}) {
      const read = () => points(this.state).map((values) => values.slice());
      const pick = (value) => (typeof value === "function" ? () => value(this.state) : value);
      const curve = this.board.create("curve", read(), {
        strokeColor: L.color(color), strokeWidth: pick(width), dash, strokeOpacity: pick(opacity), highlight: false,
        fixed: true, lineCap: "round", fillColor: fill ? L.color(color) : "none", fillOpacity: pick(fill),
        layer: layer || (fill ? 2 : 5), lastArrow: arrow ? { type: 2, size: arrow === true ? 4 : arrow } : false,
      });
      curve.updateDataArray = function () {
        [this.dataX, this.dataY] = read();
      };
      return curve;
    }

    // A curve in the colour and the line of a loss.
    loss(name, points, options = {}) {
      return this.curve(points, { color: name, dash: L.dash(name), ...options });
    }

    // Text at a place; both may depend on the state.
    text(at, text, { color = "ink", size = 14, anchor = "left", bold = false, vertical = "middle" } = {}) {
      const place = () => (typeof at === "function" ? at(this.state) : at);
      const says = () => String(typeof text === "function" ? text(this.state) : text);
      return this.board.create("text", [() => place()[0], () => place()[1], says], {
        display: "internal", fontSize: size, strokeColor: L.color(color), fixed: true, anchorY: vertical,
        anchorX: typeof anchor === "function" ? () => anchor(this.state) : anchor,
        highlight: false, parse: false, useASCIIMathML: false, useMathJax: false, layer: 8,
        cssClass: bold ? "touch-text touch-bold" : "touch-text",
      });
    }

    // Axes along the lower and the left edge of the ranges, with numbers and titles.
    axes({ xTicks = [], yTicks = [], xTitle, yTitle, base = true }) {
      const { x, y } = this.part, of = (t) => (Array.isArray(t) ? t : [t, minus(String(t))]);
      if (base) this.curve(() => [x, [y[0], y[0]]], { color: "faint", width: 1.2 });
      xTicks.map(of).forEach(([value, label]) => {
        this.text(() => [value, y[0] - 13 * this.unit[1]], label, { size: 13, anchor: "middle" });
        this.curve(() => [[value, value], [y[0], y[0] - 4 * this.unit[1]]], { color: "faint", width: 1.2 });
      });
      yTicks.map(of).forEach(([value, label]) => {
        const says = typeof label === "function" ? () => minus(String(label(this.state))) : label;
        this.text(() => [x[0] - 6 * this.unit[0], value], says, { size: 13, anchor: "right" });
        this.curve(() => [x, [value, value]], { color: "grid", width: 1, layer: 1 });
      });
      if (xTitle) this.text(() => [x[1], y[0] - 31 * this.unit[1]], xTitle, { size: 13, anchor: "right" });
      if (yTitle) {
        this.text(() => [x[0] - (this.margins[3] - 4) * this.unit[0], y[1] + 14 * this.unit[1]], yTitle, { size: 13 });
      }
    }
  }

  // ---------------------------------------------------------------- light and dark, whoever shows the page
  const scheme = (root) => {
    const page = document.documentElement, theme = page.dataset.theme || page.getAttribute("theme"); // book, Colab
    if (theme === "dark" || theme === "light") return theme;
    for (let node = root; node; node = node.parentElement) {
      const [r, g, b, a = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
      if (a > 0.5) return 0.2126 * r + 0.7152 * g + 0.0722 * b < 128 ? "dark" : "light";
    }
    return matchMedia("(prefers-color-scheme: dark)").matches && !window.google ? "dark" : "light";
  };

  L.mount = (root) => {
    const figure = L.figures[root.dataset.figure];
    if (!figure || root.dataset.live) return;
    root.dataset.live = "yes";
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "Figure to touch");
    const paint = () => {
      if (root.dataset.scheme !== "picture") root.dataset.scheme = scheme(root);
    };
    paint();
    try {
      root.touchStage = new Stage(root, figure);
    } catch (error) {
      delete root.dataset.live;
      root.querySelector(".touch-live")?.remove();
      throw error;
    }
    const watcher = new MutationObserver(paint);
    [document.documentElement, document.body].forEach((node) => watcher.observe(node, { attributes: true }));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  };
  L.mountAll = () => document.querySelectorAll(".touch[data-figure]").forEach(L.mount);
})();
