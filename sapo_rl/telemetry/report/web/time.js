// Where the time goes, and what happened when.

const PHASES = { rollout: 0, wait: 9, reward: 1, old_logps: 4, update: 3, sync: 8, other: 7, eval: 5 };

function phaseColour(phase) {
  return PALETTE[PHASES[phase] ?? 6];
}

function mean(values) {
  const found = values.filter((value) => value !== null);
  return found.length ? found.reduce((a, b) => a + b, 0) / found.length : 0;
}

/** Bars of the mean seconds by phase, one a run. */
function phaseBars(datas, node) {
  const runs = shown().toReversed();
  const phases = [...new Set(runs.flatMap((run) => Object.keys(datas[run].phases)))];
  node.style.height = `${70 + 26 * runs.length}px`;
  plot(node, () => ({
    traces: phases.map((phase) => ({
      type: "bar", orientation: "h", name: safe(phase), marker: { color: phaseColour(phase) }, hovertemplate: "%{x:.3g} s",
      x: runs.map((run) => mean(datas[run].phases[phase] ?? [])), y: runs.map((run) => safe(head.runs[run].name)),
    })),
    layout: { barmode: "stack", showlegend: true, legend: { orientation: "h", y: -0.25, yanchor: "top", traceorder: "normal" }, hovermode: "y unified", margin: { l: 44, r: 10, t: 6, b: 60 }, xaxis: { title: { text: "seconds a step", standoff: 4 } } },
  }));
  return node;
}

/** The phases of one run's steps, one on the other. */
function phaseSteps(data, node) {
  const steps = data.steps.flatMap((step, place) => (Object.values(data.phases).some((values) => values[place] !== null) ? [place] : []));
  plot(node, () => ({
    traces: Object.entries(data.phases).map(([phase, values]) => ({
      x: steps.map((place) => data.steps[place]), y: steps.map((place) => values[place] ?? 0), stackgroup: "all", mode: "lines",
      line: { width: 0.5, color: phaseColour(phase) }, fillcolor: translucent(phaseColour(phase), 0.75), name: safe(phase), hovertemplate: "%{y:.3g} s",
    })),
    layout: { showlegend: true, legend: { orientation: "h", y: -0.15, yanchor: "top", traceorder: "normal" }, margin: { l: 44, r: 10, t: 6, b: 60 }, yaxis: { rangemode: "tozero", title: { text: "seconds", standoff: 4 } } },
  }));
  return node;
}

/** What happened to each run, on the axis of its time. */
function timeline(datas, node) {
  const runs = shown().toReversed();
  const unit = clock(datas);
  node.style.height = `${70 + 26 * runs.length}px`;
  const row = (run) => safe(head.runs[run].name);
  plot(node, () => ({
    traces: [
      ...runs.map((run) => ({ x: [0, (datas[run].times.at(-1) ?? 0) / unit.seconds], y: [row(run), row(run)], mode: "lines", line: { color: colour(run), width: 5 }, opacity: 0.35, hoverinfo: "skip" })),
      ...Object.entries(EVENT).map(([kind, name]) => {
        const found = runs.flatMap((run) => datas[run].events.filter((event) => event.kind === kind).map((event) => [run, event]));
        return {
          x: found.map(([, event]) => event.time / unit.seconds), y: found.map(([run]) => row(run)), text: found.map(([, event]) => safe(`step ${event.step}: ${event.text.slice(0, 160)}`)),
          mode: "markers", name: kind, marker: { color: css(name), size: 10, symbol: kind === "warning" ? "triangle-up" : kind === "restart" ? "x" : "diamond" }, hovertemplate: "%{text}<extra></extra>",
        };
      }),
    ],
    layout: { hovermode: "closest", xaxis: { title: { text: unit.name, standoff: 4 } }, yaxis: { type: "category" } },
  }));
  return node;
}

function eventList(datas) {
  const found = shown().flatMap((run) => datas[run].events.map((event) => [run, event])).sort(([, a], [, b]) => a.time - b.time);
  if (!found.length) return el("p", { class: "quiet" }, "No warning, no restart of an engine, no resume.");
  const rows = found.slice(0, 500).map(([run, event]) => el("tr", null,
    head.runs.length > 1 && el("td", null, head.runs[run].name),
    el("td", { class: "number" }, event.step), el("td", { class: "number" }, duration(event.time)),
    el("td", null, el("span", { class: `tag ${event.kind}` }, event.kind)), el("td", { class: "words" }, event.text)));
  const titles = [head.runs.length > 1 && "run", "step", "time", "", "what happened"].filter((title) => title !== false);
  return el("div", { class: "scroll" }, el("table", null, el("thead", null, el("tr", null, titles.map((title) => el("th", null, title)))), el("tbody", null, rows)),
    found.length > 500 && el("p", { class: "quiet" }, `${found.length - 500} more are left out.`));
}

async function showTime(view) {
  const datas = await Promise.all(numbers);
  const run = shown().includes(Number(state.run)) ? Number(state.run) : shown()[0];
  const figure = (title, node, more) => el("figure", { class: "card" }, el("figcaption", null, el("span", { class: "grow" }, title), more), node);
  const choose = select(shown().map((one) => [one, head.runs[one].name]), run, (value) => {
    go({ run: value });
    render();
  });
  const besides = Object.keys(datas[run]?.beside ?? {});
  view.replaceChildren(
    ...(run === undefined ? [el("p", { class: "empty" }, "No run is shown.")] : [
      figure("Where a step's time goes, mean over the steps", phaseBars(datas, el("div", { class: "plot" }))),
      figure("Step by step", phaseSteps(datas[run], el("div", { class: "plot tall" })), shown().length > 1 && choose),
      besides.length ? el("p", { class: "quiet" }, `Beside the training, a step: ${besides.map((phase) => `${phase} ${short(mean(datas[run].beside[phase]))} s`).join(", ")}.`) : "",
      figure("Warnings, restarts of engines, resumes", timeline(datas, el("div", { class: "plot" }))),
      eventList(datas),
    ]),
  );
}
