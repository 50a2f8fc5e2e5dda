// What is asked of the model: levels of attributes and sampling parameters, and their written form in a link.
// Nothing here touches the page.

export const SIDES = ["a", "b"];

/** Sampling parameters: an absent one (null) is the server's own. `above` is a bound that is not reached itself. */
export const SAMPLING = {
  temperature: { label: "Temperature", hint: "0: always the most likely token", min: 0, max: 100, step: 0.05 },
  top_p: { label: "Top p", hint: "share of probability that is kept", above: 0, max: 1, step: 0.01 },
  top_k: { label: "Top k", hint: "tokens that are kept; 0: all", min: 0, max: 1000000, whole: true },
  max_tokens: { label: "Max tokens", hint: "longest response", min: 1, max: 1000000, whole: true },
  seed: { label: "Seed", hint: "same seed, same response", min: 0, max: Number.MAX_SAFE_INTEGER, whole: true },
};

const MAX_SYSTEM_CHARS = 20000; // of a link

/** Return the settings of a side that asks for nothing in particular. */
export function serversOwn() {
  return { levels: {}, sampling: Object.fromEntries(Object.keys(SAMPLING).map((name) => [name, null])) };
}

/** Return an equal setting that changes by itself. */
export function copyOf(setting) {
  return { levels: { ...setting.levels }, sampling: { ...setting.sampling } };
}

/**
 * Return what can be asked of a model, as `/v1/models` describes it: `names`, `maxLevel`, `defaults` (the levels that
 * the server asks for where a request names none) and `unseen` (attributes that the model has not learned).
 */
export function schemaOf(model) {
  const given = model.attributes;
  if (!given) {
    return { names: [], maxLevel: 0, defaults: {}, unseen: [] };
  }
  const unseen = given.unseen ?? [];
  const names = given.names.filter((name) => !unseen.includes(name));
  const wanted = { [given.quality]: given.max_level, ...given.best };
  const defaults = Object.fromEntries(names.filter((name) => name in wanted).map((name) => [name, wanted[name]]));
  return { names, maxLevel: given.max_level, defaults, unseen };
}

/** Return all levels that a response is asked for, in the schema's order: those that are set, else the server's. */
export function askedLevels(schema, setting) {
  const wanted = { ...schema.defaults, ...setting.levels };
  return Object.fromEntries(schema.names.filter((name) => name in wanted).map((name) => [name, wanted[name]]));
}

/** Return those of some levels that the schema has. */
export function knownLevels(schema, levels) {
  return Object.fromEntries(Object.entries(levels).filter(([name, level]) => levelProblem(schema, name, level) === null));
}

function levelProblem(schema, name, level) {
  if (!schema.names.includes(name)) {
    return `${name}: this model has no such attribute`;
  }
  if (!Number.isInteger(level) || level < 0 || level > schema.maxLevel) {
    return `${name}: levels go from 0 to ${schema.maxLevel}`;
  }
  return null;
}

/** Return a sampling parameter's number from its text, or null for no text. Throws RangeError with what it may be. */
export function readNumber(name, text) {
  const rule = SAMPLING[name];
  if (text.trim() === "") {
    return null;
  }
  const number = Number(text);
  const low = rule.above === undefined ? number >= rule.min : number > rule.above;
  if (!Number.isFinite(number) || !low || number > rule.max || (rule.whole && !Number.isInteger(number))) {
    const from = rule.above === undefined ? `from ${rule.min}` : `above ${rule.above}`;
    throw new RangeError(`${rule.label} is a ${rule.whole ? "whole " : ""}number ${from} to ${rule.max}`);
  }
  return number;
}

/**
 * Return the settings as a link's fragment, such as `a=humor:9&a.temperature=0.7`, or "" where all is the server's own.
 * `settings` has `a` and `b` (see `serversOwn`), `compare` and `system`. Neither keys nor messages are in it.
 */
export function toFragment(settings) {
  const parts = [];
  for (const side of settings.compare ? SIDES : ["a"]) {
    const { levels, sampling } = settings[side];
    const label = Object.entries(levels).map(([name, level]) => `${name}:${level}`);
    if (label.length) {
      parts.push([side, label.join(",")]);
    }
    for (const [name, value] of Object.entries(sampling)) {
      if (value !== null) {
        parts.push([`${side}.${name}`, String(value)]);
      }
    }
  }
  if (settings.compare) {
    parts.push(["compare", "1"]);
  }
  if (settings.system) {
    parts.push(["system", settings.system]);
  }
  return parts.map(([name, value]) => `${name}=${written(value)}`).join("&");
}

function written(value) {
  // A system message that was cut inside of a character has half of one, which cannot be written.
  return encodeURIComponent(value.toWellFormed ? value.toWellFormed() : value).replaceAll("%3A", ":").replaceAll("%2C", ",");
}

/** Return the settings of a fragment, and `problems`: what in it was left out, and why. */
export function fromFragment(fragment, schema) {
  const found = { a: serversOwn(), b: serversOwn(), compare: false, system: "" };
  const problems = [];
  for (const [name, value] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    const [side, parameter] = [name.slice(0, 1), name.slice(2)];
    if (SIDES.includes(name)) {
      readLevels(value, schema, found[name].levels, problems);
    } else if (SIDES.includes(side) && name[1] === "." && Object.hasOwn(SAMPLING, parameter)) {
      try {
        found[side].sampling[parameter] = readNumber(parameter, value);
      } catch (error) {
        problems.push(error.message);
      }
    } else if (name === "compare") {
      found.compare = value === "1";
    } else if (name === "system") {
      found.system = value.slice(0, MAX_SYSTEM_CHARS);
    } else {
      problems.push(`${name.slice(0, 40)}: not a setting of this page`);
    }
  }
  return { settings: found, problems };
}

function readLevels(text, schema, levels, problems) {
  for (const part of text.split(",").filter((one) => one !== "")) {
    const colon = part.lastIndexOf(":");
    const name = part.slice(0, Math.max(0, colon));
    const digits = part.slice(colon + 1);
    const problem = levelProblem(schema, name, /^\d+$/.test(digits) ? Number(digits) : NaN);
    if (problem === null) {
      levels[name] = Number(digits);
    } else {
      problems.push(problem.slice(0, 80));
    }
  }
}
