// @ts-check
/** MixtralClient against a server that goes wrong on purpose. SCRIPTED_API names that server (tests/support/scripted_api.py). */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer as createHttpServer } from "node:http";
import { createServer } from "node:net";
import test from "node:test";

import { MixtralClient, MixtralError } from "../../../clients/javascript/mixtral-client.js";
import { FakeServer } from "../../../clients/javascript/testing.js";

/** @typedef {import("../../../clients/javascript/mixtral-client.js").JobEvent} JobEvent */

const API = process.env.SCRIPTED_API ?? "";
assert.ok(API, "SCRIPTED_API must name a running scripted API; pytest tests/clients/test_javascript.py starts one");
const KEY = "test-key";
const TEXTS = ["Once", " üpon", " a"];
const REQUEST = { messages: [{ role: /** @type {const} */ ("user"), content: "Hello" }] };
const HELD = { scripts: [["Once", { hold: true }]] };
const QUICK = { firstWaitMs: 1, maxWaitMs: 10 };

/** @param {object} script @returns {Promise<string>} the base URL of its world */
async function worldOf(script) {
  const answer = await fetch(`${API}/scripts`, { method: "POST", body: JSON.stringify(script) });
  assert.equal(answer.status, 200, await answer.clone().text());
  return API + (await answer.json()).base;
}

/** @param {string} world @param {string} [call] */
async function asked(world, call) {
  const { requests } = await (await fetch(`${world}/history`)).json();
  return requests.filter((/** @type {any} */ request) => call === undefined || request.call === call);
}

/** @param {string} world */
async function states(world) {
  return (await (await fetch(`${world}/history`)).json()).states;
}

/** @param {string | string[]} baseUrl @param {object} [options] */
function clientOf(baseUrl, options) {
  return new MixtralClient({ baseUrl, apiKey: KEY, patience: QUICK, ...options });
}

/** @param {AsyncIterable<JobEvent>} stream */
async function read(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

/** @param {JobEvent[]} events */
function tokens(events) {
  return events.flatMap((event) => (event.event === "token" ? [[event.offset, event.text]] : []));
}

/** Offsets 1..n once each and in order, then exactly one end. @param {JobEvent[]} events @param {string[]} texts */
function assertWhole(events, texts) {
  assert.deepEqual(tokens(events), texts.map((text, index) => [index + 1, text]));
  assert.equal(events.filter((event) => event.event === "done").length, 1);
  assert.equal(events.at(-1)?.event, "done");
}

/** @param {Promise<unknown>} promise @returns {Promise<MixtralError>} */
async function failureOf(promise) {
  const outcome = await promise.then(
    () => undefined,
    (error) => error,
  );
  assert.ok(outcome instanceof MixtralError, `expected a MixtralError; got ${outcome}`);
  return outcome;
}

/** @returns {Promise<string>} an address where nobody listens (any more) */
async function goneServer() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
  server.close();
  await once(server, "close");
  return `http://127.0.0.1:${port}`;
}

// ---------------------------------------------------------------------------------------------- events

test("a stream gives the wire's events, each with the id that resumes after it", async () => {
  const world = await worldOf({ scripts: [["Once"]] });
  const [queued, token, done] = await read(clientOf(world).stream({ ...REQUEST, max_tokens: 9 }));
  assert.deepEqual(queued, { event: "queued", position: 1, eta_s: 0.5, id: "" });
  assert.deepEqual(token, { event: "token", offset: 1, text: "Once", id: token.id });
  assert.match(token.id, /^1\.[0-9a-f]{8}$/);
  assert.deepEqual(done, {
    event: "done",
    finish: "stop",
    usage: { prompt_tokens: 3, completion_tokens: 1, total_tokens: 4 },
    timings: { queue_s: 0.1, first_token_s: 0.2, total_s: 0.5 },
    id: token.id,
  });
  assert.deepEqual((await asked(world, "submit"))[0].body, { model: "mixtral_chat", ...REQUEST, max_tokens: 9 });
});

