// Chapter "soft_labels": the bowl of the multi-label softmax over the scores of two labels, and BCE's.
(function () {
  "use strict";
  const L = window.lossbookTouch, { softplus, logSumExp, sigmoid } = L;

  // Scores and soft labels as lists; the threshold is 0.
  const above = (s, t) => logSumExp(s.map((v, i) => v + Math.log(1 - t[i])));
  const below = (s, t) => logSumExp(s.map((v, i) => -v + Math.log(t[i])));
  const loss = (s, t) => softplus(above(s, t)) + softplus(below(s, t));
  const slope = (s, t) => {
    const a = above(s, t), b = below(s, t);
    return s.map((v, i) => (1 - t[i]) * Math.exp(v - softplus(a)) - t[i] * Math.exp(-v - softplus(b)));
  };
  const lowest = (t) => t.map((p) => 0.5 * Math.log(p / (1 - p))); // where sigmoid(2s) = t
  const bce = {
    loss: (s, t) => s.reduce((sum, v, i) => sum + t[i] * softplus(-v) + (1 - t[i]) * softplus(v), 0),
    slope: (s, t) => s.map((v, i) => sigmoid(v) - t[i]),
    lowest: (t) => t.map((p) => Math.log(p / (1 - p))),
  };
  L.soft_labels = { loss, slope, lowest, bce };

  const R = [-4, 4], N = 57, grid = L.range(...R, N);
  // The lines of equal height through a grid of values, in one list with gaps (marching squares).
  const contour = (values, level) => {
    const xs = [], ys = [];
    const cut = (a, b) => (level - a) / (b - a);
    for (let i = 0; i + 1 < N; i += 1) {
      for (let j = 0; j + 1 < N; j += 1) {
        const [a, b, c, d] = [values[i][j], values[i + 1][j], values[i + 1][j + 1], values[i][j + 1]];
        const hits = [], h = grid[1] - grid[0];
        if ((a < level) !== (b < level)) hits.push([grid[i] + h * cut(a, b), grid[j]]);
        if ((b < level) !== (c < level)) hits.push([grid[i + 1], grid[j] + h * cut(b, c)]);
        if ((d < level) !== (c < level)) hits.push([grid[i] + h * cut(d, c), grid[j + 1]]);
        if ((a < level) !== (d < level)) hits.push([grid[i], grid[j] + h * cut(a, d)]);
        if (hits.length >= 2) {
          xs.push(hits[0][0], hits[1][0], NaN);
          ys.push(hits[0][1], hits[1][1], NaN);
        }
      }
    }
    return xs.length ? [xs, ys] : [[NaN], [NaN]];
  };
  const heights = [0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3, 4];
  const two = (values) => `(${values.map((v) => L.number(v)).join(", ")})`;

  const labels = { min: 0.02, max: 0.98, step: 0.02, color: "ink", show: (v) => L.number(v) };

  L.define("soft_labels", {
    words: "The loss over the scores of two labels as lines of equal height, with the lowest points",
    state: { t1: 0.9, t2: 0.3, s: [-1.5, 2], bowl: "ours" },
    controls: [
      { name: "t1", label: "t₁, soft label", ...labels },
      { name: "t2", label: "t₂, soft label", ...labels },
      { name: "bowl", label: "Bowl of which loss", title: "Bowl of",
        choices: [["ours", "multi-label softmax"], ["bce", "BCE"]] },
    ],
    before(s) {
      const key = `${s.t1} ${s.t2} ${s.bowl}`;
      s.t = [s.t1, s.t2];
      if (s.key === key) return;
      const f = s.bowl === "ours" ? loss : bce.loss, at = (s.bowl === "ours" ? lowest : bce.lowest)(s.t);
      const values = grid.map((x) => grid.map((y) => f([x, y], s.t))), least = f(at, s.t);
      s.lines = heights.map((h) => contour(values, least + h));
      s.key = key;
    },
    x: R, y: R, square: true, widest: 460, margins: [22, 10, 42, 40],
    draw(panel) {
      panel.axes({ xTicks: [-4, -2, 0, 2, 4], yTicks: [-4, -2, 0, 2, 4], xTitle: "score s₁", yTitle: "score s₂" });
      heights.forEach((_, i) => {
        ["ours", "bce"].forEach((bowl) => panel.curve((s) => (s.bowl === bowl ? s.lines[i] : [[NaN], [NaN]]), {
          color: bowl === "ours" ? "multi-label softmax" : "BCE", width: 1.6, opacity: 1 - 0.07 * i,
        }));
      });
      const place = (f, name, words, side) => {
        panel.board.create("point", [() => f(panel.state.t)[0], () => f(panel.state.t)[1]], {
          name: "", withLabel: false, size: 5, face: side < 0 ? "x" : "+", strokeColor: L.color(name), strokeWidth: 3,
          fillColor: L.color(name), fixed: true, highlight: false, showInfobox: false, layer: 7,
        });
        panel.text((s) => {
          const [x, y] = f(s.t);
          const [ux, uy] = panel.unit;
          return [L.clip(x, R[0] + 48 * ux, R[1] - 45 * ux), y + side * 16 * uy];
        }, words, { color: name, anchor: "middle" });
      };
      place(lowest, "multi-label softmax", "σ(2s) = t", 1);
      place(bce.lowest, "BCE", "BCE: σ(s) = t", -1);
      const way = (f, name) => panel.curve((s) => {
        const g = f(s.s, s.t);
        return [[s.s[0], s.s[0] - 1.2 * g[0]], [s.s[1], s.s[1] - 1.2 * g[1]]];
      }, { color: name, width: 3, arrow: true });
      way(slope, "multi-label softmax");
      way(bce.slope, "BCE");
      panel.handle({
        at: (s) => s.s, color: "ink", step: [0.1, 0.1], label: "The scores s₁ and s₂",
        says: (s) => `scores ${two(s.s)}, loss ${L.number(loss(s.s, s.t))}`,
        move: (s, x, y) => (s.s = [x, y].map((v) => Math.round(20 * L.clip(v, ...R)) / 20)),
      });
    },
    says: (s) => `At s = ${two(s.s)} read off σ(2s) = ${two(s.s.map((v) => sigmoid(2 * v)))}; the labels are ` +
      `t = ${two(s.t)}. Loss ${L.number(loss(s.s, s.t))}, at its lowest point ${L.number(loss(lowest(s.t), s.t))}.`,
  });
})();
