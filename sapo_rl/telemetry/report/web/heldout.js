// The held-out prompts over the evaluations: what the model made of the same one, again and again.

const FILTERS = {
  all: ["all", () => true],
  changed: ["changed", (values) => new Set(values.filter((value) => value !== null)).size > 1],
  better: ["better at the end", (values) => values.at(-1) > values[0]],
  worse: ["worse at the end", (values) => values.at(-1) < values[0]],
  low: ["never the best reward", (values) => values.every((value) => value === null || value < rewardRange[1])],
};

/** The prompts of a set with the rows of the index that each evaluation wrote on them: greedy ones first. */
function heldOut(index, set) {
  const found = new Map();
  for (let row = 0; row < index.file.length; row++) {
    if (index.set[row] !== set) continue;
    const number = index.prompt_index[row];
    if (!found.has(number)) found.set(number, index.steps.map(() => []));
    found.get(number)[index.file[row]].push(row);
  }
  return found;
}

/** The reward of a prompt in an evaluation: of the greedy completion, else the mean of those that were sampled. */
function rewardAt(index, rows) {
  const greedy = rows.filter((row) => index.greedy[row]);
  const values = (greedy.length ? greedy : rows).map((row) => index.reward[row]).filter((value) => value !== null);
  return values.length ? mean(values) : null;
}

async function overTime(run, index, number, rows) {
  const columns = await Promise.all(rows.map(async (some, file) => {
    if (!some.length) return null;
    const chunk = await load(`${run}/eval/${index.steps[file]}`);
    const one = (row) => chunk.rows[row - index.starts[file]];
    const cards = some.map((row, place) => completionCard(index.greedy[row] ? `step ${index.steps[file]}` : `step ${index.steps[file]}, sample ${place}`, facts(index, row), one(row)));
    return { cards, prompt: chunk.prompts[one(some[0]).prompt] };
  }));
  const known = columns.filter(Boolean);
  return [
    el("div", { class: "bar" }, el("h2", null, `held-out prompt #${number}`)),
    promptView(known[0].prompt),
    el("div", { class: "group" }, known.map(({ cards }) => cards)),
  ];
}

async function showHeldOut(view) {
  const run = Math.min(Number(state.run ?? shown()[0] ?? 0), head.runs.length - 1);
  const index = await indexOf(run, "eval");
  if (!index) return view.replaceChildren(el("p", { class: "empty" }, `${head.runs[run].name} keeps no completions of held-out prompts.`));
  rewardRange = range(index.reward);
  const sets = [...new Set(index.set)];
  const set = sets.includes(state.set) ? state.set : sets[0];
  const prompts = [...heldOut(index, set)].map(([number, rows]) => ({ number, rows, values: rows.map((some) => rewardAt(index, some)) }));
  const left = el("div", { class: "left" });
  const detail = el("div", { class: "detail" });
  const count = el("span", { class: "quiet", id: "count" });
  const width = `width:${20 * index.steps.length}px`;
  let list = null;
  const choose = async (one) => {
    go({ held: one.number });
    for (const node of list.querySelectorAll(".row")) node.classList.toggle("chosen", node.dataset.row === String(one.number));
    detail.replaceChildren(...(await overTime(run, index, one.number, one.rows)));
  };
  const again = () => {
    const asked = (state.prompt ?? "").toLowerCase();
    const kept = prompts.filter(({ number, values }) => FILTERS[state.which ?? "all"][1](values) && (index.prompts[number] ?? "").toLowerCase().includes(asked));
    list = virtual(kept.length, (place) => {
      const one = kept[place];
      return el("button", { class: `row held ${String(one.number) === String(state.held) ? "chosen" : ""}`, "data-row": one.number, onclick: () => choose(one) },
        el("span", { class: "cells", style: width }, one.values.map((value, file) => el("i", { style: `--at:${rewardPlace(value)}`, class: value === null ? "none" : "", title: `step ${index.steps[file]}: ${short(value)}` }))),
        el("span", { class: "said" }, index.prompts[one.number] ?? ""));
    });
    left.replaceChildren(el("div", { class: "row held heading" }, el("span", { class: "cells", style: width }, index.steps.map((step, file) => el("small", null, file % Math.ceil(index.steps.length / 12) ? "" : step))), el("span", { class: "said" }, "held-out prompt")), list);
    list.draw();
    count.textContent = `${kept.length.toLocaleString("en")} of ${prompts.length.toLocaleString("en")} prompts, ${index.steps.length} evaluations`;
    const one = kept.find(({ number }) => String(number) === String(state.held)) ?? kept[0];
    if (one) choose(one);
    else detail.replaceChildren(el("p", { class: "empty" }, "No prompt is like that."));
  };
  const change = (key) => (value) => {
    go({ [key]: value });
    if (key === "which" || key === "prompt") again();
    else render();
  };
  view.replaceChildren(
    el("div", { class: "bar filters" },
      head.runs.length > 1 && field("run", select(head.runs.map((one, number) => [number, one.name]), run, change("run"))),
      sets.length > 1 && field("set", select(sets.map((name) => [name, name]), set, change("set"))),
      field("prompts", select(Object.entries(FILTERS).map(([key, [label]]) => [key, label]), state.which ?? "all", change("which"))),
      el("input", { type: "search", placeholder: "prompt", "aria-label": "prompt", value: state.prompt ?? "", oninput: calm((event) => change("prompt")(event.target.value)) })),
    count, el("div", { class: "split" }, left, detail));
  again();
}
