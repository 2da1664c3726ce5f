// @ts-check
/**
 * Server-sent events: bytes in, events out, by the WHATWG event-stream rules, wherever the network split the bytes.
 *
 * Decides what an event is and how large one may grow. Leaves to mixtral-client.js what events mean and when to reconnect.
 * The twin of the Python client's sse.py; both pass the same golden fixtures.
 *
 * @module
 */

/** @import * as Declared from "./sse.js" */

const MAX_RETRY_MS = 86_400_000;

/**
 * @typedef {object} ServerSentEvent
 * @property {string} event its name; "message" where the stream names none
 * @property {string} data
 * @property {string} id the last id the stream has named, with this event or before it
 */

/** An event outgrew the decoder's limit: the other side is broken or hostile. */
export class EventTooLarge extends Error {
  /** @param {number} limit */
  constructor(limit) {
    super(`one event of the stream is larger than ${limit} characters, the most this client holds; raise maxEventChars or look at what sends it`);
    this.name = "EventTooLarge";
  }
}

/**
 * Decoder of one response body.
 * @implements {Declared.SseDecoder}
 */
export class SseDecoder {
  /** @type {number | null} the last `retry:` of the stream, at most a day */
  retryMs = null;
  lastId = "";
  #utf8 = new TextDecoder();
  #line = "";
  #afterCr = false;
  #event = "";
  /** @type {string[]} */
  #data = [];
  #dataChars = 0;
  #limit;

  /** @param {{maxEventChars?: number}} [options] */
  constructor({ maxEventChars = 1 << 20 } = {}) {
    this.#limit = maxEventChars;
  }

  /**
   * Take the next bytes of the body; give the events they complete. An event the body ends in the middle of is never given.
   * @param {Uint8Array} bytes
   * @returns {ServerSentEvent[]}
   */
  feed(bytes) {
    /** @type {ServerSentEvent[]} */
    const events = [];
    let text = this.#utf8.decode(bytes, { stream: true });
    if (text === "") return events;
    if (this.#afterCr && text[0] === "\n") text = text.slice(1); // the second half of a CRLF that was split
    this.#afterCr = text.endsWith("\r");
    for (const piece of text.match(/[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+/g) ?? []) {
      this.#line += piece;
      if (this.#line.length + this.#dataChars > this.#limit) throw new EventTooLarge(this.#limit);
      if (!/[\r\n]$/.test(piece)) break;
      const line = this.#line.replace(/\r?\n$|\r$/, "");
      this.#line = "";
      if (line !== "") this.#field(line);
      else if (this.#data.length > 0) events.push(this.#dispatch());
      else this.#event = "";
    }
    return events;
  }

  /** @param {string} line */
  #field(line) {
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon); // "" for a comment
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (name === "data") {
      this.#data.push(value);
      this.#dataChars += value.length + 1;
    } else if (name === "event") this.#event = value;
    else if (name === "id" && !value.includes("\0")) this.lastId = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) this.retryMs = Math.min(Number(value), MAX_RETRY_MS);
  }

  #dispatch() {
    const event = { event: this.#event || "message", data: this.#data.join("\n"), id: this.lastId };
    this.#event = "";
    this.#data = [];
    this.#dataChars = 0;
    return event;
  }
}
