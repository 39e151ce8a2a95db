// Every page works without this: it keeps live pages fresh, reads charts under the pointer, and saves a click.
"use strict";

const EVERY = 2000; // milliseconds
const SHARE = 9; // a page that is slow to make is asked for again after this many times as long

// --- a page of a run that is live is asked for again, and its changed part put in place

async function refresh() {
  const old = document.getElementById("live");
  if (!old || old.dataset.state !== "live") return;
  const began = performance.now();
  try {
    if (document.visibilityState === "visible") {
      const answer = await fetch(old.dataset.source);
      if (answer.ok) put(old, await answer.text());
    }
  } catch { /* the server is gone or busy: ask again */ }
  setTimeout(refresh, Math.max(EVERY, SHARE * (performance.now() - began)));
}

function put(old, text) {
  if (text === refresh.last) return;
  refresh.last = text;
  const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("live");
  if (!fresh) return;
  const at = [window.scrollX, window.scrollY];
  const focused = place(old, document.activeElement);
  old.dataset.state = fresh.dataset.state;
  old.replaceChildren(...fresh.childNodes);
  if (focused) find(old, focused)?.focus({ preventScroll: true });
  window.scrollTo(...at);
}

// Where an element is, so that its successor can be found: a link by what it links to.
function place(root, element) {
  if (!element || !root.contains(element)) return null;
  return element.id ? ["id", element.id] : ["href", element.getAttribute("href")];
}

function find(root, [name, value]) {
  return value && [...root.querySelectorAll(`[${name}]`)].find((e) => e.getAttribute(name) === value);
}

// --- the points of a chart nearest to the pointer, one of each line

function short(value) {
  const v = Number(value), size = Math.abs(v);
  if (size >= 1e6) return `${+(v / 1e6).toPrecision(4)}M`;
  return size >= 1e4 ? `${+(v / 1e3).toPrecision(4)}k` : `${+v.toPrecision(4)}`;
}

function read(figure, x) {
  const lines = new Map();
  for (const dot of figure.querySelectorAll("circle[data-x]")) {
    dot.classList.remove("near");
    const box = dot.getBoundingClientRect(), away = Math.abs(box.left + box.width / 2 - x);
    const best = lines.get(dot.dataset.name);
    if (!best || away < best.away) lines.set(dot.dataset.name, { away, dot });
  }
  const said = [...lines.values()].map(({ dot }) => {
    dot.classList.add("near");
    const { name, x, y, low, high } = dot.dataset;
    return `${name} at ${short(x)}: ${short(y)}${low === undefined ? "" : ` [${short(low)}, ${short(high)}]`}`;
  });
  let out = figure.querySelector(".readout");
  if (!out) {
    out = figure.appendChild(document.createElement("p"));
    out.className = "readout";
    out.setAttribute("aria-hidden", "true"); // the same is in the <title> of each point
  }
  out.textContent = said.join("\n");
}

function leave(figure) {
  figure.querySelector(".readout")?.remove();
  figure.querySelectorAll(".near").forEach((dot) => dot.classList.remove("near"));
}

document.addEventListener("pointermove", (event) => {
  const figure = event.target.closest?.("figure");
  document.querySelectorAll(".readout").forEach((o) => o.parentNode !== figure && leave(o.parentNode));
  if (figure?.querySelector("circle[data-x]")) read(figure, event.clientX);
});

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submits]")) event.target.form.requestSubmit();
});

refresh();
