// The curves of the runs: several overlaid, runs that differ in their seed alone as one line with a band.

const FIRST = [
  /^eval\/([^/]+\/)?(reward|accuracy)$/, /^reward\/mean$/, /^completions\/mean_length$/, /^policy\/entropy$/, /^policy\/kl_old_k3$/,
  /^policy\/ratio_max$/, /^policy\/grad_norm$/, /^group\/zero_spread_fraction$/, /^completions\/clipped_ratio$/,
  /^episode\/turns\/mean$/, /^mismatch\/kl_k3$/, /^perf\/tokens_per_second$/,
];
const SECTIONS = ["eval", "reward", "rewards", "group", "completions", "episode", "environment", "tools", "stop", "policy", "mismatch", "rollout", "perf", "time"];
const FEW = 12; // points of a line that is not smoothed
const LOG_FROM = 100; // a largest ratio above which its curve begins on a logarithmic axis
const EVENT = { warning: "--warning", restart: "--bad", resume: "--accent" };
const numbers = head.runs.map((_, run) => load(`${run}/curves`));

function colour(run) {
  const by = banded() ? head.runs[run].experiment : run;
  return PALETTE[by % PALETTE.length];
}

function hidden() {
  return new Set((state.hide ?? "").split(".").filter(Boolean).map(Number));
}

function shown() {
  const away = hidden();
  return head.runs.map((_, run) => run).filter((run) => !away.has(run));
}

/** Whether runs of one experiment are one line. */
function banded() {
  return state.band !== "off" && new Set(head.runs.map((run) => run.experiment)).size < head.runs.length;
}

