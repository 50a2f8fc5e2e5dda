// A conversation: turns, each of a message and of the answers to it by the settings A and B. Nothing here touches the
// page.

import { knownLevels } from "./settings.js";

/**
 * Return a new answer. `state` is "waiting", "streaming", "done", "stopped" (by the reader) or "failed" (`problem` says
 * why). `measured` is null, or `{values}`, `{problem}` or `{waiting: true}`.
 */
export function newAnswer(side, levels, sampling, system) {
  return {
    side, levels, sampling, system, text: "", state: "waiting", finish: null, problem: null, usage: null, seconds: null,
    measured: null,
  };
}

/** Return whether the answer is being computed. */
export function isRunning(answer) {
  return answer.state === "waiting" || answer.state === "streaming";
}

/** Return the answer of a turn that a side's conversation goes on from: one that both have, or the side's own. */
export function answerOf(turn, side) {
  return turn.answers[side] ?? turn.answers.a;
}

/**
 * Return the messages up to and with the user's of turn `index`, as side `side` has them. Each earlier answer keeps the
 * levels that it was asked for, as in training. Turns without a text for an answer are left out.
 */
export function messagesUpTo(turns, index, side, system, schema) {
  const messages = system?.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, index)) {
    const answer = answerOf(turn, side);
    if (!answer?.text.trim()) {
      continue;
    }
    const levels = knownLevels(schema, answer.levels);
    const attributes = Object.keys(levels).length ? { attributes: levels } : {};
    messages.push({ role: "user", content: turn.said });
    messages.push({ role: "assistant", content: answer.text, ...attributes });
  }
  messages.push({ role: "user", content: turns[index].said });
  return messages;
}

/** Return the messages to measure a response by: those before it, without levels, and the response. */
export function messagesToScore(before, text) {
  return [...before.map(({ role, content }) => ({ role, content })), { role: "assistant", content: text }];
}

/** Return turns as text to keep; answers that are not whole count as stopped. */
export function toText(turns) {
  return JSON.stringify(turns);
}

/** Return the turns in a text of `toText`, and none if it is of anything else. */
export function fromText(text) {
  let turns = [];
  try {
    turns = JSON.parse(text ?? "[]");
  } catch (error) {
    console.warn("the conversation that was kept cannot be read", error);
  }
  if (!Array.isArray(turns) || !turns.every((turn) => typeof turn?.said === "string" && turn.answers?.a)) {
    return [];
  }
  for (const turn of turns) {
    for (const answer of Object.values(turn.answers)) {
      if (isRunning(answer)) {
        answer.state = "stopped";
      }
      if (answer.measured?.waiting) {
        answer.measured = null;
      }
    }
  }
  return turns;
}
