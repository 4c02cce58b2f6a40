// Chapter "accuracy": three points on a line, a border b, and noise of size sigma on the scores.
(function () {
  "use strict";
  const L = window.lossbookTouch, { softplus, sigmoid } = L;

  // erfc by its series and its continued fraction, to about 15 digits.
  const erfc = (x) => {
    if (x < 0) return 2 - erfc(-x);
    if (x < 2.5) {
      let term = x, sum = x;
      for (let n = 1; Math.abs(term) > 1e-17 * sum && n < 200; n += 1) {
        term *= (-x * x) / n;
        sum += term / (2 * n + 1);
        if (x === 0) break;
      }
      return 1 - (2 / Math.sqrt(Math.PI)) * sum;
    }
    let f = 0;
    for (let n = 120; n > 0; n -= 1) f = n / 2 / (x + f);
    return Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + f);
  };
  const normal = (x) => erfc(-x / Math.SQRT2) / 2;
  const bell = (x) => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);

  const points = [-0.25, 0, 0.25], sides = [-1, -1, 1]; // the model is f(x) = x - b, a positive has f > 0
  const mean = (f) => points.reduce((sum, x, i) => sum + f(x, sides[i]), 0) / points.length;
  // Two classes with the scores f and 0: the difference of their noises has the deviation sigma sqrt(2).
  const right = (x, y, b, sigma) => normal((y * (x - b)) / (sigma * Math.SQRT2));
  const loss = (b, sigma) => mean((x, y) => normal((-y * (x - b)) / (sigma * Math.SQRT2)));
  const slope = (b, sigma) =>
    mean((x, y) => (y * bell((x - b) / (sigma * Math.SQRT2))) / (sigma * Math.SQRT2));
  const ce = { loss: (b) => mean((x, y) => softplus(-y * (x - b))), slope: (b) => mean((x, y) => y * sigmoid(-y * (x - b))) };
  const accuracy = (b) => mean((x, y) => (y * (x - b) > 0 || (y < 0 && x === b) ? 1 : 0));
  L.accuracy = { loss, slope, ce, normal, right };

  const X = [-1.5, 3], xs = L.range(...X, 451), low = (s) => Math.max(s.sigma, 0.02);
  const deviation = (s) => low(s) * Math.SQRT2;
  const names = ["−", "−", "+"], colors = ["orange", "orange", "blue"];
  const rows = [0, 0.55, 1.1];

  const bells = {
    x: X, y: [0, 1.75], height: 240, margins: [8, 10, 42, 34],
    words: "The three points with their noise, and the border",
    draw(panel) {
      panel.axes({ xTicks: [-1, 0, 1, 2, 3], xTitle: "x, with the noise of the scores" });
      points.forEach((x, i) => {
        const top = (s) => 0.48 * Math.min(1, 0.35 / deviation(s) + 0.3), base = 1.1 - rows[i];
        const shape = (s, keep) => {
          const u = L.range(-3.2, 3.2, 97).map((v) => L.clip(x + v * deviation(s), ...X));
          const inside = u.filter(keep);
          if (inside.length < 2) return [[NaN], [NaN]];
          const h = (v) => base + top(s) * Math.exp(-(((v - x) / deviation(s)) ** 2) / 2);
          return [[inside[0], ...inside, inside[inside.length - 1], inside[0]], [base, ...inside.map(h), base, base]];
        };
        panel.curve((s) => shape(s, (v) => (sides[i] > 0 ? v >= s.b : v <= s.b)), { color: colors[i], width: 0, fill: 0.4 });
        panel.curve((s) => shape(s, () => true), { color: colors[i], width: 1.8 });
        panel.curve(() => [[x, x], [base, base + 0.06]], { color: "ink", width: 3 });
        panel.text(() => [X[0] - 24 * panel.unit[0], base + 0.12], names[i], { color: colors[i], bold: true, size: 16 });
        panel.text(() => [X[1], base + 0.14], (s) => `P = ${L.number(right(x, sides[i], s.b, low(s)))}`,
          { color: colors[i], anchor: "right" });
      });
      panel.curve((s) => [[s.b, s.b], [0, 1.7]], { color: "ink", width: 2, dash: 2 });
      panel.text((s) => [s.b + (s.b > 1 ? -8 : 8) * panel.unit[0], 1.66], "border b",
        { anchor: "left" });
      panel.handle({
        at: (s) => [s.b, 0], axis: "x", step: [0.05, 0], color: "ink", size: 9, label: "Border b",
        says: (s) => `b = ${L.number(s.b)}`, move: (s, x) => (s.b = Math.round(100 * L.clip(x, -0.95, 2.95)) / 100),
      });
    },
  };
  const curves = {
    x: X, y: [0, 1.2], height: 250, margins: [24, 10, 42, 34],
    words: "The losses over the border",
    draw(panel) {
      panel.axes({ xTicks: [-1, 0, 1, 2, 3], yTicks: [0, 0.5, 1], xTitle: "border b", yTitle: "mean loss" });
      panel.curve(() => [xs, xs.map((b) => 1 - accuracy(b))], { color: "faint", width: 1.5 });
      panel.loss("cross-entropy", () => [xs, xs.map(ce.loss)]);
      panel.loss("EXACT", (s) => [xs, xs.map((b) => loss(b, low(s)))]);
      panel.text([0.35, 1.05], "cross-entropy", { color: "cross-entropy" });
      panel.text((s) => [2.95, loss(2.2, low(s)) + 0.09], "EXACT, 1 − P", { color: "EXACT", anchor: "right" });
      panel.text([0.36, 0.13], "errors", { color: "ink", size: 13 });
      // the slope at b, as a piece of the tangent
      [["EXACT", (s) => loss(s.b, low(s)), (s) => slope(s.b, low(s))], ["cross-entropy", (s) => ce.loss(s.b), (s) => ce.slope(s.b)]]
        .forEach(([name, value, rise]) => {
          panel.curve((s) => {
            const d = 0.22 / Math.hypot(1, rise(s));
            return [[s.b - d, s.b + d], [value(s) - d * rise(s), value(s) + d * rise(s)]];
          }, { color: name, width: 6, opacity: 0.75 });
        });
      panel.handle({
        at: (s) => [s.b, 0], axis: "x", step: [0.05, 0], color: "ink", size: 9, label: "Border b, under the losses",
        says: (s) => `b = ${L.number(s.b)}, loss ${L.number(loss(s.b, low(s)))}`,
        move: (s, x) => (s.b = Math.round(100 * L.clip(x, -0.95, 2.95)) / 100),
      });
      panel.curve((s) => [[s.b, s.b], [0, 1]], { color: "ink", width: 1.2, dash: 2 });
    },
  };

  L.define("accuracy", {
    words: "Three points, a border and noise",
    state: { sigma: 0.3, b: 1 },
    controls: [{ name: "sigma", label: "σ, noise", min: 0.02, max: 1, step: 0.02, color: "EXACT", show: (v) => L.number(v) }],
    panels: [bells, curves],
    says: (s) => `Expected errors ${L.number(loss(s.b, low(s)))}, slope ${L.small(slope(s.b, low(s)))}: ` +
      `${Math.abs(slope(s.b, low(s))) < 0.01 ? "nothing tells the border where to go." : "a step against it moves the border."} ` +
      `Cross-entropy's slope is ${L.small(ce.slope(s.b))}.`,
  });
})();
