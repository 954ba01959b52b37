// A browser of completions: a list of all, filtered by what the index knows, and the group of the one that is chosen.

const ROW = 28; // pixels
const SORTS = { step: "step", reward: "reward", advantage: "advantage", tokens: "length", turns: "turns" };

/** The index of a kind (`step`, `eval`) with the place of each completion: its file and its row in it. */
async function indexOf(run, kind) {
  const found = await load(`${run}/${kind}`);
  if (!found) return null;
  found.file ??= found.counts.flatMap((count, file) => Array(count).fill(file));
  found.starts ??= found.counts.reduce((starts, count) => [...starts, starts.at(-1) + count], [0]);
  return found;
}

function chunkOf(run, kind, index, row) {
  return load(`${run}/${kind}/${index.steps[index.file[row]]}`);
}

function facts(index, row) {
  return Object.fromEntries(["reward", "advantage", "tokens", "turns", "stop", "greedy"].map((name) => [name, index[name][row]]));
}

function range(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value !== null && value < low) low = value;
    if (value !== null && value > high) high = value;
  }
  return low <= high ? [low, high] : [0, 1];
}

/** The rows of the index that the filters leave, in the order that is asked for. */
function filtered(index) {
  const bound = (name) => (state[name] === undefined || state[name] === "" ? null : Number(state[name]));
  const within = (value, low, high) => (low === null || (value !== null && value >= low)) && (high === null || (value !== null && value <= high));
  const bounds = [["step", "from", "to"], ["reward", "low", "high"], ["tokens", "short", "long"]].map(([name, low, high]) => [name, bound(low), bound(high)]);
  const asked = (state.prompt ?? "").toLowerCase();
  const number = /^#\d+$/.test(asked) ? Number(asked.slice(1)) : null;
  const prompts = new Set(Object.entries(index.prompts).filter(([key, text]) => (number === null ? text.toLowerCase().includes(asked) : Number(key) === number)).map(([key]) => Number(key)));
  const found = [];
  for (let row = 0; row < index.file.length; row++) {
    if (state.stop && index.stop[row] !== state.stop) continue;
    if (asked && !prompts.has(index.prompt_index[row])) continue;
    const value = (name) => (name === "step" ? index.steps[index.file[row]] : index[name][row]);
    if (bounds.every(([name, low, high]) => within(value(name), low, high))) found.push(row);
  }
  const by = state.sort ?? "step";
  if (by !== "step") found.sort((a, b) => (index[by][a] ?? -Infinity) - (index[by][b] ?? -Infinity) || a - b);
  return state.down === "on" ? found.reverse() : found;
}

/** A list of so many rows, of which those in sight exist. `make` returns a row's element. */
function virtual(count, make) {
  const inner = el("div", { class: "inner", style: `height:${count * ROW}px` });
  const list = el("div", { class: "list", tabindex: 0 }, inner);
  const draw = () => {
    const focused = list.contains(document.activeElement);
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(count, Math.ceil((list.scrollTop + (list.clientHeight || 600)) / ROW) + 5);
    inner.replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, place) => {
      const node = make(first + place);
      node.style.top = `${(first + place) * ROW}px`;
      return node;
    }));
    if (focused) list.focus({ preventScroll: true }); // its row is another element now
  };
  list.addEventListener("scroll", () => requestAnimationFrame(draw));
  new ResizeObserver(draw).observe(list);
  list.draw = draw;
  return list;
}

function listRow(run, index, row, chosen, choose) {
  const { reward, advantage, tokens, turns, stop } = facts(index, row);
  const said = el("span", { class: "said" });
  chunkOf(run, "step", index, row).then((chunk) => {
    said.textContent = snippet(chunk.rows[row - index.starts[index.file[row]]]).slice(0, 300);
  });
  return el("button", { class: `row ${row === chosen ? "chosen" : ""}`, "data-row": row, onclick: () => choose(row) },
    el("span", { class: "number" }, index.steps[index.file[row]]),
    el("span", { class: "number reward", style: `--at:${rewardPlace(reward)}` }, short(reward)),
    el("span", { class: `number ${advantage > 0 ? "up" : advantage < 0 ? "down" : ""}` }, short(advantage)),
    el("span", { class: "number" }, short(tokens)),
    el("span", { class: `stop ${stop}` }, turns > 1 ? `${stop} · ${turns}` : stop),
    el("span", { class: "said asked" }, index.prompts[index.prompt_index[row]] ?? ""),
    said);
}

