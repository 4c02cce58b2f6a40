// Chapter "accuracy": three points on a line, a border b, and noise of size sigma on the scores.
(function () {
  "use strict";
  const L = window.lossbookTouch;

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
  const accuracy = (b) => mean((x, y) => (y * (x - b) > 0 || (y < 0 && x === b) ? 1 : 0));
  L.accuracy = { loss, slope, normal, right, accuracy };

  const X = [-1.5, 4], xs = L.range(...X, 551);
  const names = ["−", "−", "+"], colors = ["violet", "violet", "blue"];
  const border = (s, x) => (s.b = Math.round(100 * L.clip(x, -1, 3.95)) / 100);
  const deviation = (s) => s.sigma * Math.SQRT2;

  const bells = {
    x: X, y: [0, 1.75], height: 230, margins: [8, 10, 42, 34],
    words: "The three points with their noise, and the border",
    draw(panel) {
      panel.axes({ xTicks: [-1, 0, 1, 2, 3, 4], xTitle: "x, with the noise of the scores" });
      points.forEach((x, i) => {
        const top = (s) => 0.48 * Math.min(1, 0.35 / deviation(s) + 0.3), base = 1.1 - 0.55 * i;
        const shape = (s, keep) => {
          const u = L.range(-3.2, 3.2, 97).map((v) => L.clip(x + v * deviation(s), ...X)), inside = u.filter(keep);
          if (inside.length < 2) return [[NaN], [NaN]];
          const h = (v) => base + top(s) * Math.exp(-(((v - x) / deviation(s)) ** 2) / 2);
          return [[inside[0], ...inside, inside[inside.length - 1], inside[0]], [base, ...inside.map(h), base, base]];
        };
        panel.curve((s) => shape(s, (v) => (sides[i] > 0 ? v >= s.b : v <= s.b)), { color: colors[i], width: 0, fill: 0.4 });
        panel.curve((s) => shape(s, () => true), { color: colors[i], width: 1.8 });
        panel.curve(() => [[x, x], [base, base + 0.06]], { color: "ink", width: 3 });
        panel.text(() => [X[0] - 24 * panel.unit[0], base + 0.12], names[i], { color: colors[i], bold: true, size: 16 });
        panel.text(() => [X[1], base + 0.14], (s) => `P = ${L.number(right(x, sides[i], s.b, s.sigma))}`,
          { color: colors[i], anchor: "right" });
      });
      panel.curve((s) => [[s.b, s.b], [0, 1.7]], { color: "ink", width: 2, dash: 2 });
      panel.text((s) => [s.b + (s.b > 3 ? -8 : 8) * panel.unit[0], 1.66], "border b",
        { anchor: (s) => (s.b > 3 ? "right" : "left") });
      panel.handle({
        at: (s) => [s.b, 0], axis: "x", step: [0.05, 0], color: "ink", size: 9, label: "Border b", move: border,
        says: (s) => `b = ${L.number(s.b)}`,
      });
    },
  };
  const curves = {
    x: X, y: [0, 1], height: 230, margins: [24, 10, 42, 34],
    words: "The expected accuracy over the border",
    draw(panel) {
      panel.axes({ xTicks: [-1, 0, 1, 2, 3, 4], yTicks: [0, 0.5, 1], xTitle: "border b", yTitle: "expected accuracy" });
      panel.curve(() => [[0, 0, 0.25, 0.25, 0], [0, 1, 1, 0, 0]], { color: "faint", width: 0, fill: 0.25 });
      panel.curve(() => [xs, xs.map(accuracy)], { color: "faint", width: 1.5 });
      panel.text([0.36, 0.9], "without noise", { size: 13 });
      panel.loss("EXACT", (s) => [xs, xs.map((b) => 1 - loss(b, s.sigma))]);
      // the slope at b, as a piece of the tangent
      panel.curve((s) => {
        const p = 1 - loss(s.b, s.sigma), rise = -slope(s.b, s.sigma), d = 0.4 / Math.hypot(1, rise);
        return [[s.b - d, s.b + d], [p - d * rise, p + d * rise]];
      }, { color: "EXACT", width: 7, opacity: 0.6 });
      panel.text((s) => [L.clip(s.b, -0.6, 3.1), 1 - loss(s.b, s.sigma) - 17 * panel.unit[1]],
        (s) => `slope ${L.small(-slope(s.b, s.sigma))}`, { color: "EXACT", anchor: "middle" });
      panel.handle({
        at: (s) => [s.b, 1 - loss(s.b, s.sigma)], axis: "x", step: [0.05, 0], color: "EXACT", size: 8, move: border,
        label: "Border b, on the curve",
        says: (s) => `b = ${L.number(s.b)}, expected accuracy ${L.number(1 - loss(s.b, s.sigma))}`,
      });
    },
  };

  L.define("accuracy", {
    state: { size: -1, b: 2 },
    controls: [{
      name: "size", label: "σ, size of the noise", min: -1.3, max: 0.48, step: 0.02, color: "EXACT",
      show: (v) => L.number(10 ** v),
    }],
    before: (s) => (s.sigma = 10 ** s.size),
    panels: [bells, curves],
    says: (s) => {
      const rise = -slope(s.b, s.sigma), found = 1 - loss(s.b, s.sigma);
      return `Expected accuracy ${L.number(found)}, without noise ${L.number(accuracy(s.b))}. The slope is ` +
        `${L.small(rise)}: ${Math.abs(rise) < 0.001 ? "it has vanished, and nothing moves the border." :
          `training moves the border ${rise > 0 ? "right" : "left"}.`}`;
    },
  });
})();
