// @ts-check
/**
 * Client of the Mixtral chat service for browsers and Node ≥ 20: `for await (const event of client.stream({messages}))`.
 *
 * Decides when to try again, where to resume and what is a repeat, so that its caller sees each token once, in order, and one
 * end. Leaves SSE bytes to sse.js, and to the page what a chat looks like. No dependencies, no build.
 * The types are spelled out in mixtral-client.d.ts.
 *
 * @module
 */

import { EventTooLarge, SseDecoder } from "./sse.js";

/** @import { Accepted, ClientOptions, FollowOptions, JobEvent, JobRequest, JobView, Model, StreamOptions, SubmitOptions } from "./mixtral-client.js" */

export const DEFAULT_MODEL = "mixtral_chat";

const GOODBYE_MS = 5_000;
const PATIENCE = {
  giveUpAfterMs: 15_000,
  resumeForMs: 120_000,
  firstWaitMs: 500,
  maxWaitMs: 10_000,
  answerMs: 15_000,
  silenceMs: 45_000, // the server sends a comment every 15 s at least
};

/** Whatever goes wrong. `code` is the service's word for it, or one of this client's own: connection_lost, bad_answer, http_<status>. */
export class MixtralError extends Error {
  /**
   * @param {string} message
   * @param {{code: string, status?: number | null, kind?: string | null, param?: string | null, requestId?: string | null,
   *   retryAfterMs?: number | null, isPassing?: boolean, cause?: unknown}} facts
   */
  constructor(message, { code, status = null, kind = null, param = null, requestId = null, retryAfterMs = null, isPassing = false, cause }) {
    super(message, { cause });
    this.name = "MixtralError";
    this.code = code;
    this.status = status;
    this.kind = kind;
    this.param = param;
    this.requestId = requestId;
    this.retryAfterMs = retryAfterMs;
    /** Whether the same request may succeed later: nobody answered, or the service was full, limited or away. */
    this.isPassing = isPassing;
  }
}

/** One service, at one address or at several replicas. Holds no connection between calls; safe to share. */
export class MixtralClient {
  #servers;
  #apiKey;
  #fetch;
  #patience;
  #at = 0;

  /** @param {ClientOptions} [options] */
  constructor({ baseUrl = "", apiKey, fetch = globalThis.fetch, patience = {} } = {}) {
    this.#servers = [baseUrl].flat().map(baseOf);
    this.#apiKey = apiKey;
    // Browsers refuse a fetch that is called as a method of anything but the window.
    this.#fetch = /** @type {typeof globalThis.fetch} */ ((url, init) => fetch(url, init));
    this.#patience = { ...PATIENCE, ...patience };
  }

  /**
   * Put a chat in the queue. Repeats of one idempotencyKey make one job; each submit makes a key of its own if none is given.
   * @param {JobRequest} request
   * @param {SubmitOptions} [options]
   * @returns {Promise<Accepted>}
   */
  submit(request, { idempotencyKey = randomKey(), signal } = {}) {
    const body = JSON.stringify({ model: DEFAULT_MODEL, ...request });
    return this.#ask("POST", "/v1/jobs", { body, headers: { "Idempotency-Key": idempotencyKey }, signal });
  }

  /**
   * Put a chat in the queue and follow it to its end. Leaving, by the signal or by `break`, cancels the job unless `detach`.
   * @param {JobRequest} request
   * @param {StreamOptions} [options]
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  async *stream(request, { signal, onJob, detach = false, idempotencyKey } = {}) {
    if (signal?.aborted) return;
    const submitted = this.submit(request, { signal, idempotencyKey });
    const job = await unlessAborted(submitted, signal);
    if (job === undefined) {
      // The request is on its way and may make a job yet: wait for its id, or that job would run for nobody.
      const late = await submitted.catch(() => undefined); // no id came back, so there is nothing to cancel
      if (late && !detach) await this.#goodbye(late.id);
      return;
    }
    onJob?.(job.id);
    yield* this.follow(job.id, { signal, detach });
  }

  /**
   * Follow a job from after the event whose id is `after` (default: from its start), over as many connections as it takes.
   * A failed job is thrown as MixtralError. Leaving, by the signal or by `break`, cancels the job unless `detach`.
   * @param {string} id
   * @param {FollowOptions} [options]
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  async *follow(id, { after = "", signal, detach = false } = {}) {
    const position = new LogPosition(after);
    const patience = new Patience(this.#patience, this.#patience.resumeForMs);
    let isOurs = !detach;
    try {
      while (!signal?.aborted) {
        const at = this.#at;
        try {
          for await (const event of this.#connection(id, position, patience, signal)) {
            if (event.event === "done") isOurs = false;
            yield event;
            if (event.event === "done" || signal?.aborted) return;
          }
          throw lost("the stream ended before the job did");
        } catch (error) {
          if (signal?.aborted) return;
          this.#leave(at);
          await patience.pause(error, signal);
        }
      }
    } catch (error) {
      isOurs = false;
      throw error;
    } finally {
      if (isOurs) await this.#goodbye(id);
    }
  }

  /**
   * Stop a job, waiting or running; a finished one stays as it is. Gives it as it stands afterwards.
   * @param {string} id
   * @returns {Promise<JobView>}
   */
  cancel(id) {
    return this.#ask("DELETE", `/v1/jobs/${encodeURIComponent(id)}`);
  }