test("a connection cut at any byte costs no token and repeats none", async () => {
  const texts = ["é", "!"];
  const whole = new FakeServer(texts);
  const { id } = await clientOf(whole.url, { fetch: whole.fetch }).submit(REQUEST);
  const stream = await whole.fetch(`${whole.url}/v1/jobs/${id}/events`, { headers: { Authorization: `Bearer ${KEY}` } });
  const total = (await stream.arrayBuffer()).byteLength;
  assert.ok(total > 200);
  for (let at = 0; at < total; at += 1) {
    const server = new FakeServer(texts);
    assertWhole(await read(clientOf(server.url, { fetch: cutFirstStream(server, at) }).stream(REQUEST)), texts);
    assert.equal(server.asked("events").length, 2, `cut at ${at}`);
  }
});

/** fetch, with the first stream broken after so many bytes. @param {FakeServer} server @param {number} at @returns {typeof fetch} */
function cutFirstStream(server, at) {
  let isFirst = true;
  return async (url, init) => {
    const response = await server.fetch(url, init);
    if (!String(url).endsWith("/events") || !isFirst) return response;
    isFirst = false;
    const pieces = [new Uint8Array(await response.arrayBuffer()).slice(0, at)].filter((piece) => piece.length > 0);
    return new Response(
      new ReadableStream({
        pull(controller) {
          const piece = pieces.shift();
          if (piece) controller.enqueue(piece);
          else if (at % 2) controller.close();
          else throw new TypeError("terminated");
        },
      }),
      response,
    );
  };
}

test("any row of cuts gives offsets once, in order, and one end", async () => {
  let seed = 1; // a fixed row of pseudo-random numbers: a failure repeats
  const dice = (/** @type {number} */ sides) => (seed = (seed * 48271) % 2147483647) % sides;
  for (let round = 0; round < 60; round += 1) {
    const texts = Array.from({ length: dice(8) }, () => ["a", " 😀", "é\n", ""][dice(4)]);
    const cuts = Array.from({ length: dice(6) }, () => ({ at: dice(900), how: ["close", "abort", "end"][dice(3)] }));
    const world = await worldOf({ scripts: [texts], cuts, write_bytes: [1, 7, 65536][dice(3)] });
    assertWhole(await read(clientOf(world).stream(REQUEST)), texts);
    assert.deepEqual(await states(world), ["done"], `round ${round}: a job that ended is not cancelled`);
  }
});

test("resume names the last token with its crc", async () => {
  const world = await worldOf({ scripts: [[TEXTS[0], TEXTS[1], { cut: "abort" }, TEXTS[2]]] });
  const events = await read(clientOf(world).stream(REQUEST));
  assertWhole(events, TEXTS);
  const second = events.find((event) => event.event === "token" && event.offset === 2);
  assert.deepEqual(
    (await asked(world, "events")).map((/** @type {any} */ request) => request.headers["Last-Event-ID"]),
    [undefined, second?.id],
  );
});

test("a job is followed on from an id or an offset, as after a reload", async () => {
  const client = clientOf(await worldOf({ scripts: [TEXTS] }));
  let id = "";
  const events = await read(client.stream(REQUEST, { onJob: (job) => (id = job) }));
  const first = events.find((event) => event.event === "token");
  assert.deepEqual(tokens(await read(client.follow(id, { after: first?.id }))).map(([offset]) => offset), [2, 3]);
  assert.deepEqual(tokens(await read(client.follow(id, { after: 2 }))).map(([offset]) => offset), [3]);
  await assert.rejects(read(client.follow(id, { after: "soon" })), /'<offset>\.<crc>'/);
});

test("a silent connection is replaced", async () => {
  const world = await worldOf({ scripts: [TEXTS], cuts: [{ at: 250, how: "silence" }] });
  assertWhole(await read(clientOf(world, { patience: { ...QUICK, silenceMs: 50 } }).stream(REQUEST)), TEXTS);
});