/** An exponential mean, each value corrected for how few came before it. */
function smooth(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

/** The unit in which the time of the runs is easily read. */
function clock(datas) {
  const longest = Math.max(...datas.map((data) => data.times.at(-1) ?? 0));
  return longest < 7200 ? { name: "minutes", seconds: 60 } : { name: "hours", seconds: 3600 };
}

/** A run's points of a metric, those that are there: steps, places on the axis, values. */
function points(data, metric, unit) {
  const values = data.metrics[metric] ?? [];
  const places = values.flatMap((value, place) => (value === null ? [] : [place]));
  const axis = { time: data.times.map((seconds) => seconds / unit.seconds), step: data.steps }[state.x ?? "step"];
  return { steps: places.map((place) => data.steps[place]), xs: places.map((place) => axis[place]), ys: places.map((place) => values[place]) };
}

/** One line of several runs: the mean at each step, with the lowest and the highest. */
function together(curves) {
  const by = new Map();
  for (const { steps, xs, ys } of curves) {
    steps.forEach((step, place) => {
      if (!by.has(step)) by.set(step, { xs: [], ys: [] });
      by.get(step).xs.push(xs[place]);
      by.get(step).ys.push(ys[place]);
    });
  }
  const steps = [...by.keys()].sort((a, b) => a - b);
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const at = steps.map((step) => by.get(step));
  return {
    steps,
    xs: at.map((one) => mean(one.xs)),
    ys: at.map((one) => mean(one.ys)),
    low: at.map((one) => Math.min(...one.ys)),
    high: at.map((one) => Math.max(...one.ys)),
  };
}

/** The lines of a metric: `{name, colour, steps, xs, ys}`, with `raw` where it is smoothed, `low` and `high` of a band. */
function lines(datas, metric) {
  const asked = Number(state.smooth ?? 0);
  const unit = clock(datas);
  const smoothed = shown().flatMap((run) => {
    const found = points(datas[run], metric, unit);
    const weight = found.ys.length < FEW ? 0 : asked; // a few evaluations are no noise
    return found.ys.length ? [{ run, ...found, raw: weight ? found.ys : null, ys: weight ? smooth(found.ys, weight) : found.ys }] : [];
  });
  if (!banded()) return smoothed.map((one) => ({ ...one, name: head.runs[one.run].name, colour: colour(one.run) }));
  const groups = Map.groupBy(smoothed, (one) => head.runs[one.run].experiment);
  return [...groups.values()].map((members) => ({
    ...(members.length > 1 ? together(members) : members[0]),
    name: experiment(members[0].run),
    colour: colour(members[0].run),
  }));
}

/** What the runs have in common that differ from this one in their seed only. */
function experiment(run) {
  const own = head.runs[run];
  const seeds = head.runs.filter((one) => one.experiment === own.experiment).length;
  return seeds > 1 ? `${own.what || own.recipe || own.name}, ${seeds} seeds` : own.name;
}

function traces(datas, metric) {
  return lines(datas, metric).flatMap((line) => {
    const [xs, ys] = thin(line.xs, line.ys);
    const drawn = [];
    const plain = { x: xs, mode: "lines", hoverinfo: "skip" };
    if (line.low) {
      const band = { ...plain, line: { width: 0 } };
      const [lowXs, low] = thin(line.xs, line.low);
      const [highXs, high] = thin(line.xs, line.high);
      drawn.push({ ...band, x: lowXs, y: low }, { ...band, x: highXs, y: high, fill: "tonexty", fillcolor: translucent(line.colour, 0.18) });
    } else if (line.raw) {
      const [rawXs, raw] = thin(line.xs, line.raw);
      drawn.push({ ...plain, x: rawXs, y: raw, line: { color: translucent(line.colour, 0.25), width: 1 } });
    }
    const marker = { size: 4, color: line.colour };
    drawn.push({
      x: xs, y: ys, mode: xs.length < 40 ? "lines+markers" : "lines", marker, line: { color: line.colour, width: 1.8 },
      name: safe(line.name), hovertemplate: "%{y:.4g}", run: line.run ?? null,
    });
    return drawn;
  });
}

/** Lines where something happened to the runs that are shown. */
function marks(datas) {
  if (state.events === "off") return [];
  return shown().flatMap((run) => datas[run].events.map((event) => {
    const x = state.x === "time" ? event.time / clock(datas).seconds : event.step;
    const line = { color: css(EVENT[event.kind]), width: 1, dash: "dot" };
    return { type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line, opacity: 0.6, layer: "below" };
  })).slice(0, 200);
}

function isLog(datas, metric) {
  const own = new Set((state.log ?? "").split(" ").filter(Boolean));
  if (own.has(metric)) return true;
  if (own.has(`-${metric}`)) return false;
  if (state.logy === "on") return true;
  return metric.endsWith("ratio_max") && datas.some((data) => (data.metrics[metric] ?? []).some((value) => value > LOG_FROM));
}

function card(datas, metric) {
  const node = el("div", { class: "plot" });
  const make = () => ({
    traces: traces(datas, metric),
    layout: {
      shapes: marks(datas),
      xaxis: { type: state.logx === "on" ? "log" : "linear", title: state.x === "time" ? { text: clock(datas).name, standoff: 4 } : undefined },
      yaxis: { type: isLog(datas, metric) ? "log" : "linear", rangemode: /^eval.*(reward|accuracy)$|fraction$|_ratio$/.test(metric) && !isLog(datas, metric) ? "tozero" : "normal" },
    },
  });
  const redraw = () => plot(node, make, (point) => state.x !== "time" && open(point));
  const toggle = el("button", {
    class: "small", "aria-pressed": String(isLog(datas, metric)), title: "logarithmic axis",
    onclick: (event) => {
      const on = !isLog(datas, metric);
      const others = (state.log ?? "").split(" ").filter((one) => one && one !== metric && one !== `-${metric}`);
      go({ log: [...others, on ? metric : `-${metric}`].join(" ") });
      event.target.setAttribute("aria-pressed", String(on));
      redraw();
    },
  }, "log");
  redraw();
  return el("figure", { class: "card", "data-metric": metric }, el("figcaption", null, el("span", { class: "grow" }, metric), toggle), node);
}

/** Show the completions of the step that was clicked. */
function open(point) {
  const run = point.data.run ?? shown()[0];
  go({ tab: "completions", run, from: point.x, to: point.x, row: null }, true);
  render();
}

function tiles(datas) {
  const runs = shown();
  if (runs.length !== 1) return null;
  const [run] = runs;
  const about = head.runs[run];
  const { metrics, times } = datas[run];
  const ends = (name) => {
    const values = (metrics[name] ?? []).filter((value) => value !== null);
    return values.length ? `${short(values[0])} → ${short(values.at(-1))}` : null;
  };
  const last = times.at(-1) ?? 0;
  const left = about.status === "going on" && about.step ? ` · about ${duration((last / about.step) * (about.total - about.step))} left` : "";
  const shownTiles = [
    ["reward on held-out prompts", ends("eval/reward")],
    ["mean reward", ends("reward/mean")],
    ["length, tokens", ends("completions/mean_length")],
    ["entropy, nats", ends("policy/entropy")],
    ["steps", `${about.step} of ${about.total}`],
    ["time", duration(last) + left],
  ];
  return el("div", { class: "tiles" }, shownTiles.filter(([, value]) => value).map(([label, value]) => el("div", null, el("b", null, value), el("span", null, label))));
}

function curveTools(again) {
  const change = (key) => (value) => {
    go({ [key]: value });
    again();
  };
  const flag = (key, label) => checkbox(label, state[key] === "on", (on) => change(key)(on ? "on" : null));
  const slider = el("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: state.smooth ?? 0, "aria-label": "smoothing" });
  slider.addEventListener("input", calm(() => change("smooth")(slider.value === "0" ? null : slider.value), 60));
  const several = new Set(head.runs.map((run) => run.experiment)).size < head.runs.length;
  return el("div", { class: "bar" },
    field("smoothing", slider),
    field("x", select([["step", "step"], ["time", "time"]], state.x ?? "step", (value) => change("x")(value === "step" ? null : value))),
    flag("logx", "log x"),
    flag("logy", "log y"),
    several && checkbox("mean and band over seeds", state.band !== "off", (on) => {
      go({ band: on ? null : "off" });
      render();
    }),
    checkbox("warnings and restarts", state.events !== "off", (on) => change("events")(on ? null : "off")),
    el("input", { type: "search", placeholder: "find a metric", value: state.find ?? "", oninput: calm((event) => change("find")(event.target.value)) }),
  );
}

async function showCurves(view) {
  const datas = await Promise.all(numbers);
  const names = [...new Set(datas.flatMap((data) => Object.keys(data.metrics)))];
  const body = el("div");
  const again = () => {
    const find = (state.find ?? "").toLowerCase();
    const found = names.filter((name) => name.toLowerCase().includes(find));
    const first = FIRST.flatMap((pattern) => found.filter((name) => pattern.test(name)));
    const of = (name) => (SECTIONS.includes(name.split("/")[0]) ? name.split("/")[0] : "other");
    const sections = [...SECTIONS, "other"].map((section) => [section, found.filter((name) => of(name) === section).sort()]);
    const grid = (some) => el("div", { class: "grid" }, some.map((name) => card(datas, name)));
    body.replaceChildren(
      ...(find ? [grid(found)] : [
        grid(first),
        ...sections.filter(([, some]) => some.length).map(([section, some]) => {
          const inside = el("details", { open: (state.open ?? "").split(".").includes(section) }, el("summary", null, `${section} `, el("small", null, some.length)));
          const fill = () => inside.childElementCount === 1 && inside.append(grid(some));
          inside.addEventListener("toggle", () => {
            const others = (state.open ?? "").split(".").filter((one) => one && one !== section);
            go({ open: (inside.open ? [...others, section] : others).join(".") });
            if (inside.open) fill();
          });
          if (inside.open) fill();
          return inside;
        }),
      ]),
    );
  };
  again();
  view.replaceChildren(tiles(datas) ?? "", curveTools(again), body);
}