  /**
   * A job as it stands: state, place in the queue, text so far.
   * @param {string} id
   * @returns {Promise<JobView>}
   */
  job(id) {
    return this.#ask("GET", `/v1/jobs/${encodeURIComponent(id)}`);
  }

  /**
   * What this service serves.
   * @returns {Promise<Model[]>}
   */
  async models() {
    return (await this.#ask("GET", "/v1/models")).data;
  }

  /**
   * One connection's new events; ends with the connection.
   * @param {string} id
   * @param {LogPosition} position
   * @param {Patience} patience
   * @param {AbortSignal} [signal]
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  async *#connection(id, position, patience, signal) {
    const watch = new Watch(this.#patience.silenceMs, signal);
    try {
      const headers = { Accept: "text/event-stream", ...(position.id && { "Last-Event-ID": position.id }) };
      const response = await this.#send("GET", `/v1/jobs/${encodeURIComponent(id)}/events`, { headers, signal: watch.signal });
      const decoder = new SseDecoder();
      for await (const bytes of chunks(response, watch)) {
        for (const raw of decoder.feed(bytes)) {
          const event = position.take(raw);
          if (event && event.event !== "queued") patience.reset();
          if (event) yield event;
        }
        if (decoder.retryMs !== null) patience.firstWaitMs = decoder.retryMs;
      }
    } catch (error) {
      if (error instanceof EventTooLarge) throw badAnswer(error.message, error);
      throw error;
    } finally {
      watch.end();
    }
  }

  /**
   * Ask until answered, as long as the patience for plain requests lasts. Every request of ours may be repeated safely.
   * @param {string} method
   * @param {string} path
   * @param {{body?: string, headers?: Record<string, string>, signal?: AbortSignal, giveUpAfterMs?: number,
   *   answerMs?: number}} [options]
   * @returns {Promise<any>}
   */
  async #ask(method, path, options = {}) {
    const { body, headers, signal, giveUpAfterMs, answerMs } = { ...this.#patience, ...options };
    const patience = new Patience(this.#patience, giveUpAfterMs);
    for (;;) {
      // The caller's signal ends the tries, not the try: a request under way may have made its job already.
      const watch = new Watch(answerMs);
      const at = this.#at;
      try {
        const response = await this.#send(method, path, { body, headers, signal: watch.signal });
        return await jsonOf(response, watch);
      } catch (error) {
        this.#leave(at);
        if (!signal?.aborted) await patience.pause(error, signal);
        if (signal?.aborted) throw error;
      } finally {
        watch.end();
      }
    }
  }

  /**
   * One try at one server. Throws MixtralError for everything but a 2xx.
   * @param {string} method
   * @param {string} path
   * @param {{body?: string, headers?: Record<string, string>, signal: AbortSignal}} options
   * @returns {Promise<Response>}
   */
  async #send(method, path, { body, headers, signal }) {
    const url = this.#servers[this.#at % this.#servers.length] + path;
    /** @type {Response} */
    let response;
    try {
      response = await this.#fetch(url, {
        method,
        body,
        signal,
        headers: {
          ...(body !== undefined && { "Content-Type": "application/json" }),
          ...(this.#apiKey && { Authorization: `Bearer ${this.#apiKey}` }),
          ...headers,
        },
        credentials: "same-origin", // without a key, the page's visitor cookie says who asks
        cache: "no-store",
        keepalive: method === "DELETE", // a cancel outlives the page that sends it
      });
    } catch (error) {
      throw lost(`${method} ${url} got no answer: ${reasonOf(error)}; is the server running there?`, error);
    }
    if (response.ok) return response;
    throw await refusal(response, `${method} ${url}`);
  }

  /**
   * Turn to the next server, unless another call has done so already.
   * @param {number} at
   */
  #leave(at) {
    if (this.#at === at) this.#at += 1;
  }

