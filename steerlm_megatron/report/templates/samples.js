// The browser of responses in a report: search, filters, sorting and pages over the JSON that the page embeds.
// Text is put into the page as text alone (textContent), so that no response can become markup.
"use strict";
(() => {
  const PAGE = 10;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("samples-data").textContent);
  const controls = Object.fromEntries(
    ["words", "model", "attribute", "level", "kind", "least", "sort"].map((name) => [name, byId(`samples-${name}`)])
  );
  const list = byId("samples-list");
  const status = byId("samples-status");
  const [back, next] = [byId("samples-back"), byId("samples-next")];
  let found = [];
  let first = 0;

  // How far a response is from what was asked for ("asked"), or judges from each other ("judges"): the largest distance
  // over attributes, or that of one attribute; -1 where nothing can be compared. report/samples.py has the same rule.
  function distance(response, kind, attribute) {
    const asked = response.a === null ? {} : data.asks[response.a];
    const values = new Map();
    data.judges.forEach((judge, j) => judge.measured.forEach((name, i) => {
      const value = response.v[j][i];
      if (value !== null && (!attribute || name === attribute)) values.set(name, [...(values.get(name) || []), value]);
    }));
    let largest = -1;
    for (const [name, some] of values) {
      if (kind === "asked" && name in asked) {
        largest = Math.max(largest, ...some.map((value) => Math.abs(value - asked[name])));
      } else if (kind === "judges" && some.length > 1) {
        largest = Math.max(largest, Math.max(...some) - Math.min(...some));
      }
    }
    return largest;
  }

  const strongest = (group, kind, attribute) => Math.max(...group.r.map((one) => distance(one, kind, attribute)));
  const lower = (text) => text.toLowerCase();

  function matching() {
    const words = lower(controls.words.value).split(/\s+/).filter(Boolean);
    const [model, attribute, level] = [controls.model.value, controls.attribute.value, controls.level.value];
    const [kind, least] = [controls.kind.value, Number(controls.least.value) || 0];
    const groups = [];
    for (const group of data.groups) {
      if (attribute && !group.b && !group.x.includes(attribute)) continue;
      const rows = group.r.filter((one) =>
        (model === "" || one.m === Number(model)) &&
        (level === "" || (one.a !== null && data.asks[one.a][attribute] === Number(level))) &&
        (kind === "" || distance(one, kind, attribute) >= least));
      if (!rows.length) continue;
      const text = lower([data.prompts[group.p], ...rows.map((one) => one.t)].join("\n"));
      if (words.every((word) => text.includes(word))) groups.push({ ...group, r: rows });
    }
    const sort = controls.sort.value;
    if (sort) {
      const keys = new Map(groups.map((group) => [group, strongest(group, sort, attribute)]));
      groups.sort((one, other) => keys.get(other) - keys.get(one));
    }
    return groups;
  }

  function element(tag, style, text, ...inside) {
    const made = document.createElement(tag);
    if (style) made.className = style;
    if (text) made.textContent = text;
    made.append(...inside);
    return made;
  }

  const written = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(1));
  const chips = (values, style) =>
    Object.entries(values).map(([name, value]) => element("span", `chip ${style}`, `${name}:${written(value)}`));

  function responseOf(one) {
    const made = element("div", "response", "", element("div", "muted small", data.models[one.m]));
    if (one.a !== null) made.append(element("div", "small muted", "asked ", ...chips(data.asks[one.a], "")));
    made.append(one.t ? element("div", "text", one.t) : element("div", "muted", "(an empty response)"));
    data.judges.forEach((judge, j) => {
      const pairs = judge.measured.map((name, i) => [name, one.v[j][i]]).filter(([, value]) => value !== null);
      if (!pairs.length) return;
      const said = data.judges.length > 1 ? `measured by ${judge.name} ` : "measured ";
      made.append(element("div", "small muted", said, ...chips(Object.fromEntries(pairs), "got")));
    });
    return made;
  }

  function titleOf(group) {
    const levels = group.b ? null : data.asks[group.r[0].a];
    const asked = group.b ? "at the best levels" : group.x.map((name) => `${name} ${levels[name]}`).join(", ");
    return `Prompt ${group.p + 1}, ${asked || "at other levels"}`;
  }

  function show() {
    const shown = found.slice(first, first + PAGE);
    list.replaceChildren(...shown.map((group) => element("article", "card sample", "",
      element("h3", "small muted", titleOf(group)),
      element("div", "prompt", data.prompts[group.p]),
      ...group.r.map(responseOf))));
    const responses = found.reduce((sum, group) => sum + group.r.length, 0);
    status.textContent = found.length
      ? `${found.length} of ${data.groups.length} match, with ${responses} response${responses === 1 ? "" : "s"}; ` +
        `${first + 1} to ${first + shown.length} are shown.`
      : "Nothing matches. Take a word or a filter away.";
    back.disabled = first === 0;
    next.disabled = first + PAGE >= found.length;
  }

  function update() {
    found = matching();
    first = 0;
    show();
  }

  function turn(by) {
    first = Math.max(0, first + by * PAGE);
    show();
    list.focus({ preventScroll: true });
    list.scrollIntoView();
  }

  // The levels to choose from are those that some request asks of the attribute.
  function offerLevels() {
    const attribute = controls.attribute.value;
    const levels = new Set(data.asks.map((asked) => asked[attribute]).filter((level) => level !== undefined));
    controls.level.replaceChildren(element("option", "", "any"), ...[...levels].sort((a, b) => a - b).map((level) => {
      const option = element("option", "", String(level));
      option.value = level;
      return option;
    }));
    controls.level.firstChild.value = "";
    controls.level.disabled = !attribute;
  }

  let waiting = 0;
  controls.words.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 150);
  });
  controls.attribute.addEventListener("change", offerLevels);
  for (const name of ["model", "attribute", "level", "kind", "least", "sort"]) {
    controls[name].addEventListener("change", update);
  }
  controls.kind.addEventListener("change", () => (controls.least.disabled = controls.kind.value === ""));
  back.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  const form = byId("samples-controls");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => {
    offerLevels();
    controls.least.disabled = true;
    update();
  }));
  offerLevels();
  form.hidden = byId("samples-pages").hidden = false;
  update();
})();
