// The page: what it knows, and what happens when somebody does something. The other modules know nothing of each
// other's work; this one joins them.

import { Problem, Server } from "./api.js";
import { Controls } from "./controls.js";
import { fromText, isRunning, messagesToScore, messagesUpTo, newAnswer, toText } from "./conversation.js";
import { byId, copyText, element, tabStorage } from "./dom.js";
import { SIDES, askedLevels, copyOf, fromFragment, schemaOf, serversOwn, toFragment } from "./settings.js";
import { Transcript, sends } from "./transcript.js";

const KEPT = `steerlm ${location.pathname}`; // servers below other paths of this address keep their own
const SEEDS = 2 ** 31;
const HASH_DELAY_MS = 300;

const storage = tabStorage();
const keep = {
  get key() {
    return storage.getItem(`${KEPT} key`) ?? "";
  },
  set key(value) {
    storage.setItem(`${KEPT} key`, value);
  },
  get turns() {
    return fromText(storage.getItem(`${KEPT} turns`));
  },
  set turns(turns) {
    try {
      storage.setItem(`${KEPT} turns`, toText(turns));
    } catch (error) {
      console.warn("this conversation is too long to outlive a reload", error);
    }
  },
};

const server = new Server(() => keep.key);

class Page {
  constructor(model) {
    this.model = model;
    this.schema = schemaOf(model);
    this.scored = model.scored_attributes ?? [];
    this.turns = keep.turns;
    this.running = new Map(); // answer -> what ends it
    const context = { schema: this.schema, scored: this.scored, maxValue: model.scored_max_level ?? this.schema.maxLevel };
    this.settings = { a: serversOwn(), b: serversOwn(), compare: false, system: "" };
    this.controls = new Controls(this.schema, model, this.settings, () => this.noteSettings());
    const actions = {
      edit: (turn, text) => this.edit(turn, text),
      retry: (turn, side) => this.retry(turn, side),
      measure: (turn, side) => this.measure(turn, side),
    };
    this.transcript = new Transcript(byId("turns"), byId("scroller"), byId("latest"), actions, context);
    this.describe();
    this.listen();
    this.readLink();
    byId("app").hidden = false;
    this.show();
    this.transcript.toEnd();
    focusMessage();
  }

  describe() {
    const { model, schema } = this;
    document.title = `${model.id} · SteerLM`;
    byId("model").textContent = model.id;
    byId("context").textContent = `${model.max_model_len} tokens of context`;
    byId("welcome-title").textContent = `Chat with ${model.id}`;
    const notes = [];
    if (!schema.names.length) {
      notes.push("This model was trained without attributes: there is nothing to steer.");
    }
    if (schema.unseen.length) {
      notes.push(`Not learned, and so not to be asked for: ${schema.unseen.join(", ")}.`);
    }
    byId("schema-note").textContent = notes.join(" ");
    byId("schema-note").hidden = !notes.length;
    byId("levels-note").hidden = !schema.names.length;
    byId("measure-note").textContent = this.scored.length
      ? "Under a response, ○ is the level asked for, and ● the value that the server's attribute-prediction model measures."
      : "Responses are not measured: this server has no attribute-prediction model (ap_checkpoint).";
  }