  /**
   * Cancel what its reader has left. The reader is gone, so a failure goes to the console; the job then runs to its end.
   * @param {string} id
   */
  async #goodbye(id) {
    try {
      await this.#ask("DELETE", `/v1/jobs/${encodeURIComponent(id)}`, { giveUpAfterMs: GOODBYE_MS, answerMs: GOODBYE_MS });
    } catch (error) {
      if (!(error instanceof MixtralError)) throw error;
      console.warn(`job=${id} could not be cancelled: ${error.message}`);
    }
  }
}

/** What has been delivered of one job's log, and so what is new, what is a repeat and where to resume. Pure. */
class LogPosition {
  #offset = 0;
  #attempt = 0;

  /** @param {string | number} after */
  constructor(after) {
    this.id = String(after);
    if (this.id === "") return;
    this.#offset = offsetOf(this.id);
    if (!(this.#offset >= 0)) throw new TypeError(`after must be the id of a token event, '<offset>.<crc>', or an offset; got '${this.id}'`);
  }

  /**
   * @param {import("./sse.js").ServerSentEvent} raw
   * @returns {JobEvent | null} null for what the caller has seen, and for kinds of events this client does not know
   */
  take(raw) {
    const event = { event: raw.event, ...parse(raw.data, `an event '${raw.event}'`) };
    switch (event.event) {
      case "token":
        if (event.offset <= this.#offset) return null;
        if (event.offset !== this.#offset + 1) throw lost(`the stream skipped from token ${this.#offset} to ${event.offset}`);
        this.#move(event.offset, raw.id);
        break;
      case "rewind":
        if (event.to >= this.#offset) return null;
        this.#move(event.to, raw.id);
        break;
      case "moved":
        if (event.attempt <= this.#attempt) return null;
        this.#attempt = event.attempt;
        break;
      case "error":
        throw new MixtralError(event.error.message, { code: event.error.code, kind: event.error.type, param: event.error.param });
      case "queued":
      case "done":
        break;
      default:
        return null;
    }
    return { ...event, id: this.id };
  }

  /**
   * @param {number} offset
   * @param {string} id trusted only if it names this offset; a bare offset resumes too
   */
  #move(offset, id) {
    this.#offset = offset;
    this.id = offsetOf(id) === offset ? id : String(offset);
  }
}

/** How long to go on trying: jittered, doubling waits, at least what the server asked for, until time is up. */
class Patience {
  #options;
  #giveUpAfterMs;
  #failures = 0;
  #since = 0;

  /**
   * @param {typeof PATIENCE} options
   * @param {number} giveUpAfterMs
   */
  constructor(options, giveUpAfterMs) {
    this.#options = options;
    this.#giveUpAfterMs = giveUpAfterMs;
    this.firstWaitMs = options.firstWaitMs;
  }

  reset() {
    this.#failures = 0;
  }

  /**
   * Wait before the next try, or throw the error if it will not pass or the time is up. An abort ends the wait.
   * @param {unknown} error
   * @param {AbortSignal} [signal]
   */
  async pause(error, signal) {
    if (!(error instanceof MixtralError) || !error.isPassing) throw error;
    if (this.#failures === 0) this.#since = performance.now();
    const doubled = Math.min(this.firstWaitMs * 2 ** this.#failures, this.#options.maxWaitMs);
    const waitMs = Math.max(doubled * (0.5 + Math.random() / 2), error.retryAfterMs ?? 0);
    if (performance.now() - this.#since + waitMs > this.#giveUpAfterMs) throw error;
    this.#failures += 1;
    await new Promise((resolve) => {
      const timer = setTimeout(end, waitMs);
      signal?.addEventListener("abort", end);
      function end() {
        clearTimeout(timer);
        signal?.removeEventListener("abort", end);
        resolve(undefined);
      }
      if (signal?.aborted) end();
    });
  }
}

/** A signal that fires after ms without a touch, or together with another signal. */
class Watch {
  #controller = new AbortController();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /**
   * @param {number} ms
   * @param {AbortSignal} [other]
   */
  constructor(ms, other) {
    this.ms = ms;
    this.other = other;
    this.signal = this.#controller.signal;
    other?.addEventListener("abort", this.#follow);
    if (other?.aborted) this.#follow();
    else this.touch();
  }

  #follow = () => this.#controller.abort(this.other?.reason);

  touch() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#controller.abort(new Error(`silent for ${this.ms / 1000} s`)), this.ms);
  }

  end() {
    clearTimeout(this.#timer);
    this.other?.removeEventListener("abort", this.#follow);
  }
}

/**
 * A body's bytes as they come. Every arrival touches the watch; leaving closes the connection.
 * @param {Response} response
 * @param {Watch} watch
 */
async function* chunks(response, watch) {
  if (response.body === null) return;
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      watch.touch();
      yield value;
    }
  } catch (error) {
    throw error instanceof MixtralError ? error : lost(`the connection broke: ${reasonOf(error)}`, error);
  } finally {
    // A connection that is broken already has nothing left to close.
    reader.cancel().catch(() => {});
  }
}

/**
 * @param {Response} response
 * @param {Watch} watch
 */
async function jsonOf(response, watch) {
  const utf8 = new TextDecoder();
  let text = "";
  for await (const bytes of chunks(response, watch)) text += utf8.decode(bytes, { stream: true });
  return parse(text + utf8.decode(), `the answer of ${response.url}`);
}

/**
 * @param {string} text
 * @param {string} what
 * @returns {any}
 */
function parse(text, what) {
  try {
    const value = JSON.parse(text);
    if (value !== null && typeof value === "object") return value;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  throw badAnswer(`${what} should be a JSON object; got '${text.slice(0, 80)}'; does the address belong to this service?`);
}

/**
 * The error of a non-2xx answer: the service's own sentence where there is one.
 * @param {Response} response
 * @param {string} asked
 */
async function refusal(response, asked) {
  const text = await response.text().catch(reasonOf);
  const { status } = response;
  const facts = {
    status,
    isPassing: [429, 502, 503, 504].includes(status),
    requestId: response.headers.get("x-request-id"),
    retryAfterMs: retryAfterMs(response),
  };
  const said = errorIn(text);
  if (said) return new MixtralError(said.message, { code: said.code, kind: said.type, param: said.param, ...facts });
  return new MixtralError(`${asked} was answered ${status}: ${text.slice(0, 200).trim()}`, { code: `http_${status}`, ...facts });
}

/**
 * @param {string} text
 * @returns {{message: string, code: string, type?: string, param?: string | null} | null} null if not this service but a proxy speaks
 */
function errorIn(text) {
  try {
    const error = JSON.parse(text)?.error;
    return typeof error?.message === "string" && typeof error.code === "string" ? error : null;
  } catch (error) {
    if (error instanceof SyntaxError) return null;
    throw error;
  }
}

/** @param {Response} response */
function retryAfterMs(response) {
  const value = response.headers.get("retry-after")?.trim();
  if (!value) return null;
  const ms = /^[0-9.]+$/.test(value) ? Number(value) * 1000 : Date.parse(value) - Date.now();
  return Number.isNaN(ms) ? null : Math.max(0, ms);
}

/**
 * @template T
 * @param {Promise<T>} promise
 * @param {AbortSignal} [signal]
 * @returns {Promise<T | undefined>} undefined if the signal fired first
 */
async function unlessAborted(promise, signal) {
  if (!signal) return promise;
  /** @type {() => void} */
  let end = () => {};
  /** @type {Promise<undefined>} */
  const aborted = new Promise((resolve) => {
    end = () => resolve(undefined);
    signal.addEventListener("abort", end);
  });
  try {
    return await Promise.race([promise, aborted]);
  } catch (error) {
    if (signal.aborted) return undefined;
    throw error;
  } finally {
    signal.removeEventListener("abort", end);
  }
}

/** @param {string} url */
function baseOf(url) {
  if (url === "" ? "location" in globalThis : /^https?:\/\//.test(url)) return url.replace(/\/+$/, "");
  throw new TypeError(`baseUrl must be an address such as "http://127.0.0.1:7777" ("" means the page's own server); got "${url}"`);
}

/** @param {string} id */
function offsetOf(id) {
  return /^[0-9]+(\.[0-9a-f]+)?$/.test(id) ? Number.parseInt(id, 10) : NaN;
}

// Not crypto.randomUUID: browsers offer that on https and localhost only.
function randomKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @param {unknown} error */
function reasonOf(error) {
  const { message, cause } = /** @type {Error} */ (error);
  return cause instanceof Error && cause.message ? `${message} (${cause.message})` : message;
}

/**
 * @param {string} message
 * @param {unknown} [cause]
 */
function lost(message, cause) {
  return new MixtralError(message, { code: "connection_lost", isPassing: true, cause });
}

/**
 * @param {string} message
 * @param {unknown} [cause]
 */
function badAnswer(message, cause) {
  return new MixtralError(message, { code: "bad_answer", cause });
}
