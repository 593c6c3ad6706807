"use strict";
// Recorded responses of a step, and its timeline. A block of responses is parsed when its step is chosen.

const KIND = { rollouts: "step", evaluations: "evaluation at step" };
const SHOWN_OF_PROMPT = 90;

function blocks(run) {
  return [...document.querySelectorAll("script.responses")].filter((block) => Number(block.dataset.run) === run);
}

// A menu of steps. `initial` is the place of the one that is shown first.
function choice(label, options, show, initial) {
  const select = element("select");
  options.forEach(({ text }, place) => {
    const option = element("option", null, text);
    option.value = String(place);
    select.append(option);
  });
  const target = element("div");
  const update = () => target.replaceChildren(show(options[Number(select.value)]));
  select.addEventListener("change", update);
  const step = (by) => {
    const next = Number(select.value) + by;
    if (next < 0 || next >= options.length) return;
    select.value = String(next);
    update();
  };
  const button = (text, by) => {
    const made = element("button", null, text);
    made.type = "button";
    made.addEventListener("click", () => step(by));
    return made;
  };
  select.value = String(initial);
  update();
  return element("div", null,
    element("div", "controls", element("label", null, `${label} `, select), button("previous", -1), button("next", 1)),
    target);
}

function fact(name, value, classes) {
  return element("span", `fact ${classes || ""}`, `${name} `, element("b", null, value));
}

function responseCard(row) {
  const parts = Object.entries(row.parts).map(([name, value]) =>
    element("span", "fact", visible(name), " ", element("b", null, number(value))));
  const facts = element("div", "facts", fact("reward", number(row.reward), "reward"), ...parts,
    row.advantage === null ? null : fact("advantage", number(row.advantage)),
    element("span", row.stop === "stop" ? "fact" : "fact cut", "ended by ", element("b", null, visible(row.stop || "?"))),
    fact("tokens", number(row.tokens)), fact("weights of step", number(row.version)));
  return element("div", "response", facts, element("pre", null, visible(row.text)));
}

function rewardsOf(group) {
  const rewards = group.rows.map((row) => row.reward).filter((reward) => reward !== null);
  if (!rewards.length) return "no reward";
  const [least, most] = [Math.min(...rewards), Math.max(...rewards)];
  return least === most ? `reward ${number(least)}` : `reward ${number(least)} to ${number(most)}`;
}

function beginning(text) {
  const line = text.replace(/\s+/gu, " ").trim();
  const characters = [...line];
  return characters.length > SHOWN_OF_PROMPT ? `${characters.slice(0, SHOWN_OF_PROMPT).join("")} ...` : line;
}

function groupDetails(group, place, open) {
  const title = element("span", null, `${place + 1}. `, visible(beginning(group.prompt)), " ",
    element("span", "fact reward", rewardsOf(group)));
  return folded(title, () => {
    const columns = Object.entries(group.columns).map(([name, value]) => [visible(name), visible(value)]);
    return element("div", "group",
      element("pre", "prompt", visible(group.prompt)),
      group.label === null ? null : element("div", "label", "label: ", visible(group.label)),
      columns.length ? folded("columns of the row", () => table(["column", "value"], columns)) : null,
      ...group.rows.map(responseCard));
  }, open);
}

function blockShown(block) {
  const found = JSON.parse(block.textContent);
  const groups = found.groups.map((group, place) => groupDetails(group, place, place === 0));
  const hidden = found.num_groups - found.groups.length;
  const note = hidden
    ? element("p", "faint", `${hidden} of ${found.num_groups} groups are left out; `,
      element("code", null, `rlhf report ... --steps ${found.step}`), " shows all.")
    : null;
  return element("div", "groups", note, ...groups);
}

function responses() {
  const parts = data.runs.flatMap((run, place) => {
    const options = blocks(place).map((block) => ({ text: `${KIND[block.dataset.kind]} ${block.dataset.step}`, block }));
    if (!options.length) return [];
    const total = run.num_recorded;
    const note = total > options.length
      ? element("p", "faint", `${options.length} of ${total} recorded files are on this page; `,
        element("code", null, "rlhf report ... --steps N"), " adds others.") : null;
    const trained = options.filter((option) => option.block.dataset.kind === "rollouts").length;
    const initial = (trained || options.length) - 1;
    return [runHeading(place), note, choice("responses of", options, (option) => blockShown(option.block), initial)];
  });
  const none = element("p", null, "No responses are recorded: the method samples none, or log.rollouts is off.");
  return section("responses", "Responses", ...(parts.length ? parts : [none]));
}

function bar(name, start, end, seconds, colorOf) {
  const made = element("div", `bar ${colorOf(name)}`, visible(name));
  made.style.left = `${(100 * start) / seconds}%`;
  made.style.width = `${(100 * (end - start)) / seconds}%`;
  made.title = `${name}: ${number(end - start)} s, from ${number(start)} s`;
  return made;
}

function timelineShown(line) {
  const order = [];
  const colorOf = (name) => {
    if (name === "other") return "bar-other";
    if (!order.includes(name)) order.push(name);
    return `bar-${order.indexOf(name) % COLORS.length}`;
  };
  const last = Math.max(line.seconds, ...line.rows.flatMap((row) => row.bars.map((one) => one[2])), 1e-9);
  const rows = line.rows.map((row) => {
    const lengths = new Map();
    for (const [name, start, end] of row.bars) lengths.set(name, (lengths.get(name) || 0) + end - start);
    const told = [...lengths].sort((a, b) => b[1] - a[1]).slice(0, 6)
      .map(([name, length]) => `${name} ${number(Number(length.toPrecision(3)))} s`).join(", ");
    return element("div", "track", element("div", null, element("b", null, visible(row.name)), " ",
      element("span", "faint", visible(told))),
      element("div", "bars", ...row.bars.map(([name, start, end]) => bar(name, start, end, last, colorOf))));
  });
  return element("div", "timeline", element("p", null, `${number(line.seconds)} s`), ...rows);
}

function timelines() {
  const parts = data.runs.flatMap((run, place) => {
    const options = run.timelines.map((line) => ({ text: `${line.step}${line.is_slow ? " (slow)" : ""}`, line }));
    return options.length
      ? [runHeading(place), choice("step", options, (option) => timelineShown(option.line), options.length - 1)] : [];
  });
  const none = element("p", null, "No step is finished.");
  return section("timeline", "Time of a step", ...(parts.length ? parts : [none]));
}
