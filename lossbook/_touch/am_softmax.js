// Chapter "am_softmax": two class vectors and a point on the circle, with the borders that a margin asks for.
(function () {
  "use strict";
  const L = window.lossbookTouch, { softplus, sigmoid } = L;

  // psi of the target's cosine c, and its slope over c. m is a cosine, an angle in radians or a factor.
  const multiple = { 2: (c) => 2 * c * c - 1, 3: (c) => c * (4 * c * c - 3), 4: (c) => 2 * (2 * c * c - 1) ** 2 - 1 };
  const slopes = { 2: (c) => 4 * c, 3: (c) => 12 * c * c - 3, 4: (c) => 16 * c * (2 * c * c - 1) };
  const psi = (kind, c, m) => {
    if (kind === "AM-softmax") return c - m;
    if (kind === "ArcFace") {
      return c < -Math.cos(m) ? c - m * Math.sin(m) : c * Math.cos(m) - Math.sqrt((1 - c) * (1 + c)) * Math.sin(m);
    }
    if (kind === "short form") return Math.min(multiple[m](c), c);
    return c;
  };
  const psiSlope = (kind, c, m) => {
    if (kind === "ArcFace" && c >= -Math.cos(m)) {
      return Math.cos(m) + (c * Math.sin(m)) / Math.sqrt(Math.max((1 - c) * (1 + c), 1e-12));
    }
    if (kind === "short form" && multiple[m](c) < c) return slopes[m](c);
    return 1;
  };
  // Two classes: the target's cosine and the other's. The push is the size of the slope over the target's cosine.
  const loss = (kind, own, other, m, scale) => softplus(scale * (other - psi(kind, own, m)));
  const push = (kind, own, other, m, scale) =>
    scale * psiSlope(kind, own, m) * sigmoid(scale * (other - psi(kind, own, m)));
  L.am_softmax = { psi, loss, push };

  const rad = (degrees) => (degrees * Math.PI) / 180;
  const factor = (m) => (m < 0.34 ? 2 : m < 0.67 ? 3 : 4); // min(cos m theta, cos theta) takes 2, 3 or 4
  const given = (s) => (s.kind === "short form" ? factor(s.m) : s.m);
  const cosines = (s, angle) => [Math.cos(rad(angle - s.w1)), Math.cos(rad(angle - s.w2))];
  const won = (s, angle, first) => {
    const [a, b] = cosines(s, angle);
    return first ? psi(s.kind, a, given(s)) > b : psi(s.kind, b, given(s)) > a;
  };
  const apart = (a, b) => Math.abs(((((a - b) % 360) + 540) % 360) - 180);
  const whole = (x, y) => Math.round((Math.atan2(y, x) * 180) / Math.PI);
  const kinds = ["normalised softmax", "AM-softmax", "ArcFace", "short form"];
  const ring = L.range(0, 360, 721);
  // the arcs of the circle where a condition holds, as one line with gaps
  const arcs = (r, holds) => [
    ring.map((a) => (holds(a) ? r * Math.cos(rad(a)) : NaN)), ring.map((a) => (holds(a) ? r * Math.sin(rad(a)) : NaN)),
  ];

  const circle = {
    x: [-1.3, 1.3], y: [-1.3, 1.3], square: true, widest: 330, margins: [2, 2, 2, 2],
    words: "Two class vectors and a point on a circle, with the region of each class",
    draw(panel) {
      panel.curve(() => arcs(1, () => true), { color: "grid", width: 16 });
      panel.curve((s) => arcs(1, (a) => won(s, a, true)), { color: "blue", width: 16, opacity: 0.55 });
      panel.curve((s) => arcs(1, (a) => won(s, a, false)), { color: "orange", width: 16, opacity: 0.55 });
      [["w1", "blue", "w₁"], ["w2", "orange", "w₂"]].forEach(([name, color, words], i) => {
        panel.curve((s) => [[0, 0.9 * Math.cos(rad(s[name]))], [0, 0.9 * Math.sin(rad(s[name]))]], { color, width: 3 });
        panel.handle({
          at: (s) => [Math.cos(rad(s[name])), Math.sin(rad(s[name]))], color, label: `Class vector w${i + 1}`, axis: "xy",
          says: (s) => `${s[name]} degrees`, step: [0.05, 0.05],
          move: (s, x, y) => (s[name] = whole(x, y)),
          turn: (s, n) => (s[name] += n),
        });
        panel.text((s) => [0.72 * Math.cos(rad(s[name] + 12)), 0.72 * Math.sin(rad(s[name] + 12))], words,
          { color, anchor: "middle", bold: true });
      });
      panel.handle({
        at: (s) => [Math.cos(rad(s.point)), Math.sin(rad(s.point))], color: "ink", label: "The point, of class 1",
        says: (s) => `${s.point} degrees, push ${L.small(pushNow(s))}`, step: [0.05, 0.05], size: 9,
        move: (s, x, y) => (s.point = whole(x, y)),
        turn: (s, n) => (s.point += n),
      });
      panel.curve((s) => [[0, 0.9 * Math.cos(rad(s.point))], [0, 0.9 * Math.sin(rad(s.point))]],
        { color: "ink", width: 1.5, dash: 2 });
      panel.text((s) => [0.8 * Math.cos(rad(s.point)), 0.8 * Math.sin(rad(s.point))], "z",
        { anchor: "middle", bold: true });
      // the push on the point, along the circle towards w1
      panel.curve((s) => {
        const way = ((((s.w1 - s.point) % 360) + 540) % 360) - 180;
        const size = 55 * L.clip(pushNow(s) / s.scale, -1.5, 1.5) * Math.sign(way);
        const turn = L.range(s.point, s.point + size, 31), r = 1.14;
        if (Math.abs(size) < 1) return [[NaN], [NaN]];
        return [turn.map((a) => r * Math.cos(rad(a))), turn.map((a) => r * Math.sin(rad(a)))];
      }, { color: "violet", width: 3, arrow: true });
      panel.text(() => [-1.28, -1.12], "grey: the free zone", { size: 13 });
    },
  };
  const lossNow = (s) => loss(s.kind, ...cosines(s, s.point), given(s), s.scale);
  const pushNow = (s) => push(s.kind, ...cosines(s, s.point), given(s), s.scale);

  const curves = {
    x: [0, 180], y: [-2, 1], height: (w) => Math.min(300, w), margins: [24, 20, 42, 32],
    words: "The target's score psi over its angle",
    draw(panel) {
      panel.axes({ xTicks: [[0, "0°"], [60, "60°"], [120, "120°"], [180, "180°"]], yTicks: [-2, -1, 0, 1],
        xTitle: "angle θ to w₁", yTitle: "ψ(θ)" });
      const angles = L.range(0, 180, 181);
      kinds.forEach((kind) => panel.loss(kind === "short form" ? "magenta" : kind, (s) => {
        const m = kind === "short form" ? factor(s.m) : s.m;
        return [angles, angles.map((a) => Math.max(psi(kind, Math.cos(rad(a)), m), -2))];
      }, { width: (s) => (s.kind === kind ? 4 : 1.6), opacity: (s) => (s.kind === kind ? 1 : 0.55) }));
      panel.curve((s) => {
        const a = apart(s.point, s.w1);
        return [[a, a], [-2, Math.max(psi(s.kind, Math.cos(rad(a)), given(s)), -2)]];
      }, { color: "ink", width: 1.5, dash: 2 });
      panel.text((s) => [L.clip(apart(s.point, s.w1), 12, 168), -1.82], "z", { bold: true, anchor: "middle" });
      panel.stage.bars("", [{ label: "push / γ", color: "violet", value: (s) => Math.abs(pushNow(s)) / s.scale,
        show: (v, s) => L.small(Math.sign(pushNow(s)) * v) }]);
      kinds.forEach((kind) => panel.text([180, 0.75], (s) => (s.kind === kind ? kind : ""),
        { color: kind === "short form" ? "magenta" : kind, anchor: "right", bold: true }));
    },
  };

  L.define("am_softmax", {
    words: "Class vectors on a circle, the regions that a margin leaves to each, and psi over the angle",
    state: { kind: "AM-softmax", m: 0.35, scale: 10, w1: 150, w2: 40, point: 100 },
    controls: [
      { name: "kind", label: "The kind of margin", choices: kinds.map((kind) => [kind, kind]) },
      { name: "m", label: "margin m", min: 0, max: 1, step: 0.05, color: "AM-softmax",
        show: (v, s) => (s.kind === "short form" ? `× ${factor(v)}` : s.kind === "normalised softmax" ? "none" : L.number(v)) },
      { name: "scale", label: "scale γ", min: 1, max: 40, step: 1, color: "ink", show: (v) => String(v) },
    ],
    panels: [circle, curves],
    says: (s) => {
      const [a, b] = cosines(s, s.point), in1 = won(s, s.point, true), in2 = won(s, s.point, false);
      const where = in1 ? "in the region of its class" : in2 ? "in the region of the other class" : "in the free zone";
      const wrong = pushNow(s) < 0 ? " The push points away from w₁." : "";
      return `The point z of class 1 is ${where}: cos θ₁ = ${L.number(a)}, ψ = ${L.number(psi(s.kind, a, given(s)))}, ` +
        `cos θ₂ = ${L.number(b)}. Loss ${L.small(lossNow(s))}, push ${L.small(pushNow(s))}.${wrong}`;
    },
  });
})();
