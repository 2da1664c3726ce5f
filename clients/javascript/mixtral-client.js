// @ts-check
/**
 * Client of the Mixtral chat service for browsers and Node ≥ 20: `for await (const event of client.stream({messages}))`.
 *
 * Decides when to try again, where to resume and what is a repeat, so that its caller sees each token once, in order, and one
 * end. Leaves SSE bytes to sse.js, and to the page what a chat looks like. No dependencies, no build.
 * The types are spelled out in mixtral-client.d.ts. The twin of the Python client: both pass the same fixtures.
 *
 * Leaving is not cancelling: a job runs on when its reader breaks off, fails or dies. It is cancelled by `cancel`, by its reader's
 * AbortSignal (which says that nobody wants the outcome any more), and by the limits of a whole answer.
 *
 * @module
 */

import { EventTooLarge, SseDecoder } from "./sse.js";

/** @import * as Declared from "./mixtral-client.js" */
/** @import { Accepted, Answer, CallOptions, ClientOptions, FollowOptions, JobEvent, JobRequest, JobView, Model, Patience as Wishes, StreamOptions, SubmitOptions } from "./mixtral-client.js" */

export const DEFAULT_MODEL = "mixtral_chat";

const GOODBYE_MS = 5_000;
const PATIENCE = {
  giveUpAfterMs: 15_000,
  resumeForMs: 120_000,
  firstWaitMs: 500,
  maxWaitMs: 10_000,
  maxTries: 50,
  answerMs: 15_000,
  silenceMs: 45_000, // the server sends a comment every 12 s
  firstTokenMs: Infinity,
  totalMs: Infinity,
};

/**
 * Whatever goes wrong. `code` is the service's word for it, or one of this client's own: connection_lost, answer_timeout,
 * silence_timeout, first_token_timeout, total_timeout, bad_answer, http_<status>.
 * @implements {Declared.MixtralError}
 */
export class MixtralError extends Error {
  /**
   * @param {string} message
   * @param {ConstructorParameters<typeof import("./mixtral-client.js").MixtralError>[1]} facts
   */
  constructor(message, { cause, code, status = null, kind = null, param = null, requestId = null, retryAfterMs = null, ...more }) {
    super(message, { cause });
    const { isPassing = false, jobId = null, text = null } = more;
    this.name = "MixtralError";
    this.code = code;
    this.status = status;
    this.kind = kind;
    this.param = param;
    this.requestId = requestId;
    this.retryAfterMs = retryAfterMs;
    /** Whether the same request may succeed later: nobody answered, or the service was full, limited or away. */
    this.isPassing = isPassing;
    this.jobId = jobId;
    this.text = text;
  }
}

/**
 * The text of an answer from its events, each rewind taken back.
 * @implements {Declared.AnswerText}
 */
export class AnswerText {
  /** @type {(JobEvent & {event: "token"})[]} those after #first */
  #tokens = [];
  #first = -1;

