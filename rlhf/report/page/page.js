"use strict";
// The page, from its data.

const HARMLESS = new Set(["resume", "checkpoint", "replacement", "repair"]);
const data = JSON.parse(document.getElementById("data").textContent);
const names = data.runs.map((run) => run.name);
const several = names.length > 1;

function runHeading(place) {
  return several ? element("h3", `run run-${place % COLORS.length}`, visible(names[place])) : null;
}

function verdicts() {
  const lines = data.comparison.map((line) => element("p", "result", visible(line)));
  for (const [place, run] of data.runs.entries()) {
    const name = several ? element("b", `run run-${place % COLORS.length}`, visible(run.name), ": ") : null;
    lines.push(element("p", run.wrong.length ? "verdict wrong" : "verdict", name, visible(run.line)));
  }
  return lines;
}

function summary() {
  const parts = data.runs.map((run, place) => {
    const troubles = Object.entries(run.troubles).map(([process, lines]) =>
      folded(`Last complaints of ${process}`, () => element("pre", null, visible(lines.join("\n")))));
    const config = run.config
      ? folded("Settings (config.yaml)", () => element("pre", null, visible(run.config))) : null;
    return element("div", "summary", runHeading(place),
      element("h4", null, "What moved"), list(run.moved.length ? run.moved : ["nothing that two steps show"]),
      element("h4", null, "What is wrong"), list(run.wrong.length ? run.wrong : ["nothing that the run noticed"]),
      element("h4", null, "The run"), list(run.facts), ...troubles, config);
  });
  return section("summary", "Summary", element("div", "columns", ...parts));
}

function differences() {
  const rows = Object.entries(data.settings).map(([key, values]) =>
    [visible(key), ...values.map((one) => visible(typeof one === "string" ? one : JSON.stringify(one)))]);
  const shown = rows.length ? table(["setting", ...names.map(visible)], rows)
    : element("p", null, "All settings are the same.");
  return section("settings", "Settings that differ", shown);
}

function marksOf() {
  return data.runs.flatMap((run) => run.events.filter((event) => event.step !== null).map((event) => ({
    step: event.step,
    harmless: HARMLESS.has(event.kind),
    text: `${several ? `${run.name}: ` : ""}step ${event.step}, ${event.kind}: ${event.text}`,
  })));
}

function controls() {
  const smoothing = element("input");
  Object.assign(smoothing, { type: "range", min: "0", max: "0.98", step: "0.02", value: String(settings.smoothing) });
  smoothing.id = "smoothing";
  const log = element("input");
  Object.assign(log, { type: "checkbox", id: "log" });
  const filter = element("input");
  Object.assign(filter, { type: "search", id: "filter", placeholder: "filter by name" });
  smoothing.addEventListener("change", () => { settings.smoothing = Number(smoothing.value); redrawAll(); });
  log.addEventListener("change", () => { settings.log = log.checked; redrawAll(); });
  filter.addEventListener("input", () => {
    for (const box of document.querySelectorAll(".chart")) {
      box.hidden = !box.dataset.metric.includes(filter.value.trim());
    }
  });
  return element("div", "controls", element("label", null, "smoothing ", smoothing),
    element("label", null, log, " logarithmic"), element("label", null, "metrics ", filter));
}

function metrics() {
  const { steps, metrics: all } = data.curves;
  if (!all.length) return section("metrics", "Metrics", element("p", null, "No step is finished."));
  const marks = marksOf();
  const box = (metric) => chartBox(metric, steps, names, marks);
  const byName = new Map(all.map((metric) => [metric.name, metric]));
  const grid = (chosen) => element("div", "grid", ...chosen.map(box));
  const first = data.first.map((name) => byName.get(name)).filter(Boolean);
  const groups = new Map();
  for (const metric of all.filter((one) => !data.first.includes(one.name))) {
    const prefix = metric.name.split("/")[0];
    groups.set(prefix, [...(groups.get(prefix) || []), metric]);
  }
  const others = [...groups].map(([name, group]) =>
    folded(`${name} (${group.length})`, () => grid(group), !first.length));
  for (const part of others) part.classList.add("metrics-group");
  return section("metrics", "Metrics", controls(), first.length ? grid(first) : null, ...others);
}

function events() {
  const rows = data.runs.flatMap((run) => run.events.map((event) => [
    ...(several ? [visible(run.name)] : []), event.step === null ? "-" : String(event.step), visible(event.kind),
    visible(event.text)]));
  const hidden = data.runs.reduce((sum, run) => sum + run.num_events - run.events.length, 0);
  const count = data.runs.reduce((sum, run) => sum + run.num_events, 0);
  if (!count) return section("events", "Events", element("p", null, "None."));
  const head = [...(several ? ["run"] : []), "step", "kind", "text"];
  const note = hidden ? element("p", null, `${hidden} earlier events are not shown.`) : null;
  return section("events", "Events", note, folded(`${count} events`, () => table(head, rows), count <= 20));
}

function show() {
  document.getElementById("verdicts").append(...verdicts());
  const sections = [summary(), ...(several ? [differences()] : []), metrics(), responses(), timelines(),
    events()];
  const main = document.getElementById("main");
  main.replaceChildren(...sections);
  document.getElementById("contents").append(...sections.map((one) => {
    const link = element("a", null, one.querySelector("h2").textContent);
    link.href = `#${one.id}`;
    return link;
  }));
  document.getElementById("footer").append(`Written by rlhf ${data.version} at ${data.made}. Charts by uPlot (MIT).`);
}

show();
