// @ts-check
/**
 * FakeServer: the service of this client for tests of programs that use it, as a `fetch` that never leaves the process.
 *
 *     const server = new FakeServer("Hello there.");
 *     const client = new MixtralClient({ baseUrl: server.url, apiKey: server.apiKey, fetch: server.fetch });
 *
 * Decides what a job answers, step by step, and what goes wrong on the way. Leaves out OpenAI's and AIME's routes, workers, queues and
 * limits. The steps of a script are those of the Python client's mixtral_client.testing; its types stand in testing.d.ts.
 *
 * @module
 */

/** @import * as Declared from "./testing.js" */
/** @import { Call, Failure, How, Request as Noted, Script, Step } from "./testing.js" */
/** @typedef {string | {end: How}} Piece of an events stream */

const STEPS = ["cut", "hold", "moved", "rewind", "error", "done", "comment", "event"];
const CUTS = ["close", "abort", "end", "silence"];
const PROMPT_TOKENS = 3;
const TIMINGS = { queue_s: 0.1, first_token_s: 0.2, total_s: 0.5 };
const NOTED_HEADERS = ["Authorization", "Idempotency-Key", "Last-Event-ID"];
/** @type {[string, RegExp, Call][]} */
const ROUTES = [
  ["POST", /^\/v1\/jobs$/, "submit"],
  ["GET", /^\/v1\/jobs\/([^/]+)\/events$/, "events"],
  ["GET", /^\/v1\/jobs\/([^/]+)$/, "job"],
  ["DELETE", /^\/v1\/jobs\/([^/]+)$/, "cancel"],
  ["GET", /^\/v1\/models$/, "models"],
];

/** One job: what its log holds, and the steps to come. */
class FakeJob {
  /** @type {string[]} */
  texts = [];
  /** @type {string[]} what readers were told live */
  sent = [];
  attempt = 1;
  state = "waiting";
  /** @type {Record<string, any> | null} the terminal event */
  end = null;
  wake = new Gate();

  /**
   * @param {string} id
   * @param {any} request
   * @param {Step[]} steps
   */
  constructor(id, request, steps) {
    this.id = id;
    this.request = request;
    this.steps = steps;
  }

  view() {
    const { finish = null, usage = null, timings = null, error = null } = this.end ?? {};
    const log = { attempt: this.attempt, tokens: this.texts.length, text: this.texts.join("") };
    const place = { position: null, eta_s: null, eta_p90_s: null };
    return { id: this.id, model: this.request.model, state: this.state, created: 1.5, ...place, ...log, finish, error, usage, timings };
  }

  cancel() {
    if (this.end === null) this.finish("cancelled", { finish: "cancelled" });
    this.wake.open();
  }

  /**
   * @param {string} state
   * @param {object} fields
   */
  finish(state, fields) {
    const count = this.texts.length;
    const usage = { prompt_tokens: PROMPT_TOKENS, completion_tokens: count, total_tokens: PROMPT_TOKENS + count, dropped_messages: 0 };
    this.state = state;
    this.end = { event: "done", finish: "stop", usage, timings: TIMINGS, ...fields };
  }

  get isHeld() {
    const [next] = this.steps;
    return typeof next === "object" && "hold" in next;
  }

  /** Carry out the next step, and forget it; a hold must be over. @returns {How | undefined} how the reader's connection ends, if it does */
  play() {
    const step = /** @type {any} */ (this.steps.shift());
    if (step === undefined) this.finish("done", {});
    else if (typeof step === "string") {
      this.state = "streaming";
      this.texts.push(step);
      this.sent.push(this.token(this.texts.length));
    } else if ("moved" in step) {
      this.attempt = step.moved;
      this.sent.push(sse({ event: "moved", attempt: step.moved }));
    } else if ("rewind" in step) {
      this.texts.length = Math.min(this.texts.length, step.rewind);
      this.sent.push(this.rewind());
    } else if ("error" in step) {
      this.state = "failed";
      this.end = { event: "error", error: { type: "server_error", param: null, ...step.error } };
    } else if ("done" in step) this.finish("done", step.done);
    else if ("comment" in step) this.sent.push(`: ${step.comment}\n\n`);
    else if ("event" in step) this.sent.push(sse(step));
    else return step.cut;
    return undefined;
  }

  /** Run on as jobs do whoever reads, up to the next hold. */
  playUnread() {
    while (this.end === null && !(this.isHeld && !this.wake.isOpen)) {
      if (this.isHeld) this.steps.shift();
      else this.play();
    }
  }

  /** @param {number} offset */
  token(offset) {
    return sse({ event: "token", offset, text: this.texts[offset - 1] }, this.idAt(offset));
  }

  rewind() {
    return sse({ event: "rewind", to: this.texts.length }, this.idAt(this.texts.length));
  }

  /** @param {number} offset */
  idAt(offset) {
    let hash = 0x811c9dc5; // FNV-1a: what it is does not matter, only that it differs where texts do
    for (const char of JSON.stringify(this.texts.slice(0, offset))) hash = Math.imul(hash ^ (char.codePointAt(0) ?? 0), 0x01000193) >>> 0;
    return `${offset}.${hash.toString(16).padStart(8, "0")}`;
  }