function filterBar(run, index, again) {
  const change = (key) => (value) => {
    go({ [key]: value });
    again();
  };
  const box = (key, label, placeholder) => el("input", {
    type: "number", step: "any", "aria-label": label, placeholder, value: state[key] ?? "", oninput: calm((event) => change(key)(event.target.value)),
  });
  const between = (label, low, high, [least, most]) => el("label", { class: "field" }, el("span", null, label), box(low, `${label} from`, short(least)), "–", box(high, `${label} to`, short(most)));
  const stops = [...new Set(index.stop)].sort();
  return el("div", { class: "bar filters" },
    head.runs.length > 1 && field("run", select(head.runs.map((one, number) => [number, one.name]), run, (value) => {
      go({ run: value, row: null });
      render();
    })),
    between("step", "from", "to", [index.steps[0], index.steps.at(-1)]),
    between("reward", "low", "high", range(index.reward)),
    between("tokens", "short", "long", range(index.tokens)),
    field("stop", select([["", "any"], ...stops.map((stop) => [stop, stop])], state.stop ?? "", change("stop"))),
    el("input", { type: "search", placeholder: "prompt, or #number", "aria-label": "prompt", value: state.prompt ?? "", oninput: calm((event) => change("prompt")(event.target.value)) }),
    el("input", { type: "search", placeholder: "words of the completion", "aria-label": "completion", value: state.words ?? "", oninput: calm((event) => change("words")(event.target.value), 400) }),
    el("button", { class: "small", onclick: () => {
      go(Object.fromEntries(["from", "to", "low", "high", "short", "long", "stop", "prompt", "words", "sort", "down"].map((key) => [key, null])));
      render();
    } }, "clear"));
}

function sortHeader(again) {
  const titles = [["step", "step"], ["reward", "reward"], ["advantage", "adv."], ["tokens", "tokens"], ["turns", "stop"]];
  const by = state.sort ?? "step";
  return el("div", { class: "row heading" }, titles.map(([name, title]) => el("button", {
    class: "number", title: `sort by ${SORTS[name]}`, "aria-pressed": String(by === name),
    onclick: () => {
      go({ sort: name === "step" ? null : name, down: by === name && state.down !== "on" ? "on" : null });
      again();
    },
  }, `${title}${by === name ? (state.down === "on" ? " ↓" : " ↑") : ""}`)), el("span", { class: "said asked" }, "prompt"), el("span", { class: "said" }, "completion"));
}

/** Those of the rows whose completion holds the words; `tell` hears of each stretch that was looked through. */
async function searched(run, index, rows, asked, tell, ended) {
  const found = [];
  const byFile = Map.groupBy(rows, (row) => index.file[row]);
  let done = 0;
  for (const [file, some] of byFile) {
    const chunk = await load(`${run}/step/${index.steps[file]}`);
    if (ended()) return null;
    for (const row of some) {
      const one = chunk.rows[row - index.starts[file]];
      const spoken = one.conversations?.flatMap(({ messages }) => messages) ?? one.messages;
      const text = spoken ? spoken.map((said) => words(said.content)).join("\n") : one.completion ?? "";
      if (text.toLowerCase().includes(asked)) found.push(row);
    }
    done += some.length;
    tell(done / rows.length);
  }
  const place = new Map(rows.map((row, number) => [row, number]));
  return found.sort((a, b) => place.get(a) - place.get(b));
}

