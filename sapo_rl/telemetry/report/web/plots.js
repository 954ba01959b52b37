// Plots, by the charting library, in the page's own colours.

const PALETTE = ["#4269d0", "#e08a00", "#e5484d", "#2f9e8f", "#7c5cff", "#c2529c", "#5a8f29", "#8a6d4b", "#0ea5c6", "#7f8694"];
const POINTS = 1500; // of a line, at most
let library = null;

/** The library, run once from its chunk; its hash stands in the page's policy. */
function charts() {
  library ??= text("library").then((source) => {
    document.head.append(el("script", null, source));
    return window.Plotly;
  });
  return library;
}

/** Text for the library, which reads tags in it. */
function safe(string) {
  return String(string).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function translucent(colour, alpha) {
  const number = parseInt(colour.slice(1), 16);
  return `rgba(${number >> 16},${(number >> 8) & 255},${number & 255},${alpha})`;
}

/** The layout of every plot; `own` wins. */
function layout(own) {
  const axis = { gridcolor: css("--line"), zeroline: false, linecolor: css("--line"), tickcolor: css("--line"), automargin: true };
  const base = {
    font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: css("--muted") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 44, r: 10, t: 6, b: 28 },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { size: 11, color: css("--text") } },
    dragmode: "zoom",
  };
  return { ...base, ...own, xaxis: { ...axis, showgrid: false, ...own.xaxis }, yaxis: { ...axis, ...own.yaxis } };
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && target.draw) {
      const draw = target.draw;
      target.draw = null;
      draw();
    }
  }
}, { rootMargin: "300px" });

/** Draw into an element once it comes into sight. `make` returns traces and layout. */
function plot(node, make, clicked) {
  node.draw = async () => {
    const plotly = await charts();
    const { traces, ...rest } = make();
    await plotly.react(node, traces, layout(rest.layout ?? {}), { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]] });
    if (clicked && !node.clicks) {
      node.clicks = true;
      node.on("plotly_click", (event) => clicked(event.points[0]));
    }
  };
  seen.unobserve(node);
  seen.observe(node);
}

/** Every place of a line that is kept: of each stretch the first, the lowest and the highest. */
function thin(xs, ys) {
  if (xs.length <= POINTS) return [xs, ys];
  const size = Math.ceil(xs.length / (POINTS / 3));
  const places = new Set([xs.length - 1]);
  for (let start = 0; start < xs.length; start += size) {
    let low = start;
    let high = start;
    for (let place = start; place < Math.min(start + size, xs.length); place++) {
      if (ys[place] < ys[low]) low = place;
      if (ys[place] > ys[high]) high = place;
    }
    places.add(start).add(low).add(high);
  }
  const kept = [...places].sort((a, b) => a - b);
  return [kept.map((place) => xs[place]), kept.map((place) => ys[place])];
}