test("a skipped offset is fetched by a new connection", async () => {
  const world = await worldOf({ scripts: [[TEXTS[0], { event: "token", offset: 3, text: "?" }, TEXTS[1], TEXTS[2]]] });
  assertWhole(await read(clientOf(world).stream(REQUEST)), TEXTS);
});

test("a log that lost its end rewinds and goes on from there", async () => {
  const world = await worldOf({ scripts: [["a", "b", "c", { cut: "close" }, { rewind: 1 }, { cut: "close" }, "d", "e"]] });
  const events = await read(clientOf(world).stream(REQUEST));
  assert.deepEqual(events.flatMap((event) => (event.event === "rewind" ? [event.to] : [])), [1]);
  assert.deepEqual(tokens(events), [[1, "a"], [2, "b"], [3, "c"], [2, "d"], [3, "e"]]);
});

test("a log that differs rewinds to its start and never forks", async () => {
  const world = await worldOf({ scripts: [["a", "b", { cut: "end" }, { rewind: 0 }, "x", "y", "z"]] });
  const events = await read(clientOf(world).stream(REQUEST));
  const rewind = events.findIndex((event) => event.event === "rewind" && event.to === 0);
  assert.deepEqual(tokens(events.slice(rewind)), [[1, "x"], [2, "y"], [3, "z"]]);
});

test("a move to another worker is told once", async () => {
  const world = await worldOf({ scripts: [["a", { moved: 2 }, { cut: "end" }, { moved: 3 }, "b"]] });
  const events = await read(clientOf(world).stream(REQUEST));
  assert.deepEqual(events.flatMap((event) => (event.event === "moved" ? [event.attempt] : [])), [2, 3]);
  assertWhole(events, ["a", "b"]);
});

test("comments and unknown events change nothing", async () => {
  const log = [{ comment: "ping" }, "Once", { event: "weather", sun: true }, " üpon", { comment: "ping" }, " a"];
  assertWhole(await read(clientOf(await worldOf({ scripts: [log], preamble: "\ufeffretry: 1\n: hello\n\n" })).stream(REQUEST)), TEXTS);
});

test("a stream gives up when nobody can be reached for long", async () => {
  const world = await worldOf({ cuts: Array.from({ length: 100 }, () => ({ at: 0 })) });
  const error = await failureOf(read(clientOf(world, { patience: { resumeForMs: 50, firstWaitMs: 10 } }).stream(REQUEST)));
  assert.equal(error.code, "connection_lost");
  assert.ok((await asked(world, "events")).length > 1);
});

test("an event without end is refused", async () => {
  const error = await failureOf(read(clientOf(await worldOf({ scripts: [["x".repeat(2 << 20)]] })).stream(REQUEST)));
  assert.equal(error.code, "bad_answer");
  assert.match(error.message, /larger than 1048576/);
});

// ---------------------------------------------------------------------------------------------- refusals, lost answers, replicas

test("a submit whose answer is lost makes one job", async () => {
  const world = await worldOf({ faults: [{ on: "submit", lose: true }, { on: "submit", lose: true }] });
  await clientOf(world).submit(REQUEST);
  assert.equal((await states(world)).length, 1);
  const keys = (await asked(world, "submit")).map((/** @type {any} */ request) => request.headers["Idempotency-Key"]);
  assert.equal(keys.length, 3);
  assert.match(keys[0], /^[0-9a-f]{32}$/);
  assert.equal(new Set(keys).size, 1);
});

test("two submits make two jobs unless they share a key", async () => {
  const client = clientOf(await worldOf({}));
  const ids = [];
  for (const idempotencyKey of [undefined, undefined, "k", "k"]) ids.push((await client.submit(REQUEST, { idempotencyKey })).id);
  assert.equal(new Set(ids).size, 3);
  assert.equal(ids[2], ids[3]);
});

for (const status of [429, 502, 503, 504]) {
  test(`a passing refusal is tried again (${status})`, async () => {
    const faults = ["submit", "events", "submit", "events"].map((on) => ({ on, status }));
    assertWhole(await read(clientOf(await worldOf({ scripts: [TEXTS], faults })).stream(REQUEST)), TEXTS);
  });
}