/** The group of a completion, side by side. */
async function groupView(run, index, row, redraw) {
  const file = index.file[row];
  const chunk = await chunkOf(run, "step", index, row);
  const own = chunk.rows[row - index.starts[file]];
  const rows = chunk.rows.flatMap((one, place) => (one.group === own.group ? [place + index.starts[file]] : []));
  const ordered = [row, ...rows.filter((one) => one !== row)];
  const rewards = rows.map((one) => index.reward[one]).filter((value) => value !== null);
  const flat = Math.max(...rewards) - Math.min(...rewards) < 1e-9;
  const step = index.steps[file];
  const column = COLOURS[state.colour] && state.colour;
  const values = column && (await load(`${run}/tokens/${step}`));
  const scale = values && scaleOf(column, rows.flatMap((one) => values[one - index.starts[file]] ?? []));
  const coloured = (one) => {
    const own = values?.[one - index.starts[file]];
    if (own) return { tokens: tokenView(column, scale, own) };
    return column ? { note: values ? "not trained on in this step" : "the page holds no tokens of this step" } : {};
  };
  return [
    el("div", { class: "bar" }, colourSwitch(run, redraw), scale && legend(column, scale)),
    el("div", { class: "bar" },
      el("h2", null, `step ${step}, prompt #${index.prompt_index[row]}`),
      el("span", { class: "quiet" }, `${rows.length} completions, mean reward ${short(mean(rewards))}${flat && rewards.length > 1 ? ": all the same, nothing to learn" : ""}`)),
    promptView(chunk.prompts[own.prompt]),
    el("div", { class: "group" }, ordered.map((one) => completionCard(`${one - rows[0] + 1}`, facts(index, one), chunk.rows[one - index.starts[file]], { chosen: one === row, ...coloured(one) }))),
  ];
}

async function showCompletions(view) {
  const run = Math.min(Number(state.run ?? shown()[0] ?? 0), head.runs.length - 1);
  const index = await indexOf(run, "step");
  if (!index) return view.replaceChildren(el("p", { class: "empty" }, `${head.runs[run].name} keeps no completions.`));
  rewardRange = range(index.reward);
  const count = el("span", { class: "quiet", id: "count" });
  const left = el("div", { class: "left" });
  const detail = el("div", { class: "detail" });
  let list = null;
  let rows = [];
  let looking = 0;
  const choose = async (row) => {
    go({ row });
    for (const node of list.querySelectorAll(".row")) node.classList.toggle("chosen", node.dataset.row === String(row));
    const redraw = async () => detail.replaceChildren(...(await groupView(run, index, row, redraw)));
    await redraw();
    detail.scrollTop = 0;
  };
  const again = async () => {
    const own = ++looking;
    let found = filtered(index);
    if (state.words) {
      found = await searched(run, index, found, state.words.toLowerCase(), (share) => { count.textContent = `looked through ${Math.round(100 * share)}%`; }, () => own !== looking);
      if (found === null) return;
    }
    rows = found;
    list = virtual(found.length, (place) => listRow(run, index, found[place], Number(state.row ?? -1), choose));
    left.replaceChildren(sortHeader(again), list);
    list.draw();
    const thinned = index.files > index.steps.length ? ` (of ${index.steps.length} of ${index.files} steps: the page holds no more)` : "";
    count.textContent = `${rows.length.toLocaleString("en")} of ${index.file.length.toLocaleString("en")} completions${thinned}`;
    const row = rows.includes(Number(state.row)) ? Number(state.row) : rows[0];
    if (row !== undefined) choose(row);
    else detail.replaceChildren(el("p", { class: "empty" }, "No completion is like that."));
  };
  view.replaceChildren(filterBar(run, index, again), count, el("div", { class: "split" }, left, detail));
  document.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
    if (!step || !rows.length || /INPUT|SELECT/.test(event.target.tagName)) return;
    event.preventDefault();
    const place = Math.max(0, Math.min(rows.length - 1, rows.indexOf(Number(state.row)) + step));
    list.scrollTop = Math.min(place * ROW, Math.max(list.scrollTop, (place + 1) * ROW - list.clientHeight));
    choose(rows[place]);
  };
  await again();
}