  listen() {
    const message = byId("message");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.sayMessage(message.value);
    });
    message.addEventListener("keydown", (event) => {
      if (sends(event)) {
        event.preventDefault();
        this.sayMessage(message.value);
      }
    });
    message.addEventListener("input", () => fit(message));
    byId("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) {
        this.stop();
      }
    });
    byId("new").addEventListener("click", () => {
      this.stop();
      this.replaceTurns([]);
      focusMessage();
    });
    byId("compare").addEventListener("click", () => this.setCompare(!this.settings.compare));
    byId("share").addEventListener("click", () => this.share());
    byId("panel-button").addEventListener("click", () => openPanel(byId("panel").dataset.open !== "true"));
    for (const button of document.querySelectorAll("#examples button")) {
      button.addEventListener("click", () => this.sayMessage(button.textContent));
    }
    addEventListener("hashchange", () => this.readLink());
  }

  readLink() {
    if (location.hash.replace(/^#/, "") === toFragment(this.settings)) {
      return;
    }
    const { settings, problems } = fromFragment(location.hash, this.schema);
    Object.assign(this.settings, settings);
    this.show();
    const more = problems.length > 3 ? ` (and ${problems.length - 3} more)` : "";
    warn(problems.length ? `Some of the link was left out: ${problems.slice(0, 3).join("; ")}${more}.` : "");
  }

  noteSettings() {
    clearTimeout(this.hashTimer);
    this.hashTimer = setTimeout(() => this.writeLink(), HASH_DELAY_MS);
  }

  writeLink() {
    clearTimeout(this.hashTimer);
    const fragment = toFragment(this.settings);
    history.replaceState(null, "", fragment ? `#${fragment}` : location.pathname + location.search);
  }

  setCompare(compare) {
    const { a, b } = this.settings;
    this.settings.compare = compare;
    if (compare && JSON.stringify(b) === JSON.stringify(serversOwn())) {
      this.settings.b = copyOf(a);
    }
    this.writeLink();
    this.show();
    say(compare ? "Two settings side by side." : "One setting.");
  }

  async share() {
    this.writeLink();
    const field = byId("link");
    field.value = location.href;
    byId("share-told").textContent = (await copyText(field.value)) ? "The link is copied." : "Copy the link:";
    byId("share-dialog").showModal();
    field.select();
  }

  show() {
    this.controls.show();
    byId("compare").setAttribute("aria-pressed", String(this.settings.compare));
    this.showTurns();
  }

  showTurns() {
    byId("welcome").hidden = this.turns.length > 0;
    this.transcript.show(this.turns, this.settings.compare);
    this.showRunning();
  }

  showRunning() {
    const runs = this.running.size > 0;
    byId("stop").hidden = !runs;
    byId("send").hidden = runs;
    const used = this.turns.flatMap((turn) => Object.values(turn.answers)).findLast((answer) => answer.usage)?.usage;
    const total = used ? used.prompt_tokens + used.completion_tokens : 0;
    byId("context").textContent = `${total ? `${total} of ` : ""}${this.model.max_model_len} tokens of context`;
  }

  replaceTurns(turns) {
    this.turns = turns;
    keep.turns = turns;
    this.showTurns();
  }

  sayMessage(text) {
    if (!text.trim()) {
      return;
    }
    if (this.running.size) {
      warn("The response is still being written: wait for it, or stop it.");
      return;
    }
    if (!this.settingsAreRight()) {
      return;
    }
    byId("message").value = "";
    fit(byId("message"));
    openPanel(false);
    this.begin([...this.turns, { said: text, answers: {} }]);
  }

  /** Return whether all settings are such that they can be asked for. One that is not is shown and said. */
  settingsAreRight() {
    const problem = this.controls.problem();
    if (problem !== null) {
      openPanel(true);
      byId("sampling-panel").open = true;
    }
    warn(problem === null ? "" : `${problem}.`);
    return problem === null;
  }

  edit(turn, text) {
    if (!this.settingsAreRight()) {
      return;
    }
    this.stop();
    this.begin([...this.turns.slice(0, this.turns.indexOf(turn)), { said: text, answers: {} }]);
    focusMessage();
  }

  /** Have the last of these turns answered, by one setting or by both. */
  begin(turns) {
    const turn = turns.at(-1);
    const seed = newSeed(); // one for both settings, so that what differs is what was set
    const sides = this.settings.compare ? SIDES : ["a"];
    for (const side of sides) {
      turn.answers[side] = this.answerBy(side, seed);
    }
    this.replaceTurns(turns);
    this.transcript.toEnd();
    sides.forEach((side) => this.ask(turn, side));
  }

  retry(turn, side) {
    if (isRunning(turn.answers[side]) || !this.settingsAreRight()) {
      return;
    }
    turn.answers[side] = this.answerBy(side, newSeed());
    this.transcript.toEnd();
    this.ask(turn, side);
    focusMessage();
  }

  answerBy(side, seed) {
    const { levels, sampling } = copyOf(this.settings[side]);
    const asked = { ...sampling, seed: sampling.seed ?? seed };
    return newAnswer(side, askedLevels(this.schema, { levels }), asked, this.settings.system);
  }

  messagesBefore(turn, side) {
    return messagesUpTo(this.turns, this.turns.indexOf(turn), side, turn.answers[side].system, this.schema);
  }

  async ask(turn, side) {
    const answer = turn.answers[side];
    const ends = new AbortController();
    this.running.set(answer, ends);
    this.showTurns();
    const messages = this.messagesBefore(turn, side);
    const sampling = Object.fromEntries(Object.entries(answer.sampling).filter(([, value]) => value !== null));
    const attributes = this.schema.names.length ? { attributes: answer.levels } : {};
    const began = performance.now();
    let frame = 0;
    try {
      const pieces = server.chat({ model: this.model.id, messages, ...attributes, ...sampling }, ends.signal);
      for (;;) {
        const { value, done } = await pieces.next();
        if (done) {
          Object.assign(answer, value);
          break;
        }
        answer.text += value;
        answer.state = "streaming";
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          this.transcript.update(turn, side);
        });
      }
      answer.state = "done";
    } catch (error) {
      this.failed(answer, error, ends.signal.aborted);
    }
    cancelAnimationFrame(frame);
    answer.seconds = (performance.now() - began) / 1000;
    this.running.delete(answer);
    this.transcript.update(turn, side);
    this.showRunning();
    keep.turns = this.turns;
    const name = this.settings.compare ? `Answer ${side.toUpperCase()}` : "The answer";
    say(`${name} ${{ done: "is complete", stopped: "was stopped", failed: "did not come" }[answer.state]}.`);
    if (answer.state !== "failed") {
      await this.measure(turn, side, messages);
    }
  }

  failed(answer, error, aborted) {
    answer.state = aborted ? "stopped" : "failed";
    if (aborted) {
      return;
    }
    if (!(error instanceof Problem)) {
      console.error(error);
    }
    answer.problem = error instanceof Problem ? error.message : `The page failed: ${error}`;
    if (error.needsKey) {
      askForKey(error.message);
    }
  }

  /** Have an answer measured, if the server can. What it follows may be given, else it is what it follows on the page. */
  async measure(turn, side, before = null) {
    const answer = turn.answers[side];
    if (!this.scored.length || !answer.text.trim() || !this.turns.includes(turn)) {
      return;
    }
    const messages = before ?? this.messagesBefore(turn, side);
    answer.measured = { waiting: true };
    this.transcript.update(turn, side);
    try {
      answer.measured = { values: await server.score(this.model.id, messagesToScore(messages, answer.text)) };
    } catch (error) {
      if (!(error instanceof Problem)) {
        console.error(error);
      }
      answer.measured = { problem: error.message };
    }
    this.transcript.update(turn, side);
    keep.turns = this.turns;
  }

  stop() {
    this.running.forEach((ends) => ends.abort());
  }
}