test("a wait longer than our patience is told at once", async () => {
  const fault = { on: "submit", status: 429, code: "queue_full", message: "the queue is full", retry_after: "3600" };
  const world = await worldOf({ faults: [fault] });
  const error = await failureOf(clientOf(world).submit(REQUEST));
  assert.deepEqual([error.code, error.status, error.retryAfterMs, error.message], ["queue_full", 429, 3_600_000, "the queue is full"]);
  assert.equal((await asked(world)).length, 1);
});

test("a refusal that will not pass is told at once, in the service's words", async () => {
  const world = await worldOf({ faults: [{ on: "submit", status: 500, code: "word", message: "a sentence" }] });
  const { code, status, kind, requestId, message, isPassing } = await failureOf(read(clientOf(world).stream(REQUEST)));
  assert.deepEqual([code, status, kind, requestId, message, isPassing], ["word", 500, "server_error", "req-1", "a sentence", false]);
  assert.equal((await asked(world)).length, 1);
});

test("a proxy that answers in HTML is quoted, another service is named as such", async () => {
  const page = await worldOf({ faults: [{ on: "models", status: 502, code: null, message: "<h1>Bad Gateway</h1>" }] });
  const error = await failureOf(clientOf(page, { patience: { giveUpAfterMs: 0 } }).models());
  assert.equal(error.code, "http_502");
  assert.match(error.message, /was answered 502: <h1>Bad Gateway<\/h1>/);
  const other = await worldOf({ faults: [{ on: "models", status: 200, code: null, message: "It works!" }] });
  assert.match((await failureOf(clientOf(other).models())).message, /does the address belong to this service/);
});

test("an error event is thrown with the worker's words and never tried again", async () => {
  const failure = { error: { message: "too long by 9", type: "invalid_request_error", code: "context_length_exceeded" } };
  const world = await worldOf({ scripts: [["Once", failure]] });
  const stream = clientOf(world).stream(REQUEST);
  await stream.next();
  assert.deepEqual((await stream.next()).value?.event, "token");
  const error = await failureOf(stream.next());
  assert.deepEqual([error.code, error.message, error.kind], ["context_length_exceeded", "too long by 9", "invalid_request_error"]);
  assert.deepEqual([error.requestId, error.jobId], ["req-2", "mixtral_chat.0-1"]);
  assert.deepEqual([await states(world), await asked(world, "cancel")], [["failed"], []], "a failed job needs no cancel");
  assert.equal((await asked(world, "events")).length, 1);
});

test("an unknown job is not found, by whatever call", async () => {
  const client = clientOf(await worldOf({}));
  const calls = [() => client.job("no/../x?y"), () => client.cancel("no"), () => read(client.follow("no", { detach: true }))];
  for (const call of calls) assert.equal((await failureOf(call())).code, "job_not_found");
});

test("a job is seen by its id and models are listed", async () => {
  const client = clientOf(await worldOf({ scripts: [TEXTS] }));
  const { id } = await client.submit(REQUEST);
  assert.equal((await client.job(id)).text, TEXTS.join(""));
  assert.deepEqual((await client.models()).map((model) => model.id), ["mixtral_chat"]);
});

test("the next replica is tried when one is away", async () => {
  const away = await worldOf({ faults: Array.from({ length: 50 }, () => ({ on: "submit" })) });
  const world = await worldOf({ scripts: [TEXTS] });
  const client = clientOf([await goneServer(), away, `${world}/`]);
  assertWhole(await read(client.stream(REQUEST)), TEXTS);
  assertWhole(await read(client.stream(REQUEST)), TEXTS);
  assert.equal((await asked(away)).length, 1, "a replica that answered is stayed with");
});

