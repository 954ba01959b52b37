// A completion token by token, coloured by what the last update on it in the step made of each.

const STRONGEST = 60; // percent of the full colour
const TYPICAL = 0.98; // of the tokens lie within the colours; those beyond have the strongest

/** By column: its title, what 0 to 1 and 0 to -1 of the colours stand for, and what no colour stands for. */
const COLOURS = {
  logps: { title: "log-prob", from: (value) => value, to: (place) => place, least: 1, about: "how likely the token is now" },
  ratio: { title: "ratio", from: Math.log, to: Math.exp, least: 0.01, about: "its probability now over that at rollout time" },
  gradient_weight: { title: "gate weight", from: (value) => value - 1, to: (place) => place + 1, least: 0.01, about: "the share of its unclipped gradient that the loss lets through" },
  entropy: { title: "entropy", from: (value) => value, to: (place) => place, least: 1, about: "of the distribution that it was drawn from, in nats" },
};
const NUMBERS = { logps: "log-prob", old_logps: "old log-prob", rollout_logps: "vLLM's log-prob", ratio: "ratio", gradient_weight: "gate weight", entropy: "entropy", kl: "KL to the reference", correction: "correction" };

/** A number as the page has it: with four digits. */
function exact(value) {
  return value === null ? "–" : String(+value.toPrecision(4));
}

/** Values between -1 and 1 of a column, so that they spread over the rows of a group; those of masked tokens are null. */
function scaleOf(column, rows) {
  const { from, to, least } = COLOURS[column];
  const found = rows.flatMap((row) => row[column]).filter((value) => value !== null).map(from);
  const sizes = found.map(Math.abs).sort((a, b) => a - b);
  const extent = Math.max(least, sizes[Math.ceil(TYPICAL * (sizes.length - 1))] ?? 0);
  return {
    place: (value) => Math.max(-1, Math.min(1, from(value) / extent)),
    low: found.some((value) => value < 0) && to(-extent),
    middle: to(0),
    high: found.some((value) => value > 0) && to(extent),
  };
}

function legend(column, scale) {
  const side = (name) => el("i", { class: name });
  return el("span", { class: "legend quiet", title: `${COLOURS[column].title}: ${COLOURS[column].about}` },
    scale.low !== false && [`≤ ${exact(scale.low)}`, side("low")],
    exact(scale.middle),
    scale.high !== false && [side("high"), `≥ ${exact(scale.high)}`],
    el("span", { class: "token masked" }, "not trained on"));
}

function tokenSpan(column, scale, row, place) {
  const text = row.texts[place];
  const kind = text === "" ? "part" : text.includes("\n") ? "line" : "";
  const name = `token ${place + 1}: ${text === "" ? "a part of the next character" : JSON.stringify(text)}`;
  const value = row[column][place];
  if (row.logps[place] === null) return el("span", { class: `token masked ${kind}`, title: `${name}\nnot trained on` }, text);
  const at = value === null ? 0 : scale.place(value);
  const told = Object.entries(NUMBERS).filter(([key]) => row[key]).map(([key, title]) => `${title} ${exact(row[key][place])}`);
  return el("span", { class: `token ${at < 0 ? "low" : "high"} ${kind}`, style: `--at:${(Math.abs(at) * STRONGEST).toFixed(1)}%`, title: [name, ...told].join("\n") }, text);
}

/** The rows of a completion; one that was not trained on in the step has none. */
function tokenView(column, scale, rows) {
  return rows.map((row, number) => [
    rows.length > 1 && el("span", { class: "role" }, `row ${number + 1}`),
    el("pre", { class: "tokens" }, row.texts.map((_, place) => tokenSpan(column, scale, row, place))),
  ]);
}

/** What the completions of a step are coloured by: the words alone, or a column. */
function colourSwitch(run, redraw) {
  if (!document.querySelector(`script[id^="${run}/tokens/"]`)) return null;
  const button = (column, title, about) => el("button", {
    class: "small", "aria-pressed": String((state.colour ?? "") === column), title: about,
    onclick: () => {
      go({ colour: column });
      redraw();
    },
  }, title);
  return el("span", { class: "switch", role: "group", "aria-label": "colour tokens by" },
    button("", "text", "the words alone"), Object.entries(COLOURS).map(([column, { title, about }]) => button(column, title, about)));
}
