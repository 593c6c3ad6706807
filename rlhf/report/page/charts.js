"use strict";
// Curves of metrics. A chart is drawn when it comes into view, and again when the colors of the page change.

const COLORS = ["--run-0", "--run-1", "--run-2", "--run-3", "--run-4", "--run-5", "--run-6", "--run-7"];
const CHART_HEIGHT = 180;
const MARK_DISTANCE = 6; // pixels
const LEAST_SMOOTHED = 20; // points
const drawn = new Set();
const settings = { smoothing: 0.6, log: false };

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function runColor(run) {
  return color(COLORS[run % COLORS.length]);
}

// An exponential moving average that starts at the first value, without its bias toward 0.
function smooth(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

// The columns of a chart: the union of the steps, then for each run its lines: the values, the smoothed values where
// there are enough of them, and the least and largest where a point stands for several steps.
function columns(metric, steps) {
  const tables = metric.runs.flatMap((curve, run) => {
    if (!curve) return [];
    const lines = { value: curve.y };
    if (settings.smoothing > 0 && curve.y.length >= LEAST_SMOOTHED) lines.smooth = smooth(curve.y, settings.smoothing);
    if (curve.low.length) Object.assign(lines, { low: curve.low, high: curve.high });
    return [{ run, lines, data: [steps[curve.x], ...Object.values(lines)] }];
  });
  const data = tables.length > 1 ? uPlot.join(tables.map((one) => one.data)) : tables[0].data;
  return { tables, data };
}

// The lines of a run are shown and hidden together. One of them stands for the run in the legend.
function seriesOf(tables, names) {
  const series = [{ label: "step" }];
  const bands = [];
  for (const { run, lines } of tables) {
    const stroke = runColor(run);
    const main = lines.smooth ? "smooth" : "value";
    const several = names.length > 1;
    for (const line of Object.keys(lines)) {
      const isMain = line === main;
      const isEdge = line === "low" || line === "high";
      const label = several ? names[run] : line === "smooth" ? "smoothed" : "value";
      series.push({
        run, label, value, spanGaps: true, class: isEdge || (several && !isMain) ? "unlisted" : "listed",
        stroke: isEdge ? "transparent" : isMain ? stroke : `${stroke}55`, width: isEdge ? 0 : isMain ? 2 : 1,
        points: isMain && lines.value.length < LEAST_SMOOTHED ? { size: 5 } : { show: false },
      });
    }
    if (lines.high) bands.push({ series: [series.length - 1, series.length - 2], fill: `${stroke}22` });
  }
  return { series, bands };
}

function together(plot, place, change) {
  if (place === null || change.show === undefined) return;
  const run = plot.series[place].run;
  plot.series.forEach((one, other) => {
    if (other && other !== place && one.run === run) plot.setSeries(other, { show: change.show }, false);
  });
}

function value(_, shown) {
  return number(shown);
}

// Events as dashed lines, and their texts under the chart while the pointer is near one.
function markPlugin(marks, note) {
  return {
    hooks: {
      draw: (plot) => {
        const { ctx, bbox } = plot;
        ctx.save();
        ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
        ctx.lineWidth = devicePixelRatio;
        for (const mark of marks) {
          const x = plot.valToPos(mark.step, "x", true);
          if (x < bbox.left || x > bbox.left + bbox.width) continue;
          ctx.strokeStyle = mark.harmless ? color("--faint") : color("--mark");
          ctx.beginPath();
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
          ctx.stroke();
        }
        ctx.restore();
      },
      setCursor: (plot) => {
        const left = plot.cursor.left;
        const near = left < 0 ? [] : marks.filter((m) => Math.abs(plot.valToPos(m.step, "x") - left) < MARK_DISTANCE);
        note.replaceChildren(...near.slice(0, 2).map((mark) => element("div", null, visible(mark.text))));
      },
    },
  };
}

function draw(box, metric, steps, names, marks) {
  const { tables, data } = columns(metric, steps);
  const { series, bands } = seriesOf(tables, names);
  const note = element("div", "note");
  const axis = { stroke: color("--text"), grid: { stroke: color("--grid"), width: 1 }, ticks: { stroke: color("--grid") } };
  const plot = new uPlot({
    width: Math.max(200, box.clientWidth),
    height: CHART_HEIGHT,
    series,
    bands,
    scales: { x: { time: false }, y: { distr: settings.log && positive(data) ? 3 : 1 } },
    axes: [{ ...axis, size: 32 }, { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))) }],
    cursor: { sync: { key: "step" }, y: false },
    legend: { live: true },
    hooks: { setSeries: [together] },
    plugins: [markPlugin(marks, note)],
  }, data, box);
  box.append(note);
  return plot;
}

function positive(data) {
  return data.slice(1).every((column) => column.every((one) => one === null || one === undefined || one > 0));
}

// The box of a metric's chart, drawn once it is in view.
function chartBox(metric, steps, names, marks) {
  const plotBox = element("div", "plot");
  const box = element("figure", "chart", element("figcaption", null, visible(metric.name)), plotBox);
  box.dataset.metric = metric.name;
  const chart = {
    plot: null,
    redraw() {
      if (chart.plot) chart.plot.destroy();
      plotBox.replaceChildren();
      chart.plot = draw(plotBox, metric, steps, names, marks);
    },
  };
  new IntersectionObserver((entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    chart.redraw();
    drawn.add(chart);
    new ResizeObserver(() => {
      const width = Math.max(200, plotBox.clientWidth);
      if (chart.plot && chart.plot.width !== width) chart.plot.setSize({ width, height: CHART_HEIGHT });
    }).observe(plotBox);
  }, { rootMargin: "300px" }).observe(box);
  return box;
}

function redrawAll() {
  for (const chart of drawn) chart.redraw();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
