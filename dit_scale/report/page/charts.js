// Charts of the curves: one uPlot each, with a shared cursor and a shared zoom over the steps.
"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const several = page.runs.length > 1;
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';
const hidden = new Set(); // "panel/key" and "run/number" that are switched off

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Format a number with four digits, as a percentage, or with its unit, as the tables do.
function format(value, unit) {
  if (value === null || value === undefined) return "-";
  if (unit === "%") return (100 * value).toFixed(1) + "%";
  let text;
  if (Number.isInteger(value) || (Math.abs(value) >= 1000 && Math.abs(value) < 1e6)) {
    text = Math.round(value).toLocaleString("en-US");
  } else {
    const size = Math.abs(value);
    text = size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  }
  return unit ? text + " " + unit : text;
}

// A tick's label: short, because many of them share an axis.
function tick(value, unit) {
  if (unit === "%") return String(Number((100 * value).toPrecision(4))) + "%";
  const size = Math.abs(value);
  if (size >= 1e9) return Number((value / 1e9).toPrecision(4)) + "G";
  if (size >= 1e6) return Number((value / 1e6).toPrecision(4)) + "M";
  if (size >= 1e3) return Number((value / 1e3).toPrecision(4)) + "k";
  if (size && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(Number(value.toPrecision(4)));
}

// Evenly spaced ticks at round numbers.
function evenTicks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Ticks of a logarithmic axis at 1, 2 and 5 times powers of ten; at powers alone if there are many.
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 3 ? [1] : [1, 2, 5];
  const found = [];
  for (let power = first; power <= last; power++) {
    for (const factor of factors) {
      const value = Number((factor * 10 ** power).toPrecision(3));
      if (value >= low && value <= high) found.push(value);
    }
  }
  return found;
}

// Steps from the first to the last point of any curve.
function extent() {
  let low = Infinity, high = -Infinity;
  for (const run of page.runs) {
    for (const curve of Object.values(run.curves)) {
      if (curve.x.length) {
        low = Math.min(low, curve.x[0]);
        high = Math.max(high, curve.x[curve.x.length - 1]);
      }
    }
  }
  return low < high ? [low, high] : [low - 1, low + 1];
}

const whole = extent();
let zoom = whole;
const charts = [];

function setZoom(low, high) {
  low = Math.max(whole[0], Math.min(low, high));
  high = Math.min(whole[1], Math.max(low + 1e-9, high));
  zoom = high > low ? [low, high] : whole;
  for (const chart of charts) chart.plot.setScale("x", {min: zoom[0], max: zoom[1]});
  document.getElementById("zoom-from").value = Math.round(zoom[0]);
  document.getElementById("zoom-to").value = Math.round(zoom[1]);
}

// One chart: its lines are the series of its panel in every run that has them.
class Chart {
  constructor(panel, place, keys) {
    this.panel = panel;
    this.place = place;
    this.lines = [];
    page.runs.forEach((run, number) => {
      panel.series.forEach((series, index) => {
        if (run.curves[series.key]) this.lines.push({...series, run: number, index});
      });
    });
    const log = document.getElementById("log-" + panel.name);
    this.isLog = Boolean(log && log.checked);
    this.makeKeys(keys);
    this.draw();
  }

  style(line) {
    const place = several ? line.run : line.index;
    const dash = several ? line.index + Math.floor(line.run / 8) : Math.floor(line.index / 8);
    return {colour: "--s" + (place % 8), dash: DASHES[dash % DASHES.length]};
  }

  isShown(line) {
    return !hidden.has("run/" + line.run) && !hidden.has(this.panel.name + "/" + line.key);
  }

  // Legend: a button per series that switches it off, with its value at the cursor.
  makeKeys(list) {
    this.values = new Map();
    this.panel.series.forEach((series, index) => {
      const button = document.createElement("button");
      button.type = "button";
      const name = this.panel.name + "/" + series.key;
      button.setAttribute("aria-pressed", String(!hidden.has(name)));
      const {colour: hue, dash} = this.style({run: 0, index});
      const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
      picture.setAttribute("viewBox", "0 0 24 8");
      picture.setAttribute("aria-hidden", "true");
      for (const [key, value] of [["x1", 0], ["x2", 24], ["y1", 4], ["y2", 4], ["stroke-width", 2.5]]) {
        stroke.setAttribute(key, value);
      }
      stroke.setAttribute("stroke", several ? "currentColor" : "var(" + hue + ")");
      if (dash.length) stroke.setAttribute("stroke-dasharray", dash.join(" "));
      picture.append(stroke);
      const label = document.createElement("span");
      label.className = "label";
      label.textContent = series.label;
      const value = document.createElement("span");
      value.className = "value";
      this.values.set(series.key, value);
      button.append(picture, label, value);
      button.addEventListener("click", () => {
        if (!hidden.delete(name)) hidden.add(name);
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        this.showLines();
      });
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    });
  }