  /**
   * What one connection sends.
   * @param {string} after
   * @returns {AsyncGenerator<Piece, void, void>}
   */
  async *stream(after) {
    let live = this.sent.length;
    let offset = Number.parseInt(after || "0", 10);
    yield sse({ event: "queued", position: 1, eta_s: 0.5, eta_p90_s: null });
    if (offset > this.texts.length) {
      offset = this.texts.length;
      yield this.rewind();
    } else if (after.includes(".") && after !== this.idAt(offset)) {
      offset = 0;
      yield sse({ event: "rewind", to: 0 }, this.idAt(0));
    }
    if (this.attempt > 1) yield sse({ event: "moved", attempt: this.attempt });
    for (let missed = offset + 1; missed <= this.texts.length; missed += 1) yield this.token(missed);
    for (;;) {
      for (; live < this.sent.length; live += 1) yield this.sent[live];
      if (this.end !== null) return yield sse(this.end);
      if (this.isHeld) {
        const [hold] = this.steps;
        await this.wake.opened;
        if (this.steps[0] === hold) this.steps.shift();
        continue;
      }
      const end = this.play();
      if (end) yield { end };
    }
  }
}

/** A promise that is kept from outside. */
class Gate {
  constructor() {
    this.opened = new Promise((resolve) => (this.#resolve = () => resolve(undefined)));
  }

  isOpen = false;
  #resolve = () => {};

  open() {
    this.isOpen = true;
    this.#resolve();
  }
}

/**
 * Jobs answered by scripts: the k-th new job by the k-th script, further ones by the last.
 * @implements {Declared.FakeServer}
 */
export class FakeServer {
  url = "http://fake.test";
  apiKey = "test-key";
  /** @type {Noted[]} what was asked */
  requests = [];
  /** @type {Map<string, FakeJob>} */
  jobs = new Map();
  /** Stands in for globalThis.fetch. */
  fetch;
  /** @type {Step[][]} */
  #scripts = [];
  /** @type {{on: Call, failure: Failure | null}[]} null: the answer is lost */
  #faults = [];
  /** @type {Map<string, {job: FakeJob, body: string}>} */
  #byKey = new Map();
  #isReleased = false;

  /** @param {Script[]} scripts */
  constructor(...scripts) {
    this.answer(...(scripts.length ? scripts : ["Once upon a time"]));
    /** @type {typeof globalThis.fetch} */
    this.fetch = async (input, init) => this.#respond(new Request(input, init));
  }

  /** The scripts of the next jobs, in place of those that are left. @param {Script[]} scripts */
  answer(...scripts) {
    this.#scripts = scripts.map(stepsOf);
  }

  /**
   * Refuse the next requests of a kind; `code: null` is a proxy's HTML.
   * @param {Call} on
   * @param {Partial<Failure> & {times?: number}} [failure]
   */
  fail(on, { times = 1, ...failure } = {}) {
    const full = { status: 503, code: "unavailable", message: "the service is away; try again", retryAfter: "0", ...failure };
    for (let time = 0; time < times; time += 1) this.#faults.push({ on, failure: full });
  }

  /** Carry out the next requests of a kind, and break the connection instead of answering. @param {Call} on @param {{times?: number}} [options] */
  loseAnswer(on, { times = 1 } = {}) {
    for (let time = 0; time < times; time += 1) this.#faults.push({ on, failure: null });
  }

  /** End all holds, those to come included. */
  release() {
    this.#isReleased = true;
    for (const job of this.jobs.values()) job.wake.open();
  }

  /** @param {Call} call */
  asked(call) {
    return this.requests.filter((request) => request.call === call);
  }

  /** Of the jobs, in order of their making. */
  get states() {
    return [...this.jobs.values()].map((job) => job.state);
  }

  /** @param {Request} request */
  async #respond(request) {
    const { pathname } = new URL(request.url);
    const text = await request.text();
    request.signal.throwIfAborted();
    for (const [method, pattern, call] of ROUTES) {
      const match = request.method === method && pattern.exec(pathname);
      if (match) return this.#answered(request, text, call, decodeURIComponent(match[1] ?? ""));
    }
    return this.#error(404, "route_not_found", `this fake has no route ${request.method} ${pathname}; it has the native job routes`);
  }

  /**
   * @param {Request} request
   * @param {string} text
   * @param {Call} call
   * @param {string} id
   */
  #answered(request, text, call, id) {
    /** @type {Record<string, string>} */
    const headers = {};
    for (const name of NOTED_HEADERS) if (request.headers.has(name)) headers[name] = request.headers.get(name) ?? "";
    this.requests.push({ call, path: new URL(request.url).pathname, headers, body: text ? JSON.parse(text) : null });
    if (headers.Authorization !== `Bearer ${this.apiKey}`) {
      return this.#error(401, "invalid_api_key", "this key is not known here; ask for one", { kind: "authentication_error" });
    }
    const index = this.#faults.findIndex((fault) => fault.on === call);
    const [fault] = index < 0 ? [] : this.#faults.splice(index, 1);
    if (fault?.failure) return this.#refused(fault.failure);
    const answer = call === "submit" ? this.#submit(request, text) : this.#serve(request, call, id);
    if (fault) throw new TypeError("fetch failed", { cause: new Error("the answer was lost") });
    return answer;
  }