  /** @param {JobEvent} event */
  take(event) {
    if (event.event === "token") {
      if (this.#first < 0) this.#first = event.offset - 1;
      this.#tokens.push(event);
    } else if (event.event === "rewind" && this.#first >= 0) {
      this.#tokens.length = Math.min(this.#tokens.length, Math.max(0, event.to - this.#first));
      this.#first = Math.min(this.#first, event.to);
    }
  }

  get text() {
    return this.#tokens.map((token) => token.text).join("");
  }

  /** One for each token, if the job asked for them. */
  get logprobs() {
    return this.#tokens.flatMap(({ logprobs }) => (logprobs ? [logprobs] : []));
  }
}

/**
 * One service, at one address or at several replicas. Holds no connection between calls; safe to share.
 * @implements {Declared.MixtralClient}
 */
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
   * This client with other patience, for one call or many.
   * @param {{patience: Partial<Wishes>}} options
   */
  withOptions({ patience }) {
    return new MixtralClient({ baseUrl: this.#servers, apiKey: this.#apiKey, fetch: this.#fetch, patience: { ...this.#patience, ...patience } });
  }

  /**
   * Put a chat in the queue. Repeats of one idempotencyKey make one job; each submit makes a key of its own if none is given.
   * @param {JobRequest} request
   * @param {SubmitOptions} [options]
   * @returns {Promise<Accepted>}
   */
  async submit(request, { idempotencyKey = randomKey(), signal } = {}) {
    return this.#submit(request, idempotencyKey, { signal });
  }

  /**
   * The whole answer to a chat, or of a job by its id. Rejects with the signal's reason when that fires, which cancels the job unless
   * `detach`; with a MixtralError if the job fails, or is cancelled or expires (`code` says which, `text` is what came of it).
   * @param {JobRequest | string} request
   * @param {StreamOptions} [options]
   * @returns {Promise<Answer>}
   */
  async answer(request, options = {}) {
    options.signal?.throwIfAborted();
    const said = new AnswerText();
    let jobId = typeof request === "string" ? request : "";
    const onJob = (/** @type {string} */ id) => {
      jobId = id;
      options.onJob?.(id);
    };
    const events = typeof request === "string" ? this.follow(request, options) : this.stream(request, { ...options, onJob });
    for await (const event of events) {
      said.take(event);
      if (event.event !== "done") continue;
      const { finish, usage, timings } = event;
      if (finish === "stop" || finish === "length") return { jobId, text: said.text, finish, usage, timings, logprobs: said.logprobs };
      throw new MixtralError(`job ${jobId} was ${finish}; what came of its answer is in .text`, { code: finish, jobId, text: said.text });
    }
    throw options.signal?.reason;
  }

  /**
   * Put a chat in the queue and follow it to its end. `break` leaves the job running; the signal cancels it unless `detach`.
   * @param {JobRequest} request
   * @param {StreamOptions} [options]
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  async *stream(request, { signal, onJob, detach = false, idempotencyKey = randomKey() } = {}) {
    if (signal?.aborted) return;
    const limits = new Limits(this.#patience, signal);
    try {
      // The signal ends the tries, not the one under way: it may have made its job already.
      const submitted = this.#submit(request, idempotencyKey, { triesSignal: limits.signal });
      const job = await unlessAborted(submitted, limits.signal);
      if (job === undefined) {
        // The request is on its way and may make a job yet: wait for its id, or that job would run for nobody.
        const late = await submitted.catch(() => undefined); // no id came back, so there is nothing to cancel
        if (late && !detach) await this.#goodbye(late.id);
        return limits.check(late?.id ?? "");
      }
      onJob?.(job.id);
      yield* this.#read(job.id, new LogPosition(""), limits, { onAbort: !detach, onLimit: !detach });
    } finally {
      limits.end();
    }
  }

  /**
   * Follow a job from after the event whose id is `after` (default: from its start), over as many connections as it takes.
   * A failed job is thrown as MixtralError. `break` leaves the job running; the signal cancels it unless `detach`.
   * @param {string} id
   * @param {FollowOptions} [options]
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  async *follow(id, { after = "", signal, detach = false } = {}) {
    const position = new LogPosition(after);
    const limits = new Limits(this.#patience, signal);
    try {
      yield* this.#read(id, position, limits, { onAbort: !detach, onLimit: false });
    } finally {
      limits.end();
    }
  }

  /**
   * @param {string} id
   * @param {LogPosition} position
   * @param {Limits} limits
   * @param {{onAbort: boolean, onLimit: boolean}} cancels
   * @returns {AsyncGenerator<JobEvent, void, void>}
   */
  async *#read(id, position, limits, cancels) {
    const patience = new Patience(this.#patience, this.#patience.resumeForMs);
    const { signal } = limits;
    let isOver = false;
    try {
      while (!signal.aborted) {
        const at = this.#at;
        try {
          for await (const event of this.#connection(id, position, patience, signal)) {
            if (event.event === "token") limits.sawToken();
            isOver = event.event === "done";
            yield event;
            if (isOver) return;
            if (signal.aborted) break;
          }
          throw lost("the stream ended before the job did");
        } catch (error) {
          if (signal.aborted) break;
          this.#leave(at);
          await patience.pause(error, signal);
        }
      }
    } catch (error) {
      isOver = true; // or beyond our reach
      throw error;
    } finally {
      if (signal.aborted && !isOver && (limits.passed ? cancels.onLimit : cancels.onAbort)) await this.#goodbye(id);
    }
    limits.check(id);
  }

  /**
   * Stop a job, waiting or running; a finished one stays as it is. Gives it as it stands afterwards.
   * @param {string} id
   * @param {CallOptions} [options]
   * @returns {Promise<JobView>}
   */
  cancel(id, { signal } = {}) {
    return this.#ask("DELETE", `/v1/jobs/${encodeURIComponent(id)}`, { signal });
  }

  /**
   * A job as it stands: state, place in the queue, text so far.
   * @param {string} id
   * @param {CallOptions} [options]
   * @returns {Promise<JobView>}
   */
  job(id, { signal } = {}) {
    return this.#ask("GET", `/v1/jobs/${encodeURIComponent(id)}`, { signal });
  }

  /**
   * What this service serves.
   * @param {CallOptions} [options]
   * @returns {Promise<Model[]>}
   */
  async models({ signal } = {}) {
    return (await this.#ask("GET", "/v1/models", { signal })).data;
  }

  /**
   * @param {JobRequest} request
   * @param {string} idempotencyKey
   * @param {{signal?: AbortSignal, triesSignal?: AbortSignal}} signals
   * @returns {Promise<Accepted>}
   */
  #submit(request, idempotencyKey, signals) {
    const body = JSON.stringify({ model: DEFAULT_MODEL, ...request });
    return this.#ask("POST", "/v1/jobs", { body, headers: { "Idempotency-Key": idempotencyKey }, ...signals });
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
    const watch = new Watch(this.#patience.answerMs, "answer", signal);
    try {
      const headers = { Accept: "text/event-stream", ...(position.id && { "Last-Event-ID": position.id }) };
      const response = await this.#send("GET", `/v1/jobs/${encodeURIComponent(id)}/events`, { headers, watch });
      watch.become(this.#patience.silenceMs, "silence");
      const facts = { jobId: id, requestId: response.headers.get("x-request-id") };
      const decoder = new SseDecoder();
      for await (const bytes of chunks(response, watch)) {
        for (const raw of decoder.feed(bytes)) {
          const event = position.take(raw, facts);
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
   * @param {{body?: string, headers?: Record<string, string>, signal?: AbortSignal, triesSignal?: AbortSignal,
   *   giveUpAfterMs?: number, answerMs?: number}} [options]
   * @returns {Promise<any>}
   */
  async #ask(method, path, options = {}) {
    const { body, headers, signal, triesSignal = signal, giveUpAfterMs, answerMs } = { ...this.#patience, ...options };
    const patience = new Patience(this.#patience, giveUpAfterMs);
    for (;;) {
      signal?.throwIfAborted();
      const watch = new Watch(answerMs, "answer", signal);
      const at = this.#at;
      try {
        const response = await this.#send(method, path, { body, headers, watch });
        return await jsonOf(response, watch);
      } catch (error) {
        signal?.throwIfAborted();
        this.#leave(at);
        if (!triesSignal?.aborted) await patience.pause(error, triesSignal);
        signal?.throwIfAborted();
        if (triesSignal?.aborted) throw error;
      } finally {
        watch.end();
      }
    }
  }

  /**
   * One try at one server. Throws MixtralError for everything but a 2xx.
   * @param {string} method
   * @param {string} path
   * @param {{body?: string, headers?: Record<string, string>, watch: Watch}} options
   * @returns {Promise<Response>}
   */
  async #send(method, path, { body, headers, watch }) {
    const url = this.#servers[this.#at % this.#servers.length] + path;
    /** @type {Response} */
    let response;
    try {
      response = await this.#fetch(url, {
        method,
        body,
        signal: watch.signal,
        headers: {
          ...(body !== undefined && { "Content-Type": "application/json" }),
          ...(this.#apiKey && { Authorization: `Bearer ${this.#apiKey}` }),
          ...headers,
        },
        redirect: "manual", // it would make a GET of a POST
        credentials: "same-origin", // without a key, the page's visitor cookie says who asks
        cache: "no-store",
        keepalive: method === "DELETE", // a cancel outlives the page that sends it
      });
    } catch (error) {
      if (watch.hasPassed) throw lost(`${method} ${url} got no answer within answerMs, ${watch.ms / 1000} s`, error, "answer_timeout");
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
   * Cancel for a reader that is gone, so a failure goes to the console; the job then runs to its end.
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

/**
 * The events that this client knows, and what each must have.
 * @type {Record<string, (event: any) => boolean>}
 */
const FITS = {
  queued: () => true,
  token: ({ offset, text }) => Number.isInteger(offset) && typeof text === "string",
  moved: ({ attempt }) => Number.isInteger(attempt),
  rewind: ({ to }) => Number.isInteger(to),
  done: ({ finish, usage }) => typeof finish === "string" && typeof usage === "object" && usage !== null,
  error: ({ error }) => typeof error?.message === "string" && typeof error.code === "string",
};

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
   * @param {{jobId: string, requestId: string | null}} facts of the connection, for the error of a failed job
   * @returns {JobEvent | null} null for what the caller has seen, and for kinds of events this client does not know
   */
  take(raw, facts) {
    if (!Object.hasOwn(FITS, raw.event)) return null;
    const event = { ...parse(raw.data, `an event '${raw.event}'`), event: raw.event };
    if (!FITS[raw.event](event)) throw badAnswer(`event '${raw.event}' of job ${facts.jobId} does not fit the wire: ${raw.data.slice(0, 200)}`);
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
        throw new MixtralError(event.error.message, { code: event.error.code, kind: event.error.type, param: event.error.param, ...facts });
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
    if (!(error instanceof MixtralError) || !error.isPassing || this.#failures + 1 >= this.#options.maxTries) throw error;
    if (this.#failures === 0) this.#since = performance.now();
    const doubled = Math.min(this.firstWaitMs * 2 ** this.#failures, this.#options.maxWaitMs);
    const waitMs = Math.max(doubled * (0.5 + Math.random() / 2), error.retryAfterMs ?? 0);
    if (performance.now() - this.#since + waitMs > this.#giveUpAfterMs) throw error;
    this.#failures += 1;
    await new Promise((resolve) => {
      const wait = timer(waitMs, end);
      signal?.addEventListener("abort", end);
      function end() {
        clearTimeout(wait);
        signal?.removeEventListener("abort", end);
        resolve(undefined);
      }
      if (signal?.aborted) end();
    });
  }
}

/** The caller's signal and the limits of a whole answer, as one signal. */
class Limits {
  #controller = new AbortController();
  #patience;
  #caller;
  #firstToken;
  #total;
  /** @type {"first_token" | "total" | null} which limit passed */
  passed = null;

  /**
   * @param {typeof PATIENCE} patience
   * @param {AbortSignal} [caller]
   */
  constructor(patience, caller) {
    this.#patience = patience;
    this.#caller = caller;
    this.signal = this.#controller.signal;
    this.#firstToken = this.#timer(patience.firstTokenMs, "first_token");
    this.#total = this.#timer(patience.totalMs, "total");
    caller?.addEventListener("abort", this.#abort);
    if (caller?.aborted) this.#abort();
  }

  /**
   * @param {number} ms
   * @param {"first_token" | "total"} name
   */
  #timer(ms, name) {
    if (ms === Infinity) return undefined;
    return timer(ms, () => {
      this.passed ??= this.signal.aborted ? null : name;
      this.#abort();
    });
  }

  #abort = () => this.#controller.abort();

  sawToken() {
    clearTimeout(this.#firstToken);
  }

  /**
   * Throws if a limit has passed.
   * @param {string} jobId
   */
  check(jobId) {
    if (this.passed === null) return;
    const [missed, name, ms] =
      this.passed === "total"
        ? ["was not finished", "totalMs", this.#patience.totalMs]
        : ["brought no token", "firstTokenMs", this.#patience.firstTokenMs];
    const message = `job ${jobId} ${missed} within ${name}, ${ms / 1000} s; allow more, or ask for less`;
    throw new MixtralError(message, { code: `${this.passed}_timeout`, jobId: jobId || null });
  }

  end() {
    clearTimeout(this.#firstToken);
    clearTimeout(this.#total);
    this.#caller?.removeEventListener("abort", this.#abort);
  }
}

/** A signal that fires after ms without a touch, or together with another signal. */
class Watch {
  #controller = new AbortController();
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;
  hasPassed = false;

  /**
   * @param {number} ms
   * @param {"answer" | "silence"} name
   * @param {AbortSignal} [other]
   */
  constructor(ms, name, other) {
    this.ms = ms;
    this.name = name;
    this.other = other;
    this.signal = this.#controller.signal;
    other?.addEventListener("abort", this.#follow);
    if (other?.aborted) this.#follow();
    else this.touch();
  }

  #follow = () => this.#controller.abort(this.other?.reason);

  /**
   * Wait for something else from now on.
   * @param {number} ms
   * @param {"answer" | "silence"} name
   */
  become(ms, name) {
    this.ms = ms;
    this.name = name;
    this.touch();
  }

  touch() {
    clearTimeout(this.#timer);
    if (this.ms !== Infinity) this.#timer = timer(this.ms, this.#pass);
  }

  #pass = () => {
    this.hasPassed = true;
    this.#controller.abort(new Error(`silent for ${this.ms / 1000} s`));
  };

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
    if (error instanceof MixtralError) throw error;
    throw lost(`the connection to ${response.url} broke: ${reasonOf(error)}`, error, watch.hasPassed ? `${watch.name}_timeout` : undefined);
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
  if (/^[0-9]{1,9}(\.[0-9]+)?$/.test(value)) return Number(value) * 1000;
  // Only what looks like an HTTP date: Date.parse makes one of "-5" too.
  const ms = /^[A-Z][a-z]{2}, .* GMT$/.test(value) ? Date.parse(value) - Date.now() : NaN;
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

/**
 * A time beyond the timers' range of 24 days would be none at all.
 * @param {number} ms
 * @param {() => void} end
 */
function timer(ms, end) {
  return setTimeout(end, Math.min(ms, 0x7fffffff));
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
 * @param {string} [code]
 */
function lost(message, cause, code = "connection_lost") {
  return new MixtralError(message, { code, isPassing: true, cause });
}

/**
 * @param {string} message
 * @param {unknown} [cause]
 */
function badAnswer(message, cause) {
  return new MixtralError(message, { code: "bad_answer", cause });
}