  // Points of all lines on common steps; null is a gap, undefined a step that a line does not have.
  data() {
    const tables = this.lines.map((line) => {
      const {x, y} = page.runs[line.run].curves[line.key];
      return [x, this.isLog ? y.map((value) => (value > 0 ? value : null)) : y];
    });
    return uPlot.join(tables, tables.map(() => [1, 1]));
  }

  draw() {
    if (this.plot) this.plot.destroy();
    const axis = (extra) => ({
      stroke: () => colour("--muted"), font: FONT, ticks: {show: false},
      grid: {stroke: () => colour("--grid"), width: 1}, ...extra,
    });
    const unit = this.panel.unit === "%" ? "%" : "";
    this.plot = new uPlot({
      width: this.place.clientWidth,
      height: this.place.clientHeight,
      padding: [8, 20, 0, 0],
      legend: {show: false},
      scales: {
        x: {time: false, range: (u, low, high) => (low === null ? whole : [low, high])},
        y: {distr: this.isLog ? 3 : 1, range: (u, low, high) => this.range(low, high)},
      },
      axes: [
        axis({space: 55, size: 26, values: (u, steps) => steps.map((step) => (Number.isInteger(step) ? tick(step) : ""))}),
        axis({
          size: 58, space: 34, values: (u, splits) => splits.map((value) => (value === null ? "" : tick(value, unit))),
          ...(this.isLog ? {splits: (u, i, low, high) => this.splits(low, high), filter: (u, splits) => splits} : {}),
        }),
      ],
      series: [{}, ...this.lines.map((line) => {
        const {colour: hue, dash} = this.style(line);
        return {
          label: line.label, show: this.isShown(line), stroke: () => colour(hue), width: 1.6, dash,
          points: {show: (u, i) => this.count(i) < 40, size: 5, fill: () => colour(hue)},
        };
      })],
      cursor: {
        y: false,
        points: {size: 7},
        drag: {x: true, y: false, setScale: false},
        sync: {key: "steps", scales: ["x", null], filters: {pub: isMove, sub: isMove}},
        dataIdx: (u, series, index) => nearest(u, series, index),
        bind: {dblclick: () => () => setZoom(...whole)},
      },
      hooks: {
        setSelect: [(u) => this.select(u)],
        setCursor: [(u) => this.read(u)],
        drawAxes: [(u) => this.markRestarts(u)],
      },
    }, this.data(), this.place);
    this.plot.setScale("x", {min: zoom[0], max: zoom[1]});
    this.read(this.plot);
  }

  // Number of points of a line.
  count(i) {
    return page.runs[this.lines[i - 1].run].curves[this.lines[i - 1].key].x.length;
  }

  range(low, high) {
    if (low === null || low === undefined) return this.isLog ? [0.1, 1] : [0, 1];
    if (this.isLog) return low < high ? [low / 1.08, high * 1.08] : [low / 1.5, high * 1.5];
    if (low === 0 && high === 0) return [0, 1];
    if (this.panel.unit === "%") return [Math.min(0, low), Math.max(high * 1.1, 0.01)];
    return uPlot.rangeNum(low, high, 0.08, true);
  }

  splits(low, high) {
    const found = logTicks(low, high);
    return found.length > 2 ? found : evenTicks(low, high);
  }

  select(u) {
    if (u.select.width < 4) return;
    const [low, high] = [u.select.left, u.select.left + u.select.width].map((at) => u.posToVal(at, "x"));
    u.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
    setZoom(low, high);
  }

  // Show the values at the cursor, or the last ones.
  read(u) {
    const index = u.cursor.idx;
    for (const series of this.panel.series) {
      const shown = this.lines.map((line, i) => [line, i + 1]).filter(([line]) => line.key === series.key && this.isShown(line));
      this.values.get(series.key).replaceChildren(...shown.map(([line, i]) => {
        const y = u.data[i];
        const at = index === null || index === undefined ? y.findLastIndex((one) => typeof one === "number") : nearest(u, i, index);
        const text = document.createElement("span");
        text.textContent = format(y[at], this.panel.unit);
        if (several) {
          const swatch = document.createElement("span");
          swatch.className = "swatch s" + (line.run % 8);
          text.prepend(swatch);
        }
        return text;
      }));
    }
    if (index !== null && index !== undefined) readout(u);
  }

