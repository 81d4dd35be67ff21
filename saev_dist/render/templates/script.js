"use strict";
// The page's only state is its address (`#sort=mean&freq=0.001..0.05&feature=12`). What a reader does changes the
// address; `render` draws what the address says. Data come from data.js and features/<i>/data.js.
(() => {

const $ = (id) => document.getElementById(id);

function fail(text) {
  $("broken").textContent = text;
  $("broken").hidden = false;
}

const data = window.gallery;
if (!data) return fail("data.js is missing or incomplete beside this page. Copy the whole folder, or run saev-dist replay again.");

// ---------------------------------------------------------------- data

function decode(text, Numbers) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Numbers(bytes.buffer); // little-endian, as is every machine that runs a browser today
}

const N = data.d_sae;
const log10Freq = decode(data.columns.log10_freq, Float32Array);
const log10Mean = decode(data.columns.log10_mean, Float32Array);
const largest = decode(data.columns.max, Float32Array);
const percentile = decode(data.columns.percentile, Float32Array);
const nActive = decode(data.columns.n_active, Float64Array);
const cards = new Map(data.cards.map(([feature, heatmaps, labels, closeUps]) => [feature, { heatmaps, labels, closeUps }]));

const fires = (s) => nActive[s] > 0;
const share = (s) => nActive[s] / data.n_tokens;
const mean = (s) => 10 ** log10Mean[s];
const KEYS = { id: (s) => s, freq: (s) => nActive[s], mean: (s) => log10Mean[s], max: (s) => largest[s] };

const count = (n) => n.toLocaleString("en");
function score(x) {
  if (x === 0) return "0";
  const digits = Math.abs(x.toPrecision(3)) >= 1000 ? 5 : 3, size = Math.abs(x.toPrecision(digits)); // as it will be read
  return size >= 1e5 || size < 1e-3 ? x.toExponential(2) : x.toPrecision(digits);
}
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
/** A round number, in the few characters that there is room for beside an axis. */
function tick(x) {
  if (x !== 0 && (x < 1e-3 || x >= 1e15)) return x.toExponential();
  return x >= 1e4 ? COMPACT.format(x) : String(x);
}
function percent(x) {
  const p = 100 * x;
  if (p === 0 || p >= 10) return `${p.toFixed(p ? 1 : 0)}%`;
  return p >= 0.001 ? `${p.toPrecision(2)}%` : `${p.toExponential(1)}%`;
}

// ---------------------------------------------------------------- the address

const CHOICES = {
  view: ["grid", "table"],
  show: cards.size ? ["pictures", "firing", "dead", "all"] : ["all", "pictures", "firing", "dead"],
  sort: ["max", "mean", "freq", "id"],
  order: ["desc", "asc"],
};
const RANGES = ["freq", "mean", "max"]; // "from..to" in plain units; either side may be empty

function parse(hash) {
  const given = new URLSearchParams(hash.slice(1)), state = { ids: given.get("ids") ?? "", feature: null };
  for (const [key, choices] of Object.entries(CHOICES)) state[key] = choices.includes(given.get(key)) ? given.get(key) : choices[0];
  for (const key of RANGES) state[key] = (given.get(key) ?? "").split("..").concat("").slice(0, 2).map((text) => (text.trim() && isFinite(text) ? Number(text) : null));
  const feature = given.get("feature") ?? "";
  if (/^\d+$/.test(feature) && Number(feature) < N) state.feature = Number(feature);
  else state.ids ||= feature; // the search says what is wrong with it
  return state;
}

function address(state) {
  const parts = new URLSearchParams();
  for (const [key, choices] of Object.entries(CHOICES)) if (state[key] !== choices[0]) parts.set(key, state[key]);
  for (const key of RANGES) if (state[key].some((x) => x !== null)) parts.set(key, state[key].map((x) => x ?? "").join(".."));
  if (state.ids) parts.set("ids", state.ids);
  if (state.feature !== null) parts.set("feature", state.feature);
  return "#" + parts.toString().replaceAll("%2C", ",");
}

// Filters replace the address, opening a feature adds to the history: the browser's back button leads to the list.
function go(change, { push = false } = {}) {
  const to = address({ ...state, ...change });
  if (push) location.hash = to;
  else location.replace(to);
  render(); // not only when the browser gets round to its event: the next key press may come first
}

let state, rendered = null, chosen = [], overviewScroll = 0, opened = null, openedFirst = null;

// ---------------------------------------------------------------- which features

/** Ids out of "17, 40-60"; null for an empty search. */
function searched(text) {
  if (!text.trim()) return null;
  const found = new Set(), wrong = [];
  for (const word of text.replace(/#/g, "").replace(/\s*(?:[-–]|\.\.|\bto\b)\s*/g, "-").split(/[\s,;]+/).filter(Boolean)) {
    const match = /^(\d+)(?:-(\d+))?$/.exec(word);
    const from = match && Number(match[1]), to = match && Number(match[2] ?? match[1]);
    if (!match || from >= N || to < from) wrong.push(word);
    else for (let s = from; s <= Math.min(to, N - 1); s++) found.add(s);
  }
  return { found, wrong };
}

const SHOWN = { pictures: (s) => cards.has(s), firing: fires, dead: (s) => !fires(s), all: () => true };

function fits(s) {
  const within = ([from, to], x) => (from === null || x >= from) && (to === null || x <= to);
  return SHOWN[state.show](s) &&
    (RANGES.every((key) => state[key].every((x) => x === null)) ||
      (fires(s) && within(state.freq, share(s)) && within(state.mean, mean(s)) && within(state.max, largest[s])));
}

/** A search looks through all features, whatever the filters. */
function choose() {
  const search = searched(state.ids);
  const ids = search ? [...search.found] : Array.from({ length: N }, (_, s) => s).filter(fits);
  const key = KEYS[state.sort], sign = state.order === "desc" ? -1 : 1;
  // Features that never fire have no statistics: they come last in either order.
  const rank = (s) => (state.sort === "id" || fires(s) ? 0 : 1);
  return ids.sort((a, b) => rank(a) - rank(b) || (rank(a) ? 0 : sign * (key(a) - key(b))) || a - b);
}

// ---------------------------------------------------------------- controls

const inputs = Object.fromEntries(RANGES.map((key) => [key, [$(`${key}-from`), $(`${key}-to`)]]));
const UNIT = { freq: 100, mean: 1, max: 1 }; // frequencies are typed as percentages

function renderControls() {
  const put = (input, text) => {
    if (document.activeElement === input) return; // it is being typed in
    input.value = text;
    input.removeAttribute("aria-invalid");
  };
  if ($("ids").value.trim() !== state.ids) $("ids").value = state.ids;
  for (const key of ["show", "sort"]) $(key).value = state[key];
  for (const key of RANGES) inputs[key].forEach((input, i) => put(input, state[key][i] === null ? "" : String(Number((state[key][i] * UNIT[key]).toPrecision(6)))));
  const upward = state.order === "asc";
  $("order").textContent = upward ? "↑ ascending" : "↓ descending";
  for (const button of document.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === state.view));
  const search = searched(state.ids), wrong = search?.wrong ?? [];
  $("ids").setAttribute("aria-invalid", String(wrong.length > 0));
  if (wrong.length) $("side").open = true; // the note says what is wrong
  $("ids-note").textContent = wrong.length ? `No feature ${wrong.join(", ")}: ids are 0 to ${N - 1}, like 17, 40-60.` : search ? "Found among all features, whatever the filters below." : "";
  for (const control of $("filters").querySelectorAll("fieldset, #show")) control.disabled = Boolean(search);
}

function listenToControls() {
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("ids").addEventListener("input", () => go({ ids: $("ids").value.trim() }));
  $("ids").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && chosen.length) go({ feature: chosen[0], ids: $("ids").value.trim() }, { push: true });
  });
  for (const key of ["show", "sort"]) $(key).addEventListener("change", () => go({ [key]: $(key).value, ...(key === "sort" && { order: $(key).value === "id" ? "asc" : "desc" }) }));
  for (const key of RANGES) for (const [i, input] of inputs[key].entries()) input.addEventListener("input", () => {
    const text = input.value.trim().replace(",", "."), number = Number(text);
    input.setAttribute("aria-invalid", String(!isFinite(number)));
    if (isFinite(number)) go({ [key]: state[key].with(i, text ? number / UNIT[key] : null) });
  });
  $("order").addEventListener("click", () => go({ order: state.order === "asc" ? "desc" : "asc" }));
  const clear = () => {
    for (const input of $("filters").querySelectorAll("input")) { input.value = ""; input.removeAttribute("aria-invalid"); }
    go({ ids: "", show: CHOICES.show[0], freq: [null, null], mean: [null, null], max: [null, null] });
  };
  $("reset").addEventListener("click", clear);
  $("none").querySelector("button").addEventListener("click", clear);
  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => go({ view: button.dataset.view }));
  for (const th of document.querySelectorAll("th[data-sort]")) th.querySelector("button").addEventListener("click", () => {
    const same = state.sort === th.dataset.sort;
    go({ sort: th.dataset.sort, order: same ? (state.order === "asc" ? "desc" : "asc") : th.dataset.sort === "id" ? "asc" : "desc" });
  });
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
}

