"use strict";
// Elements and text. Everything that comes from a run is set as text, never as markup.

// Controls, format characters (zero width, direction changes), halves of surrogate pairs, private and unassigned
// characters, and separators of lines: all that a reader cannot see, or that changes how the rest is shown.
const INVISIBLE = /[\p{C}\p{Zl}\p{Zp}]/u;
const INVISIBLES = /([\p{C}\p{Zl}\p{Zp}])/u;

function element(tag, classes, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function escaped(character) {
  const code = character.codePointAt(0);
  return code > 0xffff ? `\\u{${code.toString(16)}}` : code > 0xff
    ? `\\u${code.toString(16).padStart(4, "0")}` : `\\x${code.toString(16).padStart(2, "0")}`;
}

// Text of a run, with line breaks as they are and every other invisible character as a marked escape.
function visible(text) {
  const shown = document.createDocumentFragment();
  for (const part of String(text).split(INVISIBLES)) {
    if (part === "\n" || part === "\t" || !INVISIBLE.test(part)) shown.append(part);
    else shown.append(element("span", "escape", escaped(part)));
  }
  return shown;
}

function number(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return String(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : String(Number(value.toPrecision(4)));
}

function section(id, title, ...children) {
  const made = element("section", null, element("h2", null, title), ...children);
  made.id = id;
  return made;
}

// A part that is filled when it is opened for the first time.
function folded(title, fill, open = false) {
  const made = element("details", null, element("summary", null, title));
  let filled = false;
  const show = () => {
    if (!filled && made.open) {
      filled = true;
      made.append(fill());
    }
  };
  made.addEventListener("toggle", show);
  made.open = open;
  show();
  return made;
}

function table(head, rows, classes) {
  const body = element("tbody");
  for (const row of rows) body.append(element("tr", null, ...row.map((cell) => element("td", null, cell))));
  const top = element("thead", null, element("tr", null, ...head.map((cell) => element("th", null, cell))));
  return element("div", "scroll", element("table", classes, top, body));
}

function list(lines, classes) {
  return element("ul", classes, ...lines.map((line) => element("li", null, visible(line))));
}