  // Dashed lines where attempts resumed, behind the curves.
  markRestarts(u) {
    const {ctx, bbox} = u;
    ctx.save();
    ctx.setLineDash([4, 4]);
    ctx.lineWidth = devicePixelRatio;
    page.runs.forEach((run, number) => {
      if (hidden.has("run/" + number)) return;
      ctx.strokeStyle = several ? colour("--s" + (number % 8)) : colour("--bad");
      ctx.globalAlpha = 0.75;
      for (const [step] of run.restarts) {
        if (step < zoom[0] || step > zoom[1]) continue;
        const x = Math.round(u.valToPos(step, "x", true));
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
    });
    ctx.restore();
  }

  showLines() {
    this.lines.forEach((line, i) => this.plot.setSeries(i + 1, {show: this.isShown(line)}));
    this.read(this.plot);
  }

  resize() {
    this.plot.setSize({width: this.place.clientWidth, height: this.place.clientHeight});
  }
}

function isMove(kind) {
  return kind === "mousemove" || kind === "mouseleave" || kind === "mouseenter";
}

// The index of the point of a line that is nearest to the cursor: lines have points at different steps.
function nearest(u, series, index) {
  const y = u.data[series], x = u.data[0];
  if (!series || typeof y[index] === "number") return index;
  let left = index, right = index;
  while (left >= 0 && typeof y[left] !== "number") left--;
  while (right < y.length && typeof y[right] !== "number") right++;
  if (left < 0) return right < y.length ? right : index;
  if (right >= y.length) return left;
  return x[index] - x[left] <= x[right] - x[index] ? left : right;
}

// The step at the cursor, and the restarts near it.
function readout(u) {
  const step = u.data[0][u.cursor.idx];
  const near = (zoom[1] - zoom[0]) / 100;
  const texts = page.runs.flatMap((run) => run.restarts
    .filter(([at]) => Math.abs(at - step) <= near)
    .map(([at, text]) => "resumed at step " + format(at) + (several ? " of " + run.name : "") + ": " + text));
  document.getElementById("readout").textContent = ["Step " + format(step), ...texts.slice(0, 3)].join("; ");
}

// Arrow keys move the shared cursor; Home and End jump; Escape shows all steps.
function onKey(chart, event) {
  const u = chart.plot, x = u.data[0];
  const at = u.cursor.idx === null || u.cursor.idx === undefined ? -1 : u.cursor.idx;
  const first = x.findIndex((step) => step >= zoom[0]);
  const last = x.length - 1 - [...x].reverse().findIndex((step) => step <= zoom[1]);
  const jump = event.shiftKey ? Math.max(1, Math.round((last - first) / 20)) : 1;
  const to = {
    ArrowLeft: at < 0 ? last : at - jump, ArrowRight: at < 0 ? first : at + jump, Home: first, End: last,
  }[event.key];
  if (event.key === "Escape") setZoom(...whole);
  if (to === undefined) return;
  event.preventDefault();
  const index = Math.max(first, Math.min(last, to));
  u.setCursor({left: u.valToPos(x[index], "x"), top: 10}, true, true);
  const values = chart.lines.map((line, i) => [line, i + 1]).filter(([line]) => chart.isShown(line)).map(([line, i]) =>
    (several ? page.runs[line.run].name + " " : "") + line.label + " " + format(u.data[i][nearest(u, i, index)], chart.panel.unit));
  document.getElementById("announce").textContent = "step " + format(x[index]) + ": " + values.join(", ");
}

function drawCharts() {
  for (const panel of page.panels) {
    const place = document.querySelector('[data-panel="' + panel.name + '"]');
    const chart = new Chart(panel, place, document.querySelector('[data-keys="' + panel.name + '"]'));
    charts.push(chart);
    place.addEventListener("keydown", (event) => onKey(chart, event));
    const log = document.getElementById("log-" + panel.name);
    if (log) log.addEventListener("change", () => { chart.isLog = log.checked; chart.draw(); });
    new ResizeObserver(() => chart.resize()).observe(place);
  }
}