// ---------------------------------------------------------------- scatter

/** Powers of ten; with 2 and 5 between them where there are few; every k-th where there are many. */
function ticks({ low, high }) {
  const span = high - low, found = [], every = Math.ceil(span / 6), steps = span > 2.5 ? [1] : span > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let power = Math.floor(low); power <= high; power++) for (const step of steps) {
    const at = power + Math.log10(step);
    if (at >= low && at <= high && (steps.length > 1 || power % every === 0)) found.push({ at, value: Number(`${step}e${power}`) });
  }
  return found;
}

const scatter = (() => {
  const canvas = $("scatter"), context = canvas.getContext("2d");
  const firing = Array.from({ length: N }, (_, s) => s).filter(fires);
  const MARGIN = { left: 52, right: 10, top: 8, bottom: 38 };
  const x = axis(firing, log10Freq), y = axis(firing, log10Mean);
  let width = 0, height = 0, drag = null, tapped = null;

  function axis(ids, log10) {
    let low = Infinity, high = -Infinity;
    for (const s of ids) { low = Math.min(low, log10[s]); high = Math.max(high, log10[s]); }
    if (low > high) [low, high] = [-1, 0];
    const pad = Math.max(0.04 * (high - low), 0.05);
    return { low: low - pad, high: high + pad };
  }

  const toX = (v) => MARGIN.left + ((v - x.low) / (x.high - x.low)) * (width - MARGIN.left - MARGIN.right);
  const toY = (v) => height - MARGIN.bottom - ((v - y.low) / (y.high - y.low)) * (height - MARGIN.top - MARGIN.bottom);
  const fromX = (px) => x.low + ((px - MARGIN.left) / (width - MARGIN.left - MARGIN.right)) * (x.high - x.low);
  const fromY = (px) => y.low + ((height - MARGIN.bottom - px) / (height - MARGIN.top - MARGIN.bottom)) * (y.high - y.low);

  function draw() {
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    if (!width) return;
    const ratio = window.devicePixelRatio || 1, style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(name).trim();
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    context.scale(ratio, ratio);
    context.font = `11px ${style.fontFamily}`;
    context.lineWidth = 1;

    context.strokeStyle = colour("--line");
    context.fillStyle = colour("--faint");
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.beginPath();
    for (const { at, value } of ticks(y)) {
      context.moveTo(MARGIN.left, Math.round(toY(at)) + 0.5);
      context.lineTo(width - MARGIN.right, Math.round(toY(at)) + 0.5);
      context.fillText(tick(value), MARGIN.left - 7, toY(at));
    }
    context.textAlign = "center";
    let free = -Infinity;
    for (const { at, value } of ticks(x)) {
      context.moveTo(Math.round(toX(at)) + 0.5, MARGIN.top);
      context.lineTo(Math.round(toX(at)) + 0.5, height - MARGIN.bottom);
      const text = `${tick(Number((100 * value).toPrecision(3)))}%`;
      const half = context.measureText(text).width / 2;
      if (toX(at) - half < free) continue;
      context.fillText(text, Math.min(toX(at), width - half), height - MARGIN.bottom + 12);
      free = toX(at) + half + 6;
    }
    context.stroke();
    context.fillText("share of patches it fires on", (MARGIN.left + width - MARGIN.right) / 2, height - 8);
    context.save();
    context.translate(9, (MARGIN.top + height - MARGIN.bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("mean score", 0, 0);
    context.restore();

    const inside = new Set(chosen), size = firing.length > 5000 ? 2 : firing.length > 1000 ? 3 : 4;
    const dots = (ids, name, alpha) => {
      context.globalAlpha = alpha;
      context.fillStyle = colour(name);
      for (const s of ids) context.fillRect(toX(log10Freq[s]) - size / 2, toY(log10Mean[s]) - size / 2, size, size);
    };
    dots(firing.filter((s) => !inside.has(s)), "--dot", 0.55);
    dots(firing.filter((s) => inside.has(s)), "--accent", firing.length > 5000 ? 0.6 : 0.85);
    context.globalAlpha = 1;
    canvas.setAttribute("aria-label", `Scatter of ${count(firing.length)} features: share of patches they fire on against mean score. The filters below choose by the same numbers, and the table lists them.`);
    const dead = N - firing.length;
    $("scatter-note").textContent = dead ? `${count(dead)} that never fire ${dead === 1 ? "has" : "have"} no place here.` : "";
    drawBrush();
  }

  const clamp = (px, from, to) => Math.max(from, Math.min(to, px));
  const inPlot = (px, py) => [clamp(px, MARGIN.left, width - MARGIN.right), clamp(py, MARGIN.top, height - MARGIN.bottom)];
  const log = (v, fallback) => (v === null ? fallback : v > 0 ? Math.log10(v) : -Infinity);

  function drawBrush() {
    const box = $("brush"), free = [...state.freq, ...state.mean].every((v) => v === null);
    box.hidden = (!drag && free) || Boolean(state.ids && !drag);
    if (box.hidden) return;
    const [x0, x1, y0, y1] = drag?.moved ? [Math.min(drag.x, drag.toX), Math.max(drag.x, drag.toX), Math.min(drag.y, drag.toY), Math.max(drag.y, drag.toY)]
      : [toX(log(state.freq[0], x.low)), toX(log(state.freq[1], x.high)), toY(log(state.mean[1], y.high)), toY(log(state.mean[0], y.low))];
    const [[left, top], [right, bottom]] = [inPlot(x0, y0), inPlot(x1, y1)];
    Object.assign(box.style, { left: `${left}px`, width: `${right - left}px`, top: `${top}px`, height: `${bottom - top}px` });
  }

  function nearest(px, py, reach) {
    let best = null, least = reach * reach;
    for (const s of firing) {
      const d = (toX(log10Freq[s]) - px) ** 2 + (toY(log10Mean[s]) - py) ** 2;
      if (d < least) [best, least] = [s, d];
    }
    return best;
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const [px, py] = inPlot(...place(event));
    drag = { x: px, y: py, toX: px, toY: py, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [px, py] = place(event), tip = $("tip");
    if (drag) {
      const [toX, toY] = inPlot(px, py);
      Object.assign(drag, { toX, toY, moved: drag.moved || Math.hypot(toX - drag.x, toY - drag.y) > 4 });
      tip.hidden = true;
      return drawBrush();
    }
    const s = nearest(px, py, 8);
    tip.hidden = s === null;
    canvas.classList.toggle("on-dot", s !== null);
    if (s === null) return;
    tip.textContent = `${s}: fires on ${percent(share(s))}, mean ${score(mean(s))}`;
    Object.assign(tip.style, { top: `${toY(log10Mean[s]) + 10}px`, left: `${Math.max(0, Math.min(toX(log10Freq[s]) - tip.offsetWidth / 2, width - tip.offsetWidth))}px` });
  });
  canvas.addEventListener("pointerleave", () => { $("tip").hidden = true; });
  canvas.addEventListener("pointercancel", () => { drag = null; drawBrush(); });
  canvas.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const { x: x0, y: y0, toX: x1, toY: y1, moved } = drag;
    drag = null;
    if (!moved) {
      tapped = nearest(...place(event), event.pointerType === "touch" ? 22 : 8);
      return drawBrush();
    }
    const value = (v) => Number((10 ** v).toPrecision(3));
    $("ids").value = "";
    go({
      ids: "",
      show: state.show === "dead" ? "firing" : state.show,
      freq: [value(fromX(Math.min(x0, x1))), value(fromX(Math.max(x0, x1)))],
      mean: [value(fromY(Math.max(y0, y1))), value(fromY(Math.min(y0, y1)))],
    });
  });
  canvas.addEventListener("click", () => { // not at the pointerup: the click would then go to what the view shows there
    const s = tapped;
    tapped = null;
    if (s !== null) go({ feature: s }, { push: true });
  });
  new ResizeObserver(() => draw()).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return { draw };
})();

