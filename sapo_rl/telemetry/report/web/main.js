// The frame: tabs, the runs, the theme, and the page that loads itself again while the runs go on.

const TABS = { curves: ["Curves", showCurves], time: ["Time", showTime], completions: ["Completions", showCompletions], heldout: ["Held-out prompts", showHeldOut], settings: [head.runs.length > 1 ? "Settings and results" : "Settings", showSettings] };

async function showSettings(view) {
  const datas = await Promise.all(numbers);
  const names = head.runs.map((run) => run.name);
  const grid = (titles, rows) => el("div", { class: "scroll" }, el("table", null,
    el("thead", null, sweepRow(), el("tr", null, titles.map((title) => el("th", null, title)))),
    el("tbody", null, Object.entries(rows).map(([key, cells]) => el("tr", null, el("th", { scope: "row" }, key), cells.map((cell) => el("td", null, cell)))))));
  view.replaceChildren(
    head.runs.length > 1 && Object.keys(head.differ).length ? el("section", { id: "differ" }, el("h2", null, "What differs"), grid(["", ...names], head.differ)) : "",
    el("section", { id: "results" }, el("h2", null, "How far they came"), grid(["", ...names], head.results)),
    el("section", null, el("h2", null, "As they were started"), datas.flatMap((data, run) => Object.entries(data.files).map(([name, content]) =>
      el("details", null, el("summary", null, names.length > 1 ? `${names[run]}/${name}` : name), el("pre", { class: "file" }, content))))),
  );
}

/** The sweeps that the runs are of, above their names: those of one stand beside each other. */
function sweepRow() {
  const spans = [];
  for (const { sweep } of head.runs) {
    if (sweep && spans.at(-1)?.sweep === sweep) spans.at(-1).count += 1;
    else spans.push({ sweep, count: 1 });
  }
  return spans.some(({ sweep }) => sweep) && el("tr", { class: "sweeps" }, el("th"), spans.map(({ sweep, count }) => el("th", { colspan: count }, sweep)));
}

function chips() {
  const away = hidden();
  if (head.runs.length === 1) return [];
  return head.runs.map((run, number) => [run.sweep && run.sweep !== head.runs[number - 1]?.sweep && el("small", null, run.sweep), el("button", {
    class: "chip", "aria-pressed": String(!away.has(number)), title: `${run.folder}\n${run.what}\nclick: show or hide; double click: this one alone`,
    onclick: () => {
      if (away.has(number)) away.delete(number);
      else away.add(number);
      go({ hide: [...away].join(".") });
      render();
    },
    ondblclick: () => {
      go({ hide: head.runs.map((_, other) => other).filter((other) => other !== number).join(".") });
      render();
    },
  }, el("i", { style: `background:${colour(number)}` }), run.name, run.what && el("small", null, run.what), run.status !== "complete" && el("small", { class: "status" }, run.status))]).flat().filter(Boolean);
}

function theme(chosen) {
  if (chosen === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.dataset.theme = chosen;
}

function tools() {
  const about = head.runs[0];
  const next = { auto: "light", light: "dark", dark: "auto" };
  const told = head.runs.length === 1 ? [about.model, about.loss, about.status].filter(Boolean).join(" · ") : `${head.runs.length} runs`;
  return [
    el("span", { class: "quiet" }, `${told} · ${head.made.replace("T", " ").slice(0, 16)}`),
    head.live && checkbox("follow", state.follow !== "off", (on) => {
      go({ follow: on ? null : "off" });
      follow();
    }),
    el("button", { class: "small", id: "theme", title: "light, dark, or as the system says", onclick: () => {
      go({ theme: next[state.theme ?? "auto"] === "auto" ? null : next[state.theme ?? "auto"] });
      render();
    } }, { auto: "◐", light: "☀", dark: "☾" }[state.theme ?? "auto"]),
  ];
}

/** Load the page again after a while, unless somebody is typing in it or has marked some of its words. */
let following = 0;

function follow() {
  clearTimeout(following);
  if (!head.live || state.follow === "off") return;
  following = setTimeout(() => {
    const busy = /INPUT|SELECT/.test(document.activeElement?.tagName ?? "") || !getSelection().isCollapsed;
    if (busy) follow();
    else location.reload();
  }, 1000 * head.live);
}

async function render() {
  theme(state.theme ?? "auto");
  document.onkeydown = null; // a view's own
  const tab = TABS[state.tab] ? state.tab : "curves";
  const title = head.runs.length === 1 ? head.runs[0].name : "Runs side by side";
  document.getElementById("title").replaceChildren(title);
  document.getElementById("tabs").replaceChildren(...Object.entries(TABS).map(([name, [label]]) => el("button", {
    role: "tab", id: `tab-${name}`, "aria-selected": String(tab === name), onclick: () => {
      go({ tab: name === "curves" ? null : name }, true);
      render();
    },
  }, label)));
  document.getElementById("tools").replaceChildren(...tools().filter(Boolean));
  document.getElementById("runs").replaceChildren(...chips());
  const view = el("main", { id: "view", class: tab });
  document.getElementById("view").replaceWith(view);
  await TABS[tab][1](view);
  view.dataset.ready = tab;
}

addEventListener("popstate", () => {
  state = read();
  render();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
render();
follow();
