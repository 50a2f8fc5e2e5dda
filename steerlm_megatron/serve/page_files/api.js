// The server's API as this page uses it, and what its errors mean in words.

const RETRY_WORDS = { 502: "answers no request", 504: "waited too long for the server" };

/** An answer that did not come. `message` is for people; `needsKey` is whether an API key is missing or wrong. */
export class Problem extends Error {
  constructor(message, { needsKey = false, retryAfterSec = null } = {}) {
    super(message);
    this.needsKey = needsKey;
    this.retryAfterSec = retryAfterSec;
  }
}

/** The server that this page came from. `key()` returns the API key, or "" for none. */
export class Server {
  constructor(key) {
    this.key = key;
  }

  /** Return the description of the model. Throws Problem. */
  async model() {
    const body = await json(await this.send("v1/models"));
    const model = body.data?.[0];
    if (typeof model?.id !== "string") {
      throw new Problem("What answers at this address is not a steerlm server.");
    }
    return model;
  }

  /**
   * Yield the pieces of a response; return `{finish, usage}` at its end. Throws Problem, and what the signal says when
   * it aborts.
   */
  async *chat(body, signal) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.send("v1/chat/completions", asked, signal);
    const end = { finish: null, usage: null };
    let whole = false;
    for await (const data of events(response, signal)) {
      if (data === "[DONE]") {
        whole = true;
        break;
      }
      const event = parsed(data);
      if (event.error) {
        throw new Problem(sentence(event.error.message ?? "the server stopped this response"));
      }
      end.usage = event.usage ?? end.usage;
      const choice = event.choices?.[0];
      end.finish = choice?.finish_reason ?? end.finish;
      if (choice?.delta?.content) {
        yield choice.delta.content;
      }
    }
    if (!whole) {
      throw new Problem("The connection was lost before the end of the response.");
    }
    return end;
  }

  /** Return the measured values of the last message, by attribute. Throws Problem. */
  async score(model, messages, signal) {
    const body = await json(await this.send("v1/score", { model, messages }, signal));
    const values = body.data?.[0]?.values ?? [];
    return values.find((one) => one.message === messages.length - 1)?.attributes ?? {};
  }

  async send(path, body = null, signal = null) {
    const headers = this.key() ? { Authorization: `Bearer ${this.key()}` } : {};
    const options = { headers, signal, cache: "no-store", credentials: "same-origin" };
    if (body !== null) {
      headers["Content-Type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), options);
    } catch (error) {
      throw signal?.aborted ? error : unreachable(error);
    }
    if (!response.ok) {
      throw await refusal(response);
    }
    return response;
  }
}

function unreachable(error) {
  console.warn("no answer", error);
  return new Problem("The server cannot be reached. Is it running, and is this computer connected to it?");
}

async function json(response) {
  let text;
  try {
    text = await response.text();
  } catch (error) {
    throw unreachable(error);
  }
  return parsed(text);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    console.warn("not JSON", error);
    throw new Problem("What answers at this address is not a steerlm server.");
  }
}

/** Yield the data of server-sent events. Throws Problem if the connection is lost. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal?.aborted) {
          throw error;
        }
        console.warn("the stream ended", error);
        throw new Problem("The connection was lost before the end of the response.");
      }
      if (part.done) {
        return;
      }
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          yield line.slice(5).trim();
        }
      }
    }
  } finally {
    reader.cancel().catch((error) => console.debug("the stream has ended already", error));
  }
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch (failure) {
    console.warn("the refusal has no JSON body", failure);
  }
  const said = typeof error.message === "string" ? sentence(error.message) : "";
  const wait = Number(response.headers.get("Retry-After"));
  const retryAfterSec = Number.isFinite(wait) && wait > 0 ? wait : null;
  const later = retryAfterSec === null ? "Try again later." : `Try again in ${retryAfterSec} s.`;
  const { status } = response;
  if (status === 401 || (status === 403 && !said)) {
    return new Problem(said || "The server asks for an API key.", { needsKey: true });
  }
  if (status === 429) {
    return new Problem(`Too many requests wait at the server. ${later}`, { retryAfterSec });
  }
  if (status === 503) {
    const why = {
      shutting_down: "The server is shutting down or starting again.",
      too_many_connections: "Too many people are connected to the server.",
    };
    return new Problem(`${why[error.code] ?? "The server does not take requests at present."} ${later}`, { retryAfterSec });
  }
  if (error.code === "context_length_exceeded") {
    return new Problem(`The conversation is too long for the model: begin a new chat, or shorten a message. ${said}`);
  }
  if (status === 413) {
    return new Problem(`The conversation is larger than the server accepts. ${said}`);
  }
  if (status in RETRY_WORDS) {
    return new Problem(`A proxy in front of the server ${RETRY_WORDS[status]} (HTTP ${status}). ${later}`);
  }
  return new Problem(said || `The server answered with HTTP ${status}.`, { retryAfterSec });
}

function sentence(text) {
  const trimmed = text.trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?…]$/.test(trimmed) ? "" : ".");
}