// ---------------------------------------------------------------- grid

const link = (s) => address({ ...state, feature: s });
const pictureUrl = (s, name) => `features/${s}/${encodeURIComponent(name)}`;

function picture(s, name, alt) {
  const image = document.createElement("img");
  return Object.assign(image, { loading: "lazy", decoding: "async", src: pictureUrl(s, name), alt, draggable: false });
}

function closeUp(s, [name, left, top, width, height]) {
  const frame = document.createElement("span"), image = picture(s, name, ""), pct = (share) => `${100 * share}%`;
  frame.className = "close-up";
  Object.assign(image.style, { left: pct(-left / width), top: pct(-top / height), width: pct(1 / width), height: pct(1 / height) });
  frame.append(image);
  return frame;
}

const grid = (() => {
  const CHUNK = 400; // a screenful is 20; the rest follow when the reader comes near
  let made = 0;

  function card(s) {
    const item = $("card").content.firstElementChild.cloneNode(true), anchor = item.querySelector("a"), tiles = item.querySelector(".tiles");
    item.dataset.feature = s;
    anchor.href = link(s);
    anchor.textContent = `Feature ${s}`;
    item.querySelector(".stats").textContent = fires(s) ? `fires on ${percent(share(s))} · up to ${score(largest[s])}` : "never fires";
    const shown = cards.get(s);
    if (!fires(s)) tiles.textContent = "Nothing to show: no patch makes it fire.";
    else if (!shown) tiles.textContent = "No pictures rendered.";
    tiles.classList.toggle("without", !fires(s) || !shown);
    if (fires(s) && shown) {
      tiles.append(...shown.heatmaps.map((name, i) => picture(s, name, shown.labels[i])));
      item.querySelector(".close-ups").append(...shown.closeUps.map((part) => closeUp(s, part)));
    }
    return item;
  }

  function more() {
    const upTo = Math.min(made + CHUNK, chosen.length), items = [];
    for (; made < upTo; made++) items.push(card(chosen[made]));
    $("grid").append(...items);
  }

  // Pointed at, a close-up and the image that it is from are outlined together. The card's link lies over both.
  let twins = [];
  function outline(event) {
    const under = event.type === "pointermove" && event.pointerType !== "touch" ? document.elementsFromPoint(event.clientX, event.clientY) : [];
    const part = under.find((element) => element.matches(".close-ups > .close-up, .close-ups:not(:empty) + .tiles > img"));
    const i = part && [...part.parentElement.children].indexOf(part);
    for (const twin of twins) twin.classList.remove("twin");
    twins = part ? [...part.closest(".card").querySelectorAll(".close-ups, .tiles")].map((row) => row.children[i]) : [];
    for (const twin of twins) twin.classList.add("twin");
  }
  for (const kind of ["pointermove", "pointerleave"]) $("grid").addEventListener(kind, outline);

  new IntersectionObserver((entries) => { if (state.view === "grid" && entries.some((entry) => entry.isIntersecting)) more(); }, { rootMargin: "1200px" }).observe($("more"));

  return {
    draw() {
      made = 0;
      $("grid").replaceChildren();
      if (state.view === "grid") more();
    },
  };
})();