test("an answer that does not come is not waited for forever", async () => {
  const world = await worldOf({ faults: Array.from({ length: 20 }, () => ({ on: "submit", hold: true })) });
  const error = await failureOf(clientOf(world, { patience: { ...QUICK, answerMs: 20, giveUpAfterMs: 50 } }).submit(REQUEST));
  assert.equal(error.code, "answer_timeout");
  assert.match(error.message, /no answer within answerMs, 0\.02 s/);
});

test("a server that is not there is named with its address", async () => {
  const gone = await goneServer();
  const error = await failureOf(clientOf(gone, { patience: { giveUpAfterMs: 10 } }).models());
  assert.ok(error.message.startsWith(`GET ${gone}/v1/models got no answer: fetch failed (`), error.message);
  assert.match(error.message, /ECONNREFUSED.*; is the server running there\?$/);
});

test("a wrong key is told; without a key the page's cookie speaks", async () => {
  const world = await worldOf({});
  assert.equal((await failureOf(clientOf(world, { apiKey: "wrong" }).models())).status, 401);
  /** @type {RequestInit[]} */
  const sent = [];
  /** @type {typeof fetch} */
  const spy = (url, init = {}) => {
    sent.push(init);
    return fetch(url, init);
  };
  await failureOf(clientOf(world, { apiKey: undefined, fetch: spy }).models());
  assert.equal(sent[0].credentials, "same-origin");
  assert.deepEqual(Object.keys(sent[0].headers ?? {}), []);
});

test("an address that is none is refused with an example", () => {
  for (const baseUrl of ["", "localhost:7777", "ftp://host"]) assert.throws(() => clientOf(baseUrl), /such as "http:\/\/127\.0\.0\.1:7777"/);
});

