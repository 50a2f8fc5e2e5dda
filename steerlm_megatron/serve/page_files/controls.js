// The sliders of attributes and the fields of sampling parameters, for one setting or for two.

import { byId, element } from "./dom.js";
import { SAMPLING, SIDES, copyOf, readNumber, serversOwn } from "./settings.js";

const MOST_TICKS = 20;

/**
 * The panel of settings. `settings` has `a`, `b`, `compare` and `system`; the panel changes it and calls `changed`.
 */
export class Controls {
  constructor(schema, model, settings, changed) {
    Object.assign(this, { schema, model, settings, changed });
    this.wrong = new Map(); // fields with something else than they take -> what they take
    byId("reset").addEventListener("click", () => this.reset());
    byId("copy-a").addEventListener("click", () => {
      this.settings.b = copyOf(this.settings.a);
      this.show();
      this.changed();
    });
    const system = byId("system");
    system.addEventListener("input", () => {
      this.settings.system = system.value;
      this.changed();
    });
  }

  /** Show the settings as they are, all anew. */
  show() {
    const { compare, system } = this.settings;
    const sides = compare ? SIDES : ["a"];
    this.wrong.clear();
    document.body.dataset.compare = String(compare);
    byId("copy-a").hidden = !compare;
    byId("attributes").replaceChildren(...this.schema.names.map((name) => this.attribute(name, sides)));
    byId("sampling").replaceChildren(...this.samplingFields(sides));
    byId("system").value = system;
    const changed = sides.some((side) => Object.values(this.settings[side].sampling).some((value) => value !== null));
    byId("sampling-panel").open ||= changed;
    byId("system-panel").open ||= system !== "";
  }

  /** Return what is wrong with a field, or null. */
  problem() {
    return [...this.wrong.values()][0] ?? null;
  }

  reset() {
    Object.assign(this.settings, { a: serversOwn(), b: serversOwn(), system: "" });
    this.show();
    this.changed();
  }

  attribute(name, sides) {
    const label = `attribute-${name}`;
    const sliders = sides.map((side) => this.slider(name, side, sides.length > 1));
    const title = element("span", { class: "name", id: label, text: name });
    return element("div", { class: "attribute", role: "group", "aria-labelledby": label }, title, ...sliders);
  }

  slider(name, side, two) {
    const { maxLevel, defaults } = this.schema;
    const levels = () => this.settings[side].levels;
    const value = element("span", { class: "value", "aria-hidden": "true" });
    const who = two ? `${name}, setting ${side.toUpperCase()}` : name;
    const reset = element("button", {
      type: "button", class: "undo", "aria-label": `${who}: the server's own level`, title: "The server's own level",
      text: "↺",
    });
    const input = element("input", {
      type: "range", min: 0, max: maxLevel, step: 1, "aria-label": who,
      "data-attribute": name, "data-side": side,
    });
    const ticks = element("span", { class: "ticks", "aria-hidden": "true" });
    if (maxLevel <= MOST_TICKS) {
      ticks.append(...Array.from({ length: maxLevel + 1 }, () => element("i")));
    }
    const chip = two ? element("span", { class: "chip", "aria-hidden": "true", text: side.toUpperCase() }) : null;
    const rail = element("span", { class: "rail" }, ticks, input);
    const box = element("div", { class: "slider", "data-side": side }, chip, rail, value, reset);

    const show = () => {
      const set = name in levels();
      const level = levels()[name] ?? defaults[name];
      input.value = String(level ?? 0);
      input.style.setProperty("--fill", level === undefined ? 0 : level / maxLevel);
      box.dataset.state = set ? "set" : level === undefined ? "open" : "default";
      value.textContent = level === undefined ? "–" : String(level);
      value.title = set ? "" : level === undefined ? "not asked for" : "the server's own level";
      const words = level === undefined ? "not asked for" : `${level} of ${maxLevel}${set ? "" : ", the server's own"}`;
      input.setAttribute("aria-valuetext", words);
      reset.disabled = !set;
    };
    const set = () => {
      levels()[name] = Number(input.value);
      show();
      this.changed();
    };
    const unset = () => {
      delete levels()[name];
      show();
      this.changed();
    };
    input.addEventListener("input", set);
    // A click on the level at which the slider stands already asks for that level too.
    input.addEventListener("pointerup", () => box.dataset.state === "open" && set());
    input.addEventListener("keydown", (event) => {
      if (event.key === "Delete" || event.key === "Backspace") {
        unset();
      } else if (event.key === "Enter" && box.dataset.state !== "set") {
        set();
      }
    });
    reset.addEventListener("click", () => {
      unset();
      input.focus();
    });
    show();
    return box;
  }

  samplingFields(sides) {
    return Object.entries(SAMPLING).map(([name, rule]) => {
      const hint = `hint-${name}`;
      return element(
        "div",
        { class: "field", role: "group", "aria-label": rule.label },
        element("span", { class: "label", text: rule.label }),
        element("span", { class: "hint", id: hint, text: rule.hint }),
        ...sides.map((side) => this.field(name, side, sides.length > 1, hint)),
      );
    });
  }

  field(name, side, two, hint) {
    const rule = SAMPLING[name];
    const own = this.model.sampling?.[name];
    const { sampling } = this.settings[side];
    const input = element("input", {
      type: "number", inputmode: rule.whole ? "numeric" : "decimal", step: rule.whole ? 1 : "any",
      min: rule.min ?? rule.above, max: rule.max, placeholder: own ?? (name === "seed" ? "random" : ""),
      "aria-label": two ? `${rule.label}, setting ${side.toUpperCase()}` : rule.label, "aria-describedby": hint,
      "data-parameter": name, "data-side": side, autocomplete: "off", value: sampling[name],
    });
    input.addEventListener("input", () => {
      try {
        if (input.validity.badInput) {
          throw new RangeError(`${rule.label} is a number`);
        }
        this.settings[side].sampling[name] = readNumber(name, input.value);
        this.wrong.delete(input);
        input.removeAttribute("aria-invalid");
      } catch (error) {
        this.wrong.set(input, error.message);
        input.setAttribute("aria-invalid", "true");
      }
      this.changed();
    });
    return input;
  }
}
