// Chapter "multilabel_softmax": five labels on a ladder of scores, and any number of further negatives.
(function () {
  "use strict";
  const L = window.lossbookTouch, { softplus, logSumExp, sigmoid } = L;

  // Scores of the negatives and of the positives; the threshold is 0. Each half is what its side adds to the loss.
  const negatives = (neg) => softplus(neg.length ? logSumExp(neg) : -Infinity);
  const positives = (pos) => softplus(pos.length ? logSumExp(pos.map((s) => -s)) : -Infinity);
  const loss = (neg, pos) => negatives(neg) + positives(pos);
  // The size of the gradient for each score: negatives are pushed down, positives up.
  const push = (neg, pos) => {
    const top = neg.length ? logSumExp(neg) : -Infinity, bottom = pos.length ? logSumExp(pos.map((s) => -s)) : -Infinity;
    return {
      neg: neg.map((s) => sigmoid(top) * Math.exp(s - top)),
      pos: pos.map((s) => sigmoid(bottom) * Math.exp(-s - bottom)),
    };
  };
  const bce = {
    loss: (neg, pos) => [...neg, ...pos.map((s) => -s)].reduce((sum, z) => sum + softplus(z), 0),
    push: (neg, pos) => ({ neg: neg.map(sigmoid), pos: pos.map((s) => sigmoid(-s)) }),
  };
  L.multilabel_softmax = { loss, push, bce, negatives, positives };

  // The slider's places for the number of further negatives.
  const counts = [0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
  const labels = ["+", "+", "−", "−", "−"], isPositive = (i) => i < 2;
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const read = (s) => {
    const n = counts[s.more], pos = s.scores.slice(0, 2), neg = s.scores.slice(2, 5);
    const all = [...neg, ...Array(n).fill(s.scores[5])];
    const ours = push(all, pos), theirs = bce.push(all, pos);
    const column = (p) => [...p.pos, ...p.neg.slice(0, 3), sum(p.neg.slice(3))];
    return { n, pos, all, ours: column(ours), theirs: column(theirs), down: sum(ours.neg), bceDown: sum(theirs.neg) };
  };
  const short = (v) => L.number(v, v < 9.995 ? 2 : v < 99.95 ? 1 : 0);

  const X = [0.5, 7.4], Y = [-5, 7];
  L.define("multilabel_softmax", {
    words: "Scores of two positive and three negative labels and of further negatives, with the push on each",
    state: { scores: [1.5, -0.5, 0.5, -1.5, -2.5, -3], more: 4 },
    controls: [{
      name: "more", label: "further negatives", min: 0, max: counts.length - 1, step: 1, color: "ink",
      show: (v) => String(counts[v]).replace("1000", "1,000"),
    }],
    before: (s) => (s.now = read(s)),
    x: X, y: Y, height: 390, margins: [10, 6, 74, 32],
    draw(panel) {
      panel.axes({ xTicks: [], yTicks: [-4, -2, 0, 2, 4, 6], base: false });
      panel.text(() => [X[0] - 28 * panel.unit[0], Y[1] - 4 * panel.unit[1]], "score", { size: 13 });
      panel.curve(() => [X, [0, 0]], { color: "faint", width: 1.5, dash: 2 });
      panel.text(() => [X[1], -10 * panel.unit[1]], "threshold", { size: 13, anchor: "right" });
      // the two halves of the loss as levels: log(1 + sum e^s) above and -log(1 + sum e^-s) below the threshold
      const up = (s) => negatives(s.now.all), down = (s) => -positives(s.now.pos);
      const shownUp = (s) => Math.min(up(s), 6.4); // with 1,000 negatives the level may lie above the plot
      panel.curve((s) => [[X[0], 6.9], [up(s), up(s)]], { color: "multi-label softmax", width: 2 });
      panel.curve((s) => [[X[0], 6.9], [down(s), down(s)]], { color: "multi-label softmax", width: 2 });
      panel.curve((s) => [[6.9, 6.9], [down(s), Math.min(up(s), 7)]], { color: "multi-label softmax", width: 6, opacity: 0.45 });
      panel.text((s) => [6.82, shownUp(s) + 12 * panel.unit[1]], (s) => `negatives, ${L.number(up(s))}${up(s) > 7 ? " ↑" : ""}`,
        { color: "multi-label softmax", anchor: "right" });
      panel.text((s) => [6.82, down(s) - 12 * panel.unit[1]], (s) => `positives, ${L.number(-down(s))}`,
        { color: "multi-label softmax", anchor: "right" });
      const places = [1, 2, 3, 4, 5, 6.1];
      const shown = (s, i) => i < 5 || s.now.n > 0;
      const off = 0.13;
      places.forEach((x, i) => {
        const way = isPositive(i) ? 1 : -1;
        [["ours", "multi-label softmax", -off], ["theirs", "BCE", off]].forEach(([key, name, dx]) => {
          panel.curve((s) => {
            const from = s.scores[i] + way * 11 * panel.unit[1], size = 2 * s.now[key][i];
            const to = L.clip(from + way * size, Y[0], Y[1]);
            return [[x + dx, x + dx], shown(s, i) && size > 0.05 ? [from, to] : [NaN, NaN]];
          }, { color: name, width: 3, arrow: 3 });
          const row = key === "ours" ? 30 : 48;
          panel.text(() => [x, Y[0] - row * panel.unit[1]], (s) => (shown(s, i) ? short(s.now[key][i]) : "–"),
            { color: name, anchor: "middle", size: 13 });
        });
        panel.text(() => [x, Y[0] - 11 * panel.unit[1]],
          i < 5 ? labels[i] : (s) => `${String(counts[s.more]).replace("1000", "1,000")} × −`,
          { anchor: "middle", bold: true });
        panel.handle({
          at: (s) => [x, s.scores[i]], axis: "y", step: [0, 0.25], color: isPositive(i) ? "ink" : "faint", size: 8,
          face: isPositive(i) ? "o" : "[]",
          label: i < 5 ? `Score of ${isPositive(i) ? "positive" : "negative"} label ${isPositive(i) ? i + 1 : i - 1}`
            : "Score of the further negatives",
          says: (s) => `score ${L.number(s.scores[i])}, push ${short(s.now.ours[i])}, BCE's ${short(s.now.theirs[i])}`,
          move: (s, _, y) => (s.scores[i] = Math.round(20 * L.clip(y, -4.5, 4.5)) / 20),
        });
      });
      panel.text(() => [X[0] - 28 * panel.unit[0], Y[0] - 66 * panel.unit[1]], "push: multi-label softmax",
        { color: "multi-label softmax", size: 13 });
      panel.text(() => [X[0] + 150 * panel.unit[0], Y[0] - 66 * panel.unit[1]], "BCE", { color: "BCE", size: 13 });
    },
    says: ({ now, ...s }) => `Loss ${L.number(loss(now.all, now.pos))}, the gap between the two levels. ` +
      `The ${(now.n + 3).toLocaleString("en")} negatives are pushed down by ${short(now.down)} in sum, never by more ` +
      `than 1; BCE pushes them by ${short(now.bceDown)}.`,
  });
})();
