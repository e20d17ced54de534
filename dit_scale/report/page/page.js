// Everything on the page besides the charts: theme, zoom fields, samples, printing, updates.
"use strict";

const STATE = "dit-scale-report:" + location.pathname;

// Browsers can refuse storage to a local file; the page then starts afresh each time.
function stored(storage, key, value) {
  try {
    if (value === undefined) return window[storage].getItem(key);
    window[storage].setItem(key, value);
  } catch {
    return null;
  }
  return null;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  for (const chart of charts) chart.plot.redraw(false);
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const preferred = () => stored("localStorage", "dit-scale-theme") || (system.matches ? "dark" : "light");
  setTheme(preferred());
  system.addEventListener("change", () => setTheme(preferred()));
  document.getElementById("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    stored("localStorage", "dit-scale-theme", theme);
    setTheme(theme);
  });
}

function startToolbar() {
  const fields = ["zoom-from", "zoom-to"].map((name) => document.getElementById(name));
  for (const field of fields) {
    field.min = whole[0];
    field.max = whole[1];
    field.addEventListener("change", () => {
      const [low, high] = fields.map((one) => Number(one.value));
      if (low < high) setZoom(low, high);
    });
  }
  document.getElementById("reset").addEventListener("click", () => setZoom(...whole));
  for (const box of document.querySelectorAll("[data-run]")) {
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete("run/" + box.dataset.run);
      else hidden.add("run/" + box.dataset.run);
      for (const chart of charts) chart.showLines();
    });
  }
}

// The slider of samples: each run and EMA profile shows its newest grid up to the chosen step.
function showGrids() {
  const step = page.grid_steps[Number(document.getElementById("grid").value)];
  document.getElementById("grid-step").textContent = "step " + format(step);
  document.getElementById("grid").setAttribute("aria-valuetext", "step " + format(step));
  page.strips.forEach((strip, number) => {
    if (!strip.pictures.length) return;
    const before = strip.pictures.filter((picture) => picture.step <= step);
    const grid = before[before.length - 1] || strip.pictures[0];
    const image = document.querySelector('[data-grid="' + number + '"]');
    image.src = grid.uri;
    image.width = grid.width;
    image.height = grid.height;
    image.alt = "Samples of " + strip.run + ", EMA profile " + strip.profile + ", at step " + format(grid.step);
    document.querySelector('[data-grid-step="' + number + '"]').textContent = "step " + format(grid.step);
  });
}

// Print in light colours, with charts in two columns: scripts cannot measure the paper.
function startPrinting() {
  let before;
  addEventListener("beforeprint", () => {
    before = document.documentElement.dataset.theme;
    setTheme("light");
    for (const {plot, place} of charts) plot.setSize({width: place.closest(".wide") ? 640 : 300, height: place.clientHeight});
  });
  addEventListener("afterprint", () => {
    setTheme(before);
    for (const chart of charts) chart.resize();
  });
}

// What the reader has set, kept over a reload.
function saveState() {
  const open = [...document.querySelectorAll("details[open]")].map((one) => one.id);
  const boxes = [...document.querySelectorAll("input[type=checkbox]")].map((box) => [box.id, box.checked]);
  const grid = document.getElementById("grid");
  const isLast = !grid || grid.value === grid.max;
  stored("sessionStorage", STATE, JSON.stringify({
    scroll: scrollY, zoom: zoom === whole ? null : zoom, hidden: [...hidden], open, boxes,
    grid: isLast ? null : page.grid_steps[Number(grid.value)], focus: document.activeElement.id, paused: isPaused(),
  }));
}

function isPaused() {
  const pause = document.getElementById("pause");
  return Boolean(pause && pause.getAttribute("aria-pressed") === "true");
}

function startUpdates(state) {
  const pause = document.getElementById("pause");
  pause.setAttribute("aria-pressed", String(Boolean(state && state.paused)));
  pause.addEventListener("click", () => pause.setAttribute("aria-pressed", String(!isPaused())));
  setInterval(() => { if (!isPaused()) location.reload(); }, 1000 * page.reload_s);
}

const state = JSON.parse(stored("sessionStorage", STATE) || "null");
if (state) {
  state.hidden.forEach((name) => hidden.add(name));
  for (const [id, checked] of state.boxes) {
    const box = document.getElementById(id);
    if (box) box.checked = checked;
  }
  for (const id of state.open) {
    const details = document.getElementById(id);
    if (details) details.open = true;
  }
}
startTheme();
if (page.panels.length) {
  drawCharts();
  startToolbar();
  setZoom(...((state && state.zoom) || whole));
  requestAnimationFrame(() => performance.mark("drawn"));
}
if (page.grid_steps.length) {
  const grid = document.getElementById("grid");
  const kept = state && state.grid !== null ? page.grid_steps.indexOf(state.grid) : -1;
  if (kept >= 0) grid.value = kept;
  grid.addEventListener("input", showGrids);
  showGrids();
}
startPrinting();
if (page.reload_s) startUpdates(state);
if (state) {
  history.scrollRestoration = "manual";
  scrollTo({top: state.scroll, behavior: "instant"});
  const focused = document.getElementById(state.focus);
  if (focused) focused.focus({preventScroll: true});
}
addEventListener("pagehide", saveState);
document.documentElement.dataset.ready = "true";
