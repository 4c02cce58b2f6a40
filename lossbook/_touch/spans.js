// Chapter "spans": a sentence, its matrix of pairs for one type of entity, and the push on the pair that is chosen.
(function () {
  "use strict";
  const L = window.lossbookTouch, { softplus, sigmoid, logSumExp } = L;

  // A matrix of scores for one type: rows are starts, columns are ends; `tokens` of them are words, the rest padding.
  const place = (start, end, length) => start * length + end;
  const inside = (start, end, tokens) => start <= end && end < tokens;
  const pairs = (scores, tokens) => scores.flatMap((row, i) => row.map((s, j) => ({ s, i, j })))
    .filter(({ i, j }) => inside(i, j, tokens));
  const sides = (scores, spans, tokens) => {
    const positive = ({ i, j }) => spans.includes(place(i, j, scores.length));
    const found = pairs(scores, tokens).map((p) => ({ ...p, positive: positive(p) }));
    return [found, found.filter((p) => !p.positive).map((p) => p.s), found.filter((p) => p.positive).map((p) => -p.s)];
  };
  const top = (values) => (values.length ? logSumExp(values) : -Infinity);
  const loss = (scores, spans, tokens) => {
    const [, negatives, positives] = sides(scores, spans, tokens);
    return softplus(top(negatives)) + softplus(top(positives));
  };
  // The size of the gradient for each pair, 0 outside of the mask: spans are pushed up, all others down.
  const spread = (found, scores, size) => {
    const all = scores.map((row) => row.map(() => 0));
    found.forEach((p) => (all[p.i][p.j] = size(p)));
    return all;
  };
  const push = (scores, spans, tokens) => {
    const [found, negatives, positives] = sides(scores, spans, tokens), up = top(negatives), down = top(positives);
    return spread(found, scores, ({ s, positive }) =>
      positive ? Math.exp(-s - softplus(down)) : Math.exp(s - softplus(up)));
  };
  const bce = {
    loss: (scores, spans, tokens) => sides(scores, spans, tokens)[0]
      .reduce((sum, { s, positive }) => sum + softplus(positive ? -s : s), 0),
    push: (scores, spans, tokens) => spread(sides(scores, spans, tokens)[0], scores, ({ s, positive }) =>
      sigmoid(positive ? -s : s)),
  };
  L.spans = { place, loss, push, bce };

  const words = ["Ada", "Holt", "runs", "the", "Bank", "of", "York", "–", "–"], N = words.length, tokens = 7;
  const types = {
    person: { spans: [[0, 1]], scores: [[0, 1, 1], [0, 0, -0.5], [1, 1, -1], [0, 4, -2]] },
    place: { spans: [[6, 6]], scores: [[6, 6, 1.5], [4, 6, -0.75], [1, 1, -1.5], [0, 6, -2]] },
    organisation: { spans: [[4, 6]], scores: [[4, 6, 0.5], [3, 6, 0.25], [4, 4, -0.5], [6, 6, -1], [2, 6, -1.5]] },
  };
  const names = Object.keys(types);
  const first = (name) => {
    const scores = words.map((_, i) => words.map((__, j) => -2.5 - ((3 * i + 5 * j) % 4) / 2));
    types[name].scores.forEach(([i, j, s]) => (scores[i][j] = s));
    return scores;
  };
  const isSpan = (s) => types[s.type].spans.some(([i, j]) => i === s.start && j === s.end);
  const square = (i, j, r = 0.46) => [
    [j + 0.5 - r, j + 0.5 + r, j + 0.5 + r, j + 0.5 - r, j + 0.5 - r],
    [-i - 0.5 - r, -i - 0.5 - r, -i - 0.5 + r, -i - 0.5 + r, -i - 0.5 - r],
  ];
  // several squares in one curve, with gaps
  const squares = (cells, r) => {
    const all = cells.map(([i, j]) => square(i, j, r));
    return [0, 1].map((k) => all.flatMap((points) => [...points[k], NaN]));
  };
  const cells = words.flatMap((_, i) => words.map((__, j) => [i, j]));
  const masked = cells.filter(([i, j]) => !inside(i, j, tokens));
  const whole = (v) => Math.floor(L.clip(v, 0, N - 0.5));

  L.define("spans", {
    words: "The matrix of all pairs of first and last word of a sentence, for one type of entity",
    state: {
      scores: Object.fromEntries(names.map((name) => [name, first(name)])), type: "organisation", start: 4, end: 6,
      score: 0.5, show: "score", key: "",
    },
    controls: [
      { name: "score", label: "score of this pair", min: -6, max: 6, step: 0.25,
        show: (v, s) => (inside(s.start, s.end, tokens) ? L.number(v) : "masked") },
      { name: "type", label: "Type of entity", title: "Type:", choices: names.map((name) => [name, name]) },
      { name: "show", label: "What the cells show", title: "Cells:", choices: [["score", "score"], ["push", "push"]] },
    ],
    before(s) {
      const key = `${s.type} ${s.start} ${s.end}`;
      if (s.key === key) s.scores[s.type][s.start][s.end] = s.score; // the slider moved
      else [s.score, s.key] = [s.scores[s.type][s.start][s.end], key]; // another pair
      const all = [s.scores[s.type], types[s.type].spans.map(([i, j]) => place(i, j, N)), tokens];
      const [found] = sides(...all), own = push(...all), theirs = bce.push(...all);
      const down = (m) => found.reduce((sum, { i, j, positive }) => sum + (positive ? 0 : m[i][j]), 0);
      s.now = {
        push: own, bce: theirs, loss: loss(...all), pairs: found.length, down: down(own), bceDown: down(theirs),
      };
    },
    x: [0, N], y: [-N, 1.9], square: true, widest: 430, margins: [4, 8, 6, 46],
    draw(panel) {
      panel.curve(() => squares(masked, 0.46), { color: "faint", width: 0, fill: 0.22 });
      cells.filter(([i, j]) => inside(i, j, tokens)).forEach(([i, j]) => {
        const value = (s) => (s.show === "score" ? sigmoid(s.scores[s.type][i][j]) : s.now.push[i][j]);
        panel.curve(() => square(i, j), { color: "multi-label softmax", width: 0, fill: (s) => 0.04 + 0.9 * value(s) });
      });
      panel.curve((s) => squares(types[s.type].spans, 0.44), { color: "ink", width: 3 });
      words.forEach((word, k) => {
        const own = (edge) => (s) => (s[edge] === k ? word : "");
        const other = (edge) => (s) => (s[edge] === k ? "" : word);
        [[own, true], [other, false]].forEach(([says, bold]) => {
          panel.text(() => [k + 0.5, 0.42], says("end"), { anchor: "middle", size: 13, bold });
          panel.text(() => [-6 * panel.unit[0], -k - 0.5], says("start"), { anchor: "right", size: 13, bold });
        });
      });
      panel.curve((s) => [[s.start + 0.2, s.end + 0.8], [1.3, 1.3]], { color: "multi-label softmax", width: 5 });
      const says = (s) => `words ${s.start} to ${s.end}`;
      panel.handle({
        at: (s) => [s.end + 0.5, -s.start - 0.5], color: "ink", size: 5, step: [1, 1], label: "Cell of the pair", says,
        move: (s, x, y) => ([s.start, s.end] = [whole(-y), whole(x)]),
      });
      [["start", 0.2, "First word of the span"], ["end", 0.8, "Last word of the span"]].forEach(([edge, dx, label]) => {
        panel.handle({
          at: (s) => [s[edge] + dx, 1.3], axis: "x", color: "multi-label softmax", size: 8, step: [1, 0], label, says,
          move: (s, x) => (s[edge] = whole(x)),
        });
      });
      panel.stage.bars("Push on this pair:", [
        { label: "multi-label softmax", color: "multi-label softmax", value: (s) => s.now.push[s.start][s.end] },
        { label: "BCE, summed", color: "BCE", value: (s) => s.now.bce[s.start][s.end] },
        { label: "BCE, mean of the pairs", color: "BCE", value: (s) => s.now.bce[s.start][s.end] / s.now.pairs },
      ].map((row) => ({ ...row, show: (v) => L.number(v) })));
    },
    says: (s) => {
      if (s.end < s.start) return "It would end before it starts: the mask takes the pair away, and nothing pushes it.";
      if (s.end >= tokens) return "It reaches into the padding: the mask takes the pair away, and nothing pushes it.";
      const span = isSpan(s), article = s.type === "organisation" ? "an" : "a";
      return `“${words.slice(s.start, s.end + 1).join(" ")}” is ${span ? article : `no`} ${s.type}. Its index is ` +
        `${s.start} · ${N} + ${s.end} = ${place(s.start, s.end, N)}. It is pushed ${span ? "up" : "down"} by ` +
        `${L.number(s.now.push[s.start][s.end])}; all false pairs together by ${L.number(s.now.down)}, with summed ` +
        `BCE by ${L.number(s.now.bceDown)}. Loss ${L.number(s.now.loss)}.`;
    },
  });
})();