// ---------------------------------------------------------------- table

const table = (() => {
  const ROW_PX = 34, MARGIN_ROWS = 12;
  const MOST = 300_000; // taller elements are cut off by browsers
  const box = $("table"), body = $("rows"), above = document.createElement("tr"), below = document.createElement("tr");
  const rows = new Map(); // index in `chosen` -> row, for the rows in sight
  above.ariaHidden = below.ariaHidden = "true";

  function row(i) {
    const s = chosen[i], item = document.createElement("tr"), anchor = document.createElement("a");
    anchor.href = link(s);
    anchor.textContent = s;
    const texts = fires(s) ? [percent(share(s)), count(nActive[s]), score(mean(s)), score(largest[s]), score(percentile[s])] : ["never", "0", "–", "–", score(percentile[s])];
    const cells = [anchor, ...texts, cards.has(s) && fires(s) ? "yes" : ""].map((content) => {
      const cell = document.createElement("td");
      cell.append(content);
      return cell;
    });
    item.append(...cells);
    item.ariaRowIndex = i + 2; // the head is row 1
    item.dataset.feature = s;
    return item;
  }

  /** Keep the rows in sight that are there already: a row that has the focus must not be made anew. */
  function draw() {
    if (!box.clientHeight) return; // behind the view of a feature
    const n = Math.min(chosen.length, MOST), shown = Math.ceil(box.clientHeight / ROW_PX);
    const from = Math.max(0, Math.min(n, Math.floor(box.scrollTop / ROW_PX)) - MARGIN_ROWS), to = Math.min(n, from + shown + 2 * MARGIN_ROWS);
    for (const [i, item] of rows) if (i < from || i >= to) { item.remove(); rows.delete(i); }
    let last = above;
    for (let i = from; i < to; i++) {
      if (!rows.has(i)) { rows.set(i, row(i)); last.after(rows.get(i)); }
      last = rows.get(i);
    }
    above.style.height = `${from * ROW_PX}px`;
    below.style.height = `${(n - to) * ROW_PX}px`;
  }

  box.addEventListener("scroll", draw, { passive: true });
  new ResizeObserver(() => { if (!box.hidden) draw(); }).observe(box);

  return {
    draw() {
      rows.clear();
      body.replaceChildren(above, below);
      box.hidden = state.view !== "table" || !chosen.length;
      $("table-note").textContent = state.view === "table" && chosen.length > MOST ? `The first ${count(MOST)}: narrow the filters to see others.` : "";
      if (box.hidden) return;
      box.querySelector("table").ariaRowCount = Math.min(chosen.length, MOST) + 1;
      for (const th of box.querySelectorAll("th[data-sort]")) {
        const sorted = th.dataset.sort === state.sort;
        if (sorted) th.setAttribute("aria-sort", state.order === "asc" ? "ascending" : "descending");
        else th.removeAttribute("aria-sort");
      }
      box.scrollTop = 0;
      draw();
    },
    /** Bring a feature's row into sight. */
    show(s) {
      const top = Math.min(chosen.indexOf(s), MOST) * ROW_PX, above = top < box.scrollTop, below = top + 3 * ROW_PX > box.scrollTop + box.clientHeight;
      if (above || below) box.scrollTop = top - box.clientHeight / 2;
      draw();
    },
  };
})();

