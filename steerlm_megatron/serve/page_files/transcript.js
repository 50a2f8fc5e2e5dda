// The conversation on the page: each turn's message and its answers, and the buttons beside them.

import { copyText, element } from "./dom.js";
import { isRunning } from "./conversation.js";
import { askedLine, measuredList } from "./measured.js";
import { TextView } from "./text_view.js";

const NEAR_END_PX = 48;

/**
 * The view of a conversation in `root`, which scrolls in `scroller`. `actions` are called with a turn: `edit(turn,
 * text)`, `retry(turn, side)` and `measure(turn, side)`. `context` has `schema`, `scored` (the names of measured
 * attributes) and `maxValue` (the highest of their scale).
 */
export class Transcript {
  constructor(root, scroller, latest, actions, context) {
    Object.assign(this, { root, scroller, latest, actions, context });
    this.views = new Map(); // turn -> its view
    this.follows = true; // whether the reader is at the end, where new text comes
    scroller.addEventListener("scroll", () => this.look());
    new ResizeObserver(() => this.keepUp()).observe(scroller); // the keyboard of a phone takes room, and a long message
    latest.addEventListener("click", () => {
      this.toEnd();
      scroller.focus({ preventScroll: true });
    });
  }

  /** Show these turns, the views of those that stay being kept; B's answers only where two settings are compared. */
  show(turns, compare) {
    for (const [turn, view] of this.views) {
      if (!turns.includes(turn)) {
        view.root.remove();
        this.views.delete(turn);
      }
    }
    turns.forEach((turn, i) => {
      if (!this.views.has(turn)) {
        const view = new TurnView(turn, this.actions, this.context);
        this.views.set(turn, view);
        this.root.append(view.root);
      }
      this.views.get(turn).show(compare, i === turns.length - 1);
    });
    this.keepUp();
  }

  /** Show one answer as it is. */
  update(turn, side) {
    this.views.get(turn)?.answers[side]?.show();
    this.keepUp();
  }

  /** Go to the end, and stay there. */
  toEnd() {
    this.follows = true;
    this.keepUp();
  }

  keepUp() {
    if (this.follows) {
      this.scroller.scrollTop = this.scroller.scrollHeight;
    }
    this.look();
  }

  look() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.latest.hidden = this.follows;
  }
}

class TurnView {
  constructor(turn, actions, context) {
    Object.assign(this, { turn, actions, context, answers: {} });
    this.said = element("div", { class: "text", text: turn.said });
    this.editButton = element("button", { type: "button", class: "quiet", text: "Edit", onclick: () => this.edit() });
    const tools = element("div", { class: "tools" }, this.editButton);
    this.message = element("article", { class: "said", "aria-label": "You" }, this.said, tools);
    this.row = element("div", { class: "answers" });
    this.root = element("section", { class: "turn" }, this.message, this.row);
  }

  show(compare, isLast) {
    const sides = compare && this.turn.answers.b ? ["a", "b"] : ["a"];
    this.row.dataset.count = sides.length;
    for (const side of sides) {
      if (this.answers[side]?.answer !== this.turn.answers[side]) {
        this.answers[side] = new AnswerView(this.turn, side, this.actions, this.context);
      }
      this.answers[side].place(sides.length > 1, isLast);
    }
    const wanted = sides.map((side) => this.answers[side].root);
    if (wanted.length !== this.row.children.length || wanted.some((node, i) => node !== this.row.children[i])) {
      this.row.replaceChildren(...wanted);
    }
  }