/** Have the keyboard write a message, but where that would make a keyboard come up on the screen. */
function focusMessage() {
  if (matchMedia("(pointer: fine)").matches) {
    byId("message").focus({ preventScroll: true });
  }
}

function newSeed() {
  return Math.floor(Math.random() * SEEDS);
}

/** Tell users of screen readers what happened. */
function say(text) {
  byId("status").textContent = text;
}

/** Show a line above the composer, or none. */
function warn(text) {
  byId("warning").textContent = text;
  byId("warning").hidden = text === "";
}

/** Open or close the settings where the page is too narrow to have them beside the conversation. */
function openPanel(open) {
  byId("panel").dataset.open = String(open);
  byId("panel-button").setAttribute("aria-expanded", String(open));
}

/** Make a text field as high as its text; the style sheet says how high at most. */
function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function askForKey(told) {
  byId("key-told").textContent = told;
  const dialog = byId("key-dialog");
  if (!dialog.open) {
    dialog.showModal();
  }
}

let page = null;

async function start() {
  const told = byId("start");
  told.replaceChildren(element("p", { text: "Connecting …" }));
  try {
    const model = await server.model();
    told.hidden = true;
    if (page === null) {
      page = new Page(model);
    } else {
      warn("");
    }
    byId("key-button").hidden = keep.key === "";
  } catch (error) {
    if (!(error instanceof Problem)) {
      console.error(error);
    }
    if (error.needsKey) {
      askForKey(keep.key ? error.message : "This server asks for an API key.");
    }
    if (page !== null) {
      warn(error.message);
      return;
    }
    told.replaceChildren(
      element("p", { text: error.message }),
      element("button", { type: "button", class: "primary", text: error.needsKey ? "Enter a key" : "Try again", onclick: start }),
    );
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keep.key = byId("key").value.trim();
  byId("key").value = "";
  byId("key-dialog").close();
  start();
});
byId("key-button").addEventListener("click", () => askForKey("The key that is sent with every request from this tab."));
for (const button of document.querySelectorAll("dialog .close")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
start();