// ---------------------------------------------------------------- one feature

const views = new Map(); // feature -> what its data.js handed over
window.galleryFeature = (view) => views.set(view.feature, view);

function load(s, done) {
  if (views.has(s)) return done(views.get(s));
  const script = document.createElement("script");
  script.src = `features/${s}/data.js`;
  script.onload = script.onerror = () => { script.remove(); done(views.get(s) ?? null); };
  document.head.append(script);
}

/** The folder that holds this page's folder, quoted for a shell. */
function runFolder() {
  let path = "";
  try { path = decodeURIComponent(location.pathname).split("/").slice(0, -2).join("/"); } catch { /* it is no UTF-8 */ }
  if (location.protocol !== "file:" || !path) return "RUN";
  return /^[\w@%+=:,./-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`;
}

/** What draws this gallery with these features besides those that were asked for. */
function replayCommand(...more) {
  const features = [...new Set([...data.features, ...more])];
  return ["saev-dist replay --run", runFolder(), data.flags, features.length ? "--features" : "", ...features].filter((word) => word !== "").join(" ");
}

function renderFeature(s) {
  const at = chosen.indexOf(s);
  document.title = `Feature ${s}`;
  $("feature-title").textContent = `Feature ${s}`;
  $("back").href = address({ ...state, feature: null });
  $("place").textContent = at < 0 ? "" : `${count(at + 1)} of ${count(chosen.length)}`;
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at === chosen.length - 1;
  $("f-freq").textContent = fires(s) ? percent(share(s)) : "never";
  $("f-active").textContent = `fires on ${count(nActive[s])} of ${count(data.n_tokens)} patches`;
  $("f-mean").textContent = fires(s) ? score(mean(s)) : "–";
  $("f-max").textContent = fires(s) ? score(largest[s]) : "–";
  $("f-percentile").textContent = score(percentile[s]);
  $("histogram").hidden = $("f-pictures").hidden = $("f-note").hidden = true;
  $("images").replaceChildren();
  if (!fires(s)) return note(`This feature never fired on any of the ${count(data.n_tokens)} patches, so there is nothing to show.`);
  if (!cards.has(s)) return note("No pictures were rendered for this feature. This renders the gallery again, with them:", replayCommand(s));
  load(s, (view) => {
    if (state.feature !== s) return; // the reader went on
    if (!view) return note(`features/${s}/data.js is missing beside this page. This renders the gallery again:`, `${replayCommand()} --force`);
    drawHistogram(view.histogram);
    drawImages(view);
  });
}

function note(text, command) {
  $("f-note").textContent = text;
  $("f-note").hidden = false;
  if (!command) return;
  const code = document.createElement("code");
  code.textContent = command;
  $("f-note").append(" ", code);
}

function drawHistogram({ edges, counts }) {
  const figure = $("histogram"), svg = figure.querySelector("svg");
  svg.replaceChildren();
  figure.hidden = !counts.length;
  if (!counts.length) return;
  const add = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    svg.append(element);
    return element;
  };
  const LEFT = 8, RIGHT = 552, TOP = 8, BOTTOM = 122;
  // The first bin of all starts at 0 and the last ends nowhere: on a logarithmic scale they get an octave.
  const log2 = edges.map((edge, i) => Math.log2(edge === null ? 2 * edges[i - 1] : edge || edges[i + 1] / 2)), low = log2[0], high = log2.at(-1);
  // Bars are equally wide in scores, not in their logarithms: their areas say how many patches they hold, so heights have
  // no unit that a reader would take for patches.
  const heights = counts.map((n, i) => n / (log2[i + 1] - log2[i])), most = Math.max(...heights), highest = heights.indexOf(most);
  const toX = (v) => LEFT + ((v - low) / (high - low)) * (RIGHT - LEFT), toY = (n) => BOTTOM - (n / most) * (BOTTOM - TOP);
  add("line", { x1: LEFT, x2: RIGHT, y1: BOTTOM, y2: BOTTOM, class: "grid-line" });
  const name = (edge, i) => (edge === null ? "more" : edge === 0 && i === 0 ? "0" : score(edge));
  counts.forEach((n, i) => {
    const from = toX(log2[i]), y = n ? Math.min(toY(heights[i]), BOTTOM - 1) : BOTTOM; // a single patch is seen too
    const bar = add("rect", { x: from, y, width: Math.max(0.5, toX(log2[i + 1]) - from - 1), height: BOTTOM - y, class: "bar-rect" });
    bar.dataset.tells = `${name(edges[i], i)} to ${name(edges[i + 1], i + 1)}: ${count(n)} ${n === 1 ? "patch" : "patches"}`;
  });
  const bars = [...svg.querySelectorAll(".bar-rect")];
  const tell = (event) => { // also from above a low bar, and from one too thin for a finger
    const box = svg.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * (LEFT + RIGHT);
    const at = event.type === "pointerleave" ? -1 : counts.findIndex((_, i) => toX(log2[i]) <= x && x < toX(log2[i + 1]));
    bars.forEach((bar, i) => bar.classList.toggle("told", i === at));
    $("bar").textContent = bars[at]?.dataset.tells ?? "";
    $("bar").hidden = at < 0;
    $("bar-hint").hidden = at >= 0;
  };
  svg.onpointermove = svg.onpointerdown = tell;
  svg.onpointerleave = (event) => { if (event.pointerType !== "touch") tell(event); };
  tell({ type: "pointerleave" });
  const perTen = Math.log2(10);
  for (const { at, value } of ticks({ low: low / perTen, high: high / perTen })) {
    add("line", { x1: toX(at * perTen), x2: toX(at * perTen), y1: BOTTOM, y2: BOTTOM + 4, class: "tick" });
    add("text", { x: toX(at * perTen), y: BOTTOM + 18, "text-anchor": "middle" }, tick(value));
  }
  const total = counts.reduce((a, b) => a + b, 0);
  svg.setAttribute("aria-label", `Histogram of ${count(total)} scores above zero, from ${name(edges[0], 0)} to ${name(edges.at(-1), 1)}; they lie densest between ${name(edges[highest], highest)} and ${name(edges[highest + 1], highest + 1)}.`);
}

function drawImages({ feature, upper, images }) {
  $("f-pictures").hidden = !images.length;
  $("f-heading").textContent = images.length === 1 ? "The strongest image" : `The ${count(images.length)} strongest`;
  $("f-upper").textContent = score(upper);
  const labelled = images.some((image) => image.label); // else they have none, and nobody misses it
  $("images").replaceChildren(...images.map((image, rank) => figureOf(feature, image, rank, labelled)));
}

function figureOf(feature, image, rank, labelled) {
  const item = $("image").content.firstElementChild.cloneNode(true), part = (name) => item.querySelector(name);
  const stage = part(".stage"), cursor = part(".cursor"), value = part(".value");
  const values = decode(image.values, Int16Array), valueAt = (p) => (values[p] * image.scale) / 32767;
  stage.style.aspectRatio = `${image.width} / ${image.height}`;
  for (const [name, file] of [[".picture", image.picture], [".heatmap", image.heatmap]]) {
    Object.assign(part(name), { width: image.width, height: image.height, src: pictureUrl(feature, file), draggable: false });
  }
  const put = (mark, p) => {
    const column = p % image.n_cols, row = Math.floor(p / image.n_cols), pct = (px, of) => `${(100 * px) / of}%`;
    Object.assign(mark.style, { left: pct(column * image.patch, image.width), top: pct(row * image.patch, image.height), width: pct(image.patch, image.width), height: pct(image.patch, image.height) });
  };
  const describe = (p) => `patch ${count(p)}: ${score(valueAt(p))}`;
  put(part(".won"), image.patch_i);
  if (cards.get(feature).closeUps.length) { // there are pictures; the heatmap all but hides the patch
    const column = image.patch_i % image.n_cols, row = Math.floor(image.patch_i / image.n_cols), [w, h] = [image.patch / image.width, image.patch / image.height];
    part(".under").prepend(closeUp(feature, [image.picture, (column - 0.5) * w, (row - 0.5) * h, 2 * w, 2 * h]));
  }
  part(".score").textContent = score(image.score);
  value.textContent = describe(image.patch_i);
  const label = image.label || (labelled ? "no label" : "");
  part(".label").textContent = label;
  part(".path").textContent = [`image ${count(image.img_i)}`, image.path].filter(Boolean).join(" · ");
  part(".path").title = image.path;
  stage.setAttribute("aria-label", [`Patches of image ${image.img_i}`, label, `number ${rank + 1}`, `score ${score(image.score)}`].filter(Boolean).join(", "));
  stage.ariaValueMax = values.length - 1;
  stage.ariaRoleDescription = "heatmap";

  let current = image.patch_i;
  const read = (p) => {
    current = p;
    put(cursor, p);
    cursor.hidden = false;
    value.textContent = describe(p);
    stage.ariaValueNow = p;
    stage.ariaValueText = `${describe(p)}, row ${Math.floor(p / image.n_cols) + 1}, column ${(p % image.n_cols) + 1}`;
  };
  const leave = () => {
    if (document.activeElement === stage) return;
    cursor.hidden = true;
    value.textContent = describe(image.patch_i);
  };
  read(image.patch_i);
  cursor.hidden = true;
  const point = (event) => {
    const box = stage.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) * image.width) / box.width / image.patch);
    const row = Math.floor(((event.clientY - box.top) * image.height) / box.height / image.patch);
    if (column >= 0 && column < image.n_cols && row >= 0 && row < image.n_rows) read(row * image.n_cols + column);
    else leave();
  };
  stage.addEventListener("pointermove", point);
  stage.addEventListener("pointerdown", point);
  stage.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
  stage.addEventListener("focus", () => read(current));
  stage.addEventListener("blur", leave);
  stage.addEventListener("keydown", (event) => {
    const column = current % image.n_cols, row = Math.floor(current / image.n_cols);
    const to = {
      ArrowLeft: [column - 1, row], ArrowRight: [column + 1, row], ArrowUp: [column, row - 1], ArrowDown: [column, row + 1],
      Home: [0, 0], End: [image.n_cols - 1, image.n_rows - 1],
    }[event.key];
    if (!to || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // also keeps the page from scrolling, and the view from going to the next feature
    if (to[0] >= 0 && to[0] < image.n_cols && to[1] >= 0 && to[1] < image.n_rows) read(to[1] * image.n_cols + to[0]);
  });
  return item;
}

function setHeat() {
  $("images").classList.toggle("plain", !$("heat").checked);
  $("images").style.setProperty("--heat", $("opacity").value / 100);
  $("opacity").disabled = !$("heat").checked;
}
$("heat").addEventListener("change", setHeat);
$("opacity").addEventListener("input", setHeat);

function step(by) {
  const to = chosen[chosen.indexOf(state.feature) + by];
  if (chosen.includes(state.feature) && to !== undefined) go({ feature: to });
}
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = event.target.matches?.("input:not([type=checkbox]), select, textarea");
  if (state.feature === null) {
    if (event.key === "/" && !typing) { event.preventDefault(); $("side").open = true; $("ids").focus(); }
    return;
  }
  if (event.key === "Escape") go({ feature: null }, { push: true });
  else if (typing) return;
  else if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if ((event.key === "h" || event.key === "H") && !$("f-pictures").hidden) $("heat").click();
});

// ---------------------------------------------------------------- drawing what the address says

let drawn = null; // the address of the list on the screen

function render() {
  if (rendered === location.href) return;
  rendered = location.href;
  state = parse(location.hash);
  const list = address({ ...state, feature: null }), before = opened, first = drawn === null;
  opened = state.feature;
  if (before === null && opened !== null) [overviewScroll, openedFirst] = [scrollY, opened];
  const overview = opened === null;
  $("overview").hidden = !overview;
  document.querySelector("header.top").hidden = !overview;
  $("feature").hidden = overview;
  if (list !== drawn) {
    chosen = choose();
    drawn = list;
    renderControls();
    const words = { pictures: "with pictures", firing: "that fire", dead: "that never fire", all: "" }[state.ids ? "all" : state.show];
    $("status").textContent = `${count(chosen.length)} of ${count(N)} features ${chosen.length === N ? "" : words}`.trim();
    $("none").hidden = chosen.length > 0;
    grid.draw();
    table.draw();
    if (overview) scatter.draw();
  }
  if (!overview) {
    renderFeature(opened);
    scrollTo(0, 0);
    if (!first) $("feature-title").focus({ preventScroll: true }); // a page just loaded has its focus at the top
  } else if (before !== null) {
    document.title = title;
    scrollTo(0, overviewScroll);
    if (state.view === "table") table.show(before);
    const anchor = document.querySelector(`${state.view === "grid" ? "#grid" : "#rows"} [data-feature="${before}"] a`);
    anchor?.focus({ preventScroll: before === openedFirst }); // the list stands where it was, unless the reader went on from there
  }
}

const title = document.title;
const oneColumn = matchMedia("(max-width: 900px)");
const fold = () => { $("side").open = !oneColumn.matches; }; // pictures first where there is one column; beside them it cannot be folded
fold();
oneColumn.addEventListener("change", fold);
listenToControls();
addEventListener("hashchange", render);
render();
setHeat();
performance.mark("gallery-ready");
})();