  edit() {
    const field = element("textarea", { rows: 3, "aria-label": "Your message", maxlength: 1000000 });
    field.value = this.turn.said;
    const done = () => {
      form.replaceWith(this.message);
      this.editButton.focus();
    };
    const form = element(
      "form",
      {
        class: "said editing",
        "aria-label": "Edit your message",
        onsubmit: (event) => {
          event.preventDefault();
          if (field.value.trim()) {
            this.actions.edit(this.turn, field.value);
          }
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            done();
          } else if (sends(event)) {
            event.preventDefault();
            form.requestSubmit();
          }
        },
      },
      field,
      element(
        "div",
        { class: "tools" },
        element("span", { class: "hint", text: "What follows is replaced." }),
        element("button", { type: "button", class: "quiet", text: "Cancel", onclick: done }),
        element("button", { type: "submit", class: "primary small", text: "Send" }),
      ),
    );
    this.message.replaceWith(form);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** Return whether a key press sends what was written. Enter that ends the input of a character (IME) does not. */
export function sends(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

class AnswerView {
  constructor(turn, side, actions, context) {
    Object.assign(this, { turn, side, actions, context, answer: turn.answers[side] });
    this.text = new TextView();
    this.chip = element("span", { class: "chip", text: side.toUpperCase() });
    this.note = element("p", { class: "note" });
    this.values = element("div", { class: "values" });
    this.facts = element("span", { class: "facts" });
    this.copy = element("button", { type: "button", class: "quiet", text: "Copy", onclick: () => this.toClipboard() });
    this.retry = element("button", { type: "button", class: "quiet", text: "Retry" });
    this.retry.addEventListener("click", () => actions.retry(turn, side));
    const tools = element("div", { class: "tools" }, this.facts, this.copy, this.retry);
    const parts = [this.chip, this.text.root, this.note, this.values, tools];
    this.root = element("article", { class: "answer", "data-side": side }, ...parts);
    this.show();
  }

  /** Take the place of one of two answers or of the only one; the last turn's can be asked for again. */
  place(two, isLast) {
    this.chip.hidden = !two;
    this.root.setAttribute("aria-label", two ? `Answer ${this.side.toUpperCase()}` : "Answer");
    this.isLast = isLast;
    this.show();
  }

  show() {
    const { answer } = this;
    const running = isRunning(answer);
    this.root.dataset.state = answer.state;
    this.root.setAttribute("aria-busy", String(running));
    this.text.show(answer.text);
    this.text.root.hidden = answer.text === "" && !running;
    const told = noteOf(answer);
    this.note.textContent = told;
    this.note.hidden = told === "";
    this.facts.textContent = factsOf(answer);
    this.copy.hidden = running || answer.text === "";
    this.retry.hidden = running || !this.isLast;
    if (!running && (this.shownValues !== answer.measured || !this.values.hasChildNodes())) {
      this.shownValues = answer.measured;
      this.values.replaceChildren(...this.measured());
    }
  }

  measured() {
    const { answer, context } = this;
    const { measured } = answer;
    if (answer.text.trim() === "") {
      return [];
    }
    if (measured?.values) {
      const { names, maxLevel } = context.schema;
      return [measuredList(answer.levels, measured.values, names, maxLevel, context.maxValue)];
    }
    const line = askedLine(answer.levels);
    const shown = line === null ? [] : [line];
    if (measured?.waiting) {
      shown.push(element("p", { class: "asked-line", text: "Measuring …" }));
    } else if (measured?.problem) {
      const again = element("button", { type: "button", class: "quiet", text: "Measure again" });
      again.addEventListener("click", () => this.actions.measure(this.turn, this.side));
      shown.push(element("p", { class: "asked-line" }, `Not measured. ${measured.problem} `, again));
    }
    return shown;
  }

  async toClipboard() {
    const copied = await copyText(this.answer.text);
    if (!copied) {
      getSelection().selectAllChildren(this.text.root);
    }
    this.copy.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => {
      this.copy.textContent = "Copy";
    }, 1600);
  }
}

function noteOf(answer) {
  const left = answer.text.trim() === "" ? " It is not part of the conversation." : "";
  switch (answer.state) {
    case "waiting":
      return "Waiting for the first word …";
    case "failed":
      return answer.text === "" ? answer.problem : `${answer.problem} What came is kept.`;
    case "stopped":
      return `Stopped.${left}`;
    case "done":
      if (answer.finish === "length") {
        return `The response was cut at ${answer.usage?.completion_tokens ?? "its most"} tokens, the most it may have.`;
      }
      return left ? `The response is empty.${left}` : "";
    default:
      return "";
  }
}

function factsOf(answer) {
  if (isRunning(answer)) {
    return "";
  }
  const parts = [];
  if (answer.usage) {
    parts.push(`${answer.usage.completion_tokens} tokens`);
  }
  if (answer.seconds !== null && answer.state !== "failed") {
    parts.push(`${answer.seconds.toFixed(1)} s`);
  }
  if (answer.sampling.seed !== null && answer.sampling.seed !== undefined && answer.state !== "failed") {
    parts.push(`seed ${answer.sampling.seed}`);
  }
  return parts.join(" · ");
}
