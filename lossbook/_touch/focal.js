// Chapter "focal": four ways to stop pushing what is right, over how wrong a score is.
(function () {
  "use strict";
  const L = window.lossbookTouch, { sigmoid, softplus } = L;

  // z = (1 - 2t) s: how far the score lies on the wrong side. The push is the slope of the loss over z.
  const step = (z, m) => {
    const border = m <= 0 ? Infinity : m >= 1 ? -Infinity : Math.log((1 - m) / m);
    return z > border ? 1 : z === border ? 0.5 : 0;
  };
  const kinds = {
    BCE: [(z) => softplus(z), (z) => sigmoid(z)],
    "hard truncation": [(z, o) => step(z, o.m) * softplus(z), (z, o) => step(z, o.m) * sigmoid(z)],
    "soft truncation": [
      (z, o) => sigmoid(o.K * z) * softplus(z),
      (z, o) => sigmoid(o.K * z) * (sigmoid(z) + o.K * sigmoid(-o.K * z) * softplus(z)),
    ],
    "focal loss": [
      (z, o) => Math.exp(-o.gamma * softplus(-z)) * softplus(z),
      (z, o) => Math.exp(-o.gamma * softplus(-z)) * (sigmoid(z) + o.gamma * sigmoid(-z) * softplus(z)),
    ],
  };
  const names = Object.keys(kinds);
  const loss = (name, z, options) => kinds[name][0](z, options);
  const push = (name, z, options) => kinds[name][1](z, options);

  // The samples: 1,000 easy negatives and 3 hard positives, spread around two places.
  const spread = (n, width) =>
    L.range(0.5 / n, 1 - 0.5 / n, n).map((q) => (width * Math.log(q / (1 - q))) / 1.7); // logistic quantiles
  const easy = spread(1000, 0.8), hard = [-0.5, 0, 0.5];
  // The part of the summed push that the easy samples take; alpha weighs positives in focal loss only.
  const share = (name, o) => {
    const total = (places, at) => places.reduce((sum, d) => sum + push(name, at + d, o), 0);
    const [up, down] = name === "focal loss" ? [o.alpha, 1 - o.alpha] : [1, 1];
    const few = up * total(hard, o.hard), many = down * total(easy, o.easy);
    return few + many > 0 ? many / (few + many) : 0;
  };
  L.focal = { loss, push, share };

  // what the plot shows; the loss at half its size
  const seen = (name, z, s) => Math.min(s.show === "loss" ? loss(name, z, s) / 2 : push(name, z, s), 1.6);
  const X = [-7, 5], xs = L.range(...X, 241);
  L.define("focal", {
    words: "Push of four losses over how wrong the score is, with 1,000 easy and 3 hard samples",
    state: { show: "push", gamma: 2, alpha: 0.5, K: 4, m: 0.5, easy: -4, hard: 1 },
    controls: [
      { name: "gamma", label: "γ, focal loss", min: 0, max: 5, step: 0.1, color: "focal loss" },
      { name: "alpha", label: "α, weight of the 3 hard", min: 0.05, max: 0.95, step: 0.05, color: "focal loss",
        show: (v) => L.number(v) },
      { name: "K", label: "K, soft truncation", min: 0.5, max: 12, step: 0.5, color: "soft truncation" },
      { name: "m", label: "m, hard truncation", min: 0.05, max: 0.95, step: 0.05, color: "hard truncation",
        show: (v) => L.number(v) },
      { name: "show", label: "What the curves show", title: "Curves:", choices: [["push", "push"], ["loss", "loss"]] },
    ],
    x: X, y: [0, 1.5], height: (w) => (w < 480 ? 290 : 310), margins: [24, 10, 42, 30],
    draw(panel) {
      const yTicks = [0, 0.5, 1, 1.5].map((v) => [v, (s) => (s.show === "loss" ? 2 * v : v)]);
      panel.axes({ xTicks: [-6, -4, -2, 0, 2, 4], yTicks, yTitle: (s) => s.show,
        xTitle: "z, how wrong the score is" });
      names.forEach((name) => panel.loss(name, (s) => {
        const points = name === "hard truncation" ? withStep(s) : xs;
        return [points, points.map((z) => seen(name, z, s))];
      }));
      // the crowds, as humps that stand on the axis
      const hump = (at, width, height) => {
        const u = L.range(-4, 4, 61);
        return [u.map((v) => L.clip(at + v * width, ...X)), u.map((v) => height * Math.exp(-v * v / 2))];
      };
      panel.curve((s) => hump(s.easy, 0.8, 0.32), { color: "faint", width: 1, fill: 0.35 });
      hard.forEach((d) => panel.curve((s) => [[s.hard + d, s.hard + d], [0, 0.1]], { color: "ink", width: 3 }));
      panel.text((s) => [s.easy, 0.37], "1,000 easy", { anchor: "middle" });
      panel.text((s) => [s.hard, 0.17], "3 hard", { anchor: "middle" });
      const says = (s, name) => `z = ${L.number(s[name], 1)}`;
      const mover = (name, low, high, label) => panel.handle({
        at: (s) => [s[name], 0], axis: "x", color: "ink", size: 7, step: [0.2, 0], label, says: (s) => says(s, name),
        move: (s, x) => (s[name] = Math.round(10 * L.clip(x, low, high)) / 10),
      });
      mover("easy", -6, -1, "Place of the 1,000 easy samples");
      mover("hard", -1, 4, "Place of the 3 hard samples");
      // names at the curves, where they are apart
      const near = (name, z, dy, anchor = "left", dx = 0) => panel.text((s) => {
        const zz = typeof z === "function" ? z(s) : z;
        return [zz + dx, Math.min(seen(name, zz, s), 1.45) + dy];
      }, name, { color: name, anchor });
      near("BCE", -1.1, 0.1, "right");
      const end = xs.filter((z) => z > 2.4), top = (s) => Math.max(...end.map((z) => seen("focal loss", z, s)));
      panel.text((s) => [5, Math.min(1.38, top(s)) + 0.08], "focal loss", { color: "focal loss", anchor: "right" });
      const border = (s) => Math.log((1 - s.m) / s.m);
      panel.text((s) => [border(s) + 0.12, 0.55 * seen("BCE", border(s), s)], "hard", { color: "hard truncation" });
      panel.text((s) => {
        // left of where the curve has almost risen to its height at 0.4
        const z = xs.find((v) => seen("soft truncation", v, s) >= 0.9 * Math.min(seen("soft truncation", 0.4, s), 1.4));
        return [z - 0.15, seen("soft truncation", z, s) + 0.03];
      }, "soft", { color: "soft truncation", anchor: "right" });
      panel.stage.bars("Part of all pushes that the 1,000 easy samples take:", names.map((name) => (
        { label: name, color: name, value: (s) => share(name, s) })));
    },
    says: (s) => `The 1,000 easy samples take ${L.percent(share("BCE", s))} of all pushes with BCE and ` +
      `${L.percent(share("focal loss", s))} with focal loss at γ = ${L.number(s.gamma, 1)}.`,
  });

  // the points of a curve with a jump, which is drawn upright
  function withStep(s) {
    const border = Math.log((1 - s.m) / s.m), gap = 1e-9;
    return [...xs.filter((z) => z < border), border - gap, border + gap, ...xs.filter((z) => z > border)];
  }
})();
