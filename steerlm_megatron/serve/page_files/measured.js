// Under a response: the levels that it was asked for and, where the server measures them, the values that it has.

import { element } from "./dom.js";

/** Return a value as it is shown: one digit after the point. */
export function shownValue(value) {
  return Number.isFinite(value) ? value.toFixed(1) : "–";
}

/**
 * Return a list of attributes, each with its asked level and its measured value on scales that may differ. `order` has
 * names that come first.
 */
export function measuredList(asked, values, order, maxLevel, maxValue) {
  const given = [...Object.keys(asked), ...Object.keys(values)];
  const names = [...new Set([...order.filter((name) => given.includes(name)), ...given])];
  return element("dl", { class: "measured" }, ...names.map((name) => row(name, asked[name], values[name], maxLevel, maxValue)));
}

function row(name, level, value, maxLevel, maxValue) {
  const told = [
    level === undefined ? "not asked for" : `asked ${level}`,
    value === undefined ? "not measured" : `measured ${shownValue(value)}`,
  ];
  const numbers = element(
    "span",
    { class: "numbers", "aria-hidden": "true", title: told.join(", ") },
    element("span", { class: "asked", text: level ?? "–" }),
    element("span", { class: "arrow", text: "→" }),
    element("b", { text: value === undefined ? "–" : shownValue(value) }),
  );
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  if (level !== undefined) {
    bar.append(mark("goal", level / maxLevel));
  }
  if (value !== undefined) {
    bar.append(mark("dot", value / maxValue));
  }
  return element(
    "div",
    {},
    element("dt", { text: name }),
    element("dd", {}, element("span", { class: "unseen", text: told.join(", ") }), numbers, bar),
  );
}

function mark(kind, share) {
  const made = element("i", { class: kind });
  made.style.setProperty("--at", Math.min(1, Math.max(0, share)));
  return made;
}

/** Return one line with the levels that a response was asked for, or null if there are none. */
export function askedLine(asked) {
  const parts = Object.entries(asked).map(([name, level]) => `${name} ${level}`);
  return parts.length ? element("p", { class: "asked-line", text: `Asked for: ${parts.join(" · ")}` }) : null;
}
