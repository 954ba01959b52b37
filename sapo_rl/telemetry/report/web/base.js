"use strict";
// The data of the page, its state, and what all views are built with. What a model or a user wrote becomes text nodes,
// never markup: nothing here sets innerHTML.

const head = JSON.parse(document.getElementById("head").textContent);
const KEPT = 48; // unpacked chunks of completions that are kept
const unpacked = new Map();

async function text(name) {
  const node = document.getElementById(name);
  if (!node) return null;
  const bytes = Uint8Array.from(atob(node.textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

/** The value of a packed chunk of the page, null where there is none; the latest are kept. */
function load(name) {
  const found = unpacked.get(name) ?? text(name).then((json) => JSON.parse(json));
  unpacked.delete(name);
  unpacked.set(name, found);
  for (const old of unpacked.keys()) {
    if (unpacked.size <= KEPT + 3 * head.runs.length) break;
    if (/\/\d+$/.test(old)) unpacked.delete(old);
  }
  return found;
}

/** An element with attributes (`on...` are listeners) and children; those that are null or false are left out. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// The state stands in the address, so that a view can be linked to, and stays when the page loads itself again.
let state = read();

function read() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

/** Change the state; keys with "" or null are removed. A step that the back button should undo is pushed. */
function go(changes, push = false) {
  state = Object.fromEntries(Object.entries({ ...state, ...changes }).filter(([, value]) => value !== "" && value !== null));
  const hash = `#${new URLSearchParams(state)}`;
  if (push) history.pushState(null, "", hash);
  else history.replaceState(null, "", hash);
}

/** A number in few characters. */
function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e5) return String(value);
  if (size >= 1e6 || (size > 0 && size < 1e-3)) return value.toExponential(1);
  if (size >= 1e4) return `${(value / 1000).toFixed(1)}k`;
  return String(+value.toPrecision(3));
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(1)}s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes}m` : `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A field with its label before it. */
function field(label, input) {
  return el("label", { class: "field" }, el("span", null, label), input);
}

function select(options, chosen, change) {
  return el(
    "select",
    { onchange: (event) => change(event.target.value) },
    options.map(([value, label]) => el("option", { value, selected: String(value) === String(chosen) }, label)),
  );
}

function checkbox(label, checked, change) {
  const box = el("input", { type: "checkbox", checked, onchange: (event) => change(event.target.checked) });
  return el("label", { class: "check" }, box, label);
}

/** Call `then` once nothing has called for `wait` milliseconds. */
function calm(then, wait = 150) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => then(...args), wait);
  };
}