test("a redirect is an answer like another, and never makes a GET of a POST", async () => {
  /** @type {(string | undefined)[]} */
  const methods = [];
  const server = createHttpServer((request, response) => {
    methods.push(request.method);
    response.writeHead(302, { Location: "/elsewhere" }).end();
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
  assert.equal((await failureOf(clientOf(`http://127.0.0.1:${port}`).submit(REQUEST))).code, "http_302");
  assert.deepEqual(methods, ["POST"]);
  server.close();
});

test("limits beyond the timers' range are none that pass at once", async () => {
  const patience = { ...QUICK, answerMs: 1e12, silenceMs: 1e12, firstTokenMs: 1e12, totalMs: 1e12 };
  assert.equal((await clientOf(await worldOf({ scripts: [TEXTS] }), { patience }).answer(REQUEST)).finish, "stop");
});

// ---------------------------------------------------------------------------------------------- leaving

test("aborting cancels the job and ends the events quietly", async () => {
  const world = await worldOf(HELD);
  const stop = new AbortController();
  const events = [];
  for await (const event of clientOf(world).stream(REQUEST, { signal: stop.signal })) {
    events.push(event.event);
    if (event.event === "token") stop.abort();
  }
  assert.deepEqual(events, ["queued", "token"]);
  assert.deepEqual(await states(world), ["cancelled"]);
});

test("aborting while nothing comes cancels the job too", async () => {
  const world = await worldOf(HELD);
  const stop = new AbortController();
  const stream = clientOf(world).stream(REQUEST, { signal: stop.signal });
  await stream.next();
  await stream.next();
  const third = stream.next();
  setImmediate(() => stop.abort());
  assert.deepEqual(await third, { done: true, value: undefined });
  assert.deepEqual(await states(world), ["cancelled"]);
});

test("aborting before the job has an id cancels it all the same", async () => {
  const world = await worldOf(HELD);
  const stop = new AbortController();
  /** @type {typeof fetch} */
  const abortsOnSubmit = (url, init) => {
    const answer = fetch(url, init);
    if (init?.method === "POST") stop.abort();
    return answer;
  };
  assert.deepEqual(await read(clientOf(world, { fetch: abortsOnSubmit }).stream(REQUEST, { signal: stop.signal })), []);
  assert.deepEqual(await states(world), ["cancelled"]);
});

test("a signal that has fired already sends nothing", async () => {
  const world = await worldOf(HELD);
  assert.deepEqual(await read(clientOf(world).stream(REQUEST, { signal: AbortSignal.abort() })), []);
  assert.deepEqual(await asked(world), []);
});

test("aborting during the waits between tries ends them", async () => {
  const world = await worldOf({ faults: Array.from({ length: 50 }, () => ({ on: "submit", retry_after: "14" })) });
  const stop = new AbortController();
  /** @type {typeof fetch} */
  const abortsAfterwards = async (url, init) => {
    const answer = await fetch(url, init);
    setImmediate(() => stop.abort());
    return answer;
  };
  assert.deepEqual(await read(clientOf(world, { fetch: abortsAfterwards }).stream(REQUEST, { signal: stop.signal })), []);
  assert.equal((await asked(world)).length, 1);
});

test("leaving by break or by an error leaves the job running", async () => {
  const world = await worldOf(HELD);
  const client = clientOf(world);
  for await (const event of client.stream(REQUEST)) if (event.event === "token") break;
  const failing = (async () => {
    for await (const event of client.stream(REQUEST)) if (event.event === "token") throw new Error("of the reader's");
  })();
  await assert.rejects(failing, /of the reader's/);
  const { id } = await client.submit(REQUEST);
  for await (const event of client.follow(id)) if (event.event === "token") break;
  assert.deepEqual([await states(world), await asked(world, "cancel")], [["streaming", "streaming", "streaming"], []]);
});

test("aborting leaves a detached job running", async () => {
  const world = await worldOf(HELD);
  const stop = new AbortController();
  for await (const event of clientOf(world).stream(REQUEST, { signal: stop.signal, detach: true })) if (event.event === "token") stop.abort();
  assert.deepEqual(await states(world), ["streaming"]);
});

test("aborting a follower cancels the job it took over, unless detached", async () => {
  const world = await worldOf(HELD);
  const client = clientOf(world);
  for (const detach of [true, false]) {
    const { id } = await client.submit(REQUEST);
    const stop = new AbortController();
    for await (const event of client.follow(id, { signal: stop.signal, detach })) if (event.event === "token") stop.abort();
  }
  assert.deepEqual(await states(world), ["streaming", "cancelled"]);
});

test("a cancel that fails is told on the console and throws nothing", async (context) => {
  const warn = context.mock.method(console, "warn", () => {});
  const world = await worldOf({ ...HELD, faults: [{ on: "cancel", status: 500, message: "the disk is full" }] });
  const stop = new AbortController();
  for await (const event of clientOf(world).stream(REQUEST, { signal: stop.signal })) if (event.event === "token") stop.abort();
  assert.deepEqual(warn.mock.calls.map((call) => call.arguments), [["job=mixtral_chat.0-1 could not be cancelled: the disk is full"]]);
});

// ---------------------------------------------------------------------------------------------- whole answers, limits, single calls

test("an answer is whole, each rewind taken back, with what it cost", async () => {
  const world = await worldOf({ scripts: [["a", "b", { rewind: 1 }, { cut: "close" }, "c", { done: { finish: "length" } }]] });
  const answer = await clientOf(world).answer(REQUEST);
  assert.deepEqual([answer.jobId, answer.text, answer.finish, answer.usage.total_tokens], ["mixtral_chat.0-1", "ac", "length", 5]);
});

test("logprobs are kept with the answer", async () => {
  const logprobs = { id: 7, text: "a", bytes: "61", logprob: -0.5, top: [] };
  const world = await worldOf({ scripts: [[{ event: "token", offset: 1, text: "a", logprobs }]] });
  assert.deepEqual((await clientOf(world).answer({ ...REQUEST, logprobs: true })).logprobs, [logprobs]);
});

test("the answer of a job is had by its id", async () => {
  const client = clientOf(await worldOf({ scripts: [TEXTS] }));
  const { id } = await client.submit(REQUEST);
  const answer = await client.answer(id);
  assert.deepEqual([answer.jobId, answer.text], [id, TEXTS.join("")]);
  assert.equal((await failureOf(client.answer("no"))).code, "job_not_found");
});

test("an answer that somebody cancels is told with what came of it", async () => {
  const world = await worldOf(HELD);
  const client = clientOf(world);
  const onJob = async (/** @type {string} */ id) => {
    while ((await states(world))[0] !== "streaming");
    await client.cancel(id);
  };
  const error = await failureOf(client.answer(REQUEST, { onJob }));
  assert.deepEqual([error.code, error.jobId, error.text], ["cancelled", "mixtral_chat.0-1", "Once"]);
});

test("an answer that is aborted rejects with the reason and cancels its job", async () => {
  const world = await worldOf(HELD);
  const stop = new AbortController();
  const reason = new Error("the page is gone");
  await assert.rejects(clientOf(world).answer(REQUEST, { signal: stop.signal, onJob: () => setImmediate(() => stop.abort(reason)) }), reason);
  assert.deepEqual(await states(world), ["cancelled"]);
  await assert.rejects(clientOf(world).answer(REQUEST, { signal: AbortSignal.abort() }), { name: "AbortError" });
});

for (const [limit, patience, script] of /** @type {const} */ ([
  ["first_token", { firstTokenMs: 1000 }, [{ hold: true }]],
  ["total", { firstTokenMs: 60_000, totalMs: 1500 }, ["Once", { hold: true }]],
])) {
  test(`a limit of a whole answer is named and cancels the job (${limit})`, async () => {
    const world = await worldOf({ scripts: [script] });
    const error = await failureOf(clientOf(world).withOptions({ patience }).answer(REQUEST));
    assert.deepEqual([error.code, error.jobId, error.isPassing], [`${limit}_timeout`, "mixtral_chat.0-1", false]);
    assert.match(error.message, /^job mixtral_chat\.0-1 .* within (firstTokenMs, 1|totalMs, 1\.5) s; allow more/);
    assert.deepEqual(await states(world), ["cancelled"]);
  });
}

test("a limit of a mere reader leaves the job running", async () => {
  const world = await worldOf(HELD);
  const client = clientOf(world);
  const { id } = await client.submit(REQUEST);
  const error = await failureOf(read(client.withOptions({ patience: { totalMs: 200 } }).follow(id)));
  assert.equal(error.code, "total_timeout");
  assert.deepEqual(await states(world), ["streaming"]);
});

test("a stream's silence has a code of its own", async () => {
  const patience = { ...QUICK, silenceMs: 50, maxTries: 1 };
  const error = await failureOf(read(clientOf(await worldOf(HELD), { patience }).stream(REQUEST)));
  assert.equal(error.code, "silence_timeout");
  assert.match(error.message, /silent for 0\.05 s/);
});

test("tries are counted and the last error is told", async () => {
  const world = await worldOf({ faults: Array.from({ length: 9 }, () => ({ on: "models" })) });
  assert.equal((await failureOf(clientOf(world, { patience: { ...QUICK, maxTries: 3 } }).models())).code, "unavailable");
  assert.equal((await asked(world)).length, 3);
});

test("a signal ends each single call with its reason, before and during it", async () => {
  const world = await worldOf({ faults: ["submit", "models", "job", "cancel"].map((on) => ({ on, hold: true })) });
  const client = clientOf(world);
  const { id } = await clientOf(await worldOf({})).submit(REQUEST);
  for (const call of [
    (/** @type {AbortSignal} */ signal) => client.models({ signal }),
    (/** @type {AbortSignal} */ signal) => client.job(id, { signal }),
    (/** @type {AbortSignal} */ signal) => client.cancel(id, { signal }),
    (/** @type {AbortSignal} */ signal) => client.submit(REQUEST, { signal }),
  ]) {
    await assert.rejects(call(AbortSignal.abort(new Error("before"))), /before/);
    await assert.rejects(call(AbortSignal.timeout(30)), { name: "TimeoutError" });
  }
});
