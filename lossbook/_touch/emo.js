// Chapter "emo": five words on a half circle, the model's probabilities, and one wanted word.
(function () {
  "use strict";
  const L = window.lossbookTouch, { softmax, softplus, logSumExp } = L;
  const rad = (degrees) => (degrees * Math.PI) / 180;

  // Scores and angles (in degrees, of unit vectors in the plane) as lists, t the wanted word.
  const costs = (angles, t) => angles.map((a, i) => (i === t ? 0 : 1 - Math.cos(rad(a - angles[t]))));
  const ce = (s, t) => softplus(logSumExp(s.filter((_, i) => i !== t)) - s[t]);
  const emo = (s, angles, t) => {
    const c = costs(angles, t);
    return softmax(s).reduce((sum, p, i) => sum + p * c[i], 0);
  };
  // Gradients by the scores; a push is minus the gradient.
  const slopes = {
    CE: (s, angles, t) => softmax(s).map((p, i) => p - (i === t ? 1 : 0)),
    EMO: (s, angles, t) => {
      const c = costs(angles, t), all = emo(s, angles, t);
      return softmax(s).map((p, i) => p * (c[i] - all));
    },
    both: (s, angles, t) => {
      const a = slopes.CE(s, angles, t), b = slopes.EMO(s, angles, t), all = emo(s, angles, t), plain = ce(s, t);
      const ratio = all > 1e-30 * plain ? plain / all : 0;
      return a.map((v, i) => (v + ratio * b[i]) / 2);
    },
  };
  L.emo = { costs, ce, emo, slopes };

  const words = ["hot", "warm", "cold", "loud", "Tuesday"];
  const P = (s) => softmax(s.scores);
  const place = (angle, r = 1) => [r * Math.cos(rad(angle)), r * Math.sin(rad(angle))];

  const circle = {
    x: [-1.75, 1.75], y: [-0.05, 1.12], widest: 500, square: true, margins: [16, 2, 16, 2],
    words: "Five words on a half circle and the plan that carries their probability to the wanted one",
    draw(panel) {
      const half = L.range(0, 180, 91);
      panel.curve(() => [half.map((a) => place(a)[0]), half.map((a) => place(a)[1])], { color: "faint", width: 1.2 });
      const side = (angle) => (angle < 60 ? 1 : angle > 120 ? -1 : 0);
      words.forEach((word, i) => {
        // the plan: all of the word's probability goes to the wanted word
        panel.curve((s) => (i === s.t ? [[NaN], [NaN]] : [
          [place(s.angles[i])[0], place(s.angles[s.t])[0]], [place(s.angles[i])[1], place(s.angles[s.t])[1]],
        ]), { color: "EMO", width: (s) => Math.max(0.5, 24 * P(s)[i]), opacity: 0.5, layer: 3 });
        panel.text((s) => {
          const [x, y] = place(s.angles[i]), way = side(s.angles[i]), [ux, uy] = panel.unit;
          return [x + (way ? (i === Number(s.t) ? 20 : 14) * way : 6 * x) * ux, y + (way ? 4 : 18) * uy];
        }, word, { bold: true, anchor: (s) => ["right", "middle", "left"][side(s.angles[i]) + 1] });
        panel.handle({
          at: (s) => place(s.angles[i]), color: "ink", size: 8, label: `The word ${word} on the half circle`,
          step: [0.05, 0.05], says: (s) => `${s.angles[i]} degrees, cost ${L.number(s.now.c[i])}`,
          move: (s, x, y) => (s.angles[i] = Math.round(L.clip((Math.atan2(Math.max(y, 0), x) * 180) / Math.PI, 0, 180))),
          turn: (s, n) => (s.angles[i] = L.clip(s.angles[i] + n, 0, 180)),
        });
      });
      panel.curve((s) => {
        const [x, y] = place(s.angles[s.t]), r = 15 * panel.unit[0], round = L.range(0, 2 * Math.PI, 41);
        return [round.map((a) => x + r * Math.cos(a)), round.map((a) => y + r * Math.sin(a))];
      }, { color: "EMO", width: 2.5 });
    },
  };
  const columns = {
    x: [-0.6, 5.5], y: [0, 1], height: 270, margins: [12, 6, 122, 6],
    words: "Probability, cost and pushes of each word",
    draw(panel) {
      const at = (i) => i + 1;
      panel.curve(() => [[0.4, 5.5], [0, 0]], { color: "faint", width: 1.2 });
      const row = (k) => () => -14 - 18 * k;
      const line = (k, title, color, value) => {
        panel.text(() => [-0.6, row(k)() * panel.unit[1]], title, { color, size: 13 });
        words.forEach((_, i) => panel.text(() => [at(i) + 0.12, row(k)() * panel.unit[1]], (s) => value(s, i),
          { color, size: 13, anchor: "middle" }));
      };
      words.forEach((word, i) => {
        panel.curve((s) => {
          const x = at(i) + 0.12, p = s.now.p[i];
          return [[x - 0.28, x + 0.28, x + 0.28, x - 0.28, x - 0.28], [0, 0, p, p, 0]];
        }, { color: "blue", width: 1, fill: 0.35 });
        panel.text((s) => [at(i) + 0.12, s.now.p[i] + 19 * panel.unit[1]], (s) => L.number(s.now.p[i]),
          { anchor: "middle", size: 13, color: "blue" });
        panel.handle({
          at: (s) => [at(i) + 0.12, s.now.p[i]], axis: "y", color: "blue", size: 7, step: [0, 0.02],
          label: `Probability of the word ${word}`, says: (s) => `p = ${L.number(s.now.p[i])}`,
          move: (s, _, y) => setProbability(s, i, L.clip(y, 0.01, 0.96)),
        });
      });
      panel.text([-0.6, 0.5], "p", { color: "blue" });
      line(0, "", "ink", (s, i) => words[i]);
      line(1, "cost", "ink", (s, i) => L.number(s.now.c[i]));
      const signed = (v) => (v > 0.0049 ? "+" : "") + L.number(v);
      line(2, "CE", "cross-entropy", (s, i) => signed(-s.now.CE[i]));
      line(3, "EMO", "EMO", (s, i) => signed(-s.now.EMO[i]));
      line(4, "EMO + CE", "EMO + CE", (s, i) => signed(-s.now.both[i]));
      panel.text(() => [-0.6, row(5)() * panel.unit[1]], "the last three rows: the push on each score",
        { size: 13 });
    },
  };
  // One word gets the probability, the others keep their proportions.
  const setProbability = (s, i, wanted) => {
    const p = P(s), rest = 1 - p[i];
    s.scores = p.map((v, j) => Math.log(j === i ? wanted : Math.max((v * (1 - wanted)) / rest, 1e-6)));
  };

  L.define("emo", {
    words: "Five words, their costs and the pushes",
    state: { angles: [0, 25, 60, 110, 170], scores: [0.2, 0.5, 0.2, 0.05, 0.05].map(Math.log), t: "0" },
    controls: [{ name: "t", label: "The wanted word", title: "Wanted:", choices: words.map((w, i) => [String(i), w]) }],
    before(s) {
      const t = Number(s.t);
      const all = [s.scores, s.angles, t];
      s.now = { p: P(s), c: costs(s.angles, t), CE: slopes.CE(...all), EMO: slopes.EMO(...all), both: slopes.both(...all),
        ce: ce(s.scores, t), emo: emo(...all) };
    },
    panels: [circle, columns],
    stacked: true,
    says: (s) => {
      const t = Number(s.t), p = s.now.p[t], list = new Intl.ListFormat("en");
      const up = words.filter((_, i) => i !== t && s.now.both[i] < 0);
      return `p of ${words[t]} is ${L.number(p)}, ${p < Math.exp(-1) ? "below" : "above"} 1/e = 0.37. ` +
        `CE is ${L.number(s.now.ce)}, EMO ${L.number(s.now.emo)}. EMO + CE lifts ` +
        `${up.length ? `${list.format([words[t], ...up])}.` : `${words[t]} alone.`}`;
    },
  });
})();