  /**
   * @param {Request} request
   * @param {string} text
   */
  #submit(request, text) {
    const body = JSON.parse(text);
    if ((body.messages === undefined) === (body.prompt === undefined)) {
      return this.#error(400, "invalid_request", "give exactly one of 'messages' (a chat) and 'prompt' (a text to continue)");
    }
    const key = request.headers.get("Idempotency-Key") ?? `key ${this.requests.length}`;
    const known = this.#byKey.get(key);
    if (known && known.body !== text) {
      return this.#error(422, "idempotency_conflict", "this Idempotency-Key was used with another body; use a new one");
    }
    const job = known?.job ?? new FakeJob(`mixtral_chat.0-${this.jobs.size + 1}`, body, this.#nextScript());
    if (this.#isReleased) job.wake.open();
    this.jobs.set(job.id, job);
    this.#byKey.set(key, { job, body: text });
    const accepted = { id: job.id, model: body.model, state: job.state, position: 1, eta_s: null, eta_p90_s: null };
    return this.#json(accepted, known ? 200 : 202);
  }

  #nextScript() {
    return [...(this.#scripts.length === 1 ? this.#scripts[0] : /** @type {Step[]} */ (this.#scripts.shift()))];
  }

  /**
   * @param {Request} request
   * @param {Call} call
   * @param {string} id
   */
  #serve(request, call, id) {
    if (call === "models") return this.#json({ object: "list", data: [{ id: "mixtral_chat", object: "model", created: 1, owned_by: "us" }] });
    const job = this.jobs.get(id);
    if (!job) return this.#error(404, "job_not_found", `there is no job ${id}; finished jobs are kept for an hour`);
    if (call === "events") {
      const after = request.headers.get("Last-Event-ID") ?? new URL(request.url).searchParams.get("after") ?? "";
      return new Response(bodyOf(job.stream(after), request.signal), { headers: { "Content-Type": "text/event-stream", ...this.#requestId() } });
    }
    if (call === "cancel") job.cancel();
    else job.playUnread();
    return this.#json(job.view());
  }

  /** @param {Failure} failure */
  #refused({ status, code, message, retryAfter }) {
    /** @type {Record<string, string>} */
    const headers = retryAfter === null ? {} : { "Retry-After": retryAfter };
    if (code === null) return new Response(message, { status, headers: { "Content-Type": "text/html", ...headers } });
    return this.#error(status, code, message, { kind: "server_error", headers });
  }

  /**
   * @param {number} status
   * @param {string} code
   * @param {string} message
   * @param {{kind?: string, headers?: Record<string, string>}} [more]
   */
  #error(status, code, message, { kind = "invalid_request_error", headers = {} } = {}) {
    return this.#json({ error: { message, type: kind, param: null, code } }, status, headers);
  }

  /**
   * @param {object} body
   * @param {number} [status]
   * @param {Record<string, string>} [headers]
   */
  #json(body, status = 200, headers = {}) {
    return new Response(JSON.stringify(body), { status, headers: { "Content-Type": "application/json", ...this.#requestId(), ...headers } });
  }

  #requestId() {
    return { "x-request-id": `req-${this.requests.length}` };
  }
}

/**
 * @param {AsyncGenerator<Piece, void, void>} pieces
 * @param {AbortSignal} signal
 * @returns {ReadableStream<Uint8Array>}
 */
function bodyOf(pieces, signal) {
  const utf8 = new TextEncoder();
  const aborted = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  aborted.catch(() => {}); // of a body that was read to its end nobody hears it
  return new ReadableStream({
    async pull(controller) {
      const { done, value } = await Promise.race([pieces.next(), aborted]);
      if (done || value === undefined) return controller.close();
      if (typeof value === "string") return controller.enqueue(utf8.encode(value));
      if (value.end === "end") return controller.close();
      if (value.end === "silence") await aborted;
      throw new TypeError("terminated", { cause: new Error("the connection was cut") });
    },
  });
}

/** @param {Script} script @returns {Step[]} */
function stepsOf(script) {
  if (typeof script === "string") return script.match(/\s*\S+(?:\s+$)?/g) ?? [];
  for (const step of script) {
    if (typeof step === "string") continue;
    if (!STEPS.some((name) => name in step)) {
      throw new TypeError(`a step is a token's text or has one of ${STEPS.join(", ")}; got ${JSON.stringify(step)}`);
    }
    if ("cut" in step && !CUTS.includes(/** @type {string} */ (step.cut))) {
      throw new TypeError(`a cut is one of ${CUTS.join(", ")}; got ${JSON.stringify(step)}`);
    }
  }
  return [...script];
}

/**
 * @param {Record<string, any>} event
 * @param {string} [id]
 */
function sse({ event, ...fields }, id) {
  return `event: ${event}\n${id === undefined ? "" : `id: ${id}\n`}data: ${JSON.stringify(fields)}\n\n`;
}
