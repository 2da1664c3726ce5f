// @ts-check
/** FakeServer of the JavaScript package: what its scripts and faults do beyond chats.json. */
import assert from "node:assert/strict";
import test from "node:test";

import { MixtralClient, MixtralError } from "../../../clients/javascript/mixtral-client.js";
import { FakeServer } from "../../../clients/javascript/testing.js";

const REQUEST = { prompt: "Hello" };

/** @param {FakeServer} server @param {object} [options] */
function clientOf(server, options) {
  return new MixtralClient({ baseUrl: server.url, apiKey: server.apiKey, fetch: server.fetch, patience: { firstWaitMs: 1 }, ...options });
}

/** @param {Promise<unknown>} promise @returns {Promise<string>} the code of its MixtralError */
async function codeOf(promise) {
  const error = await promise.then(
    () => assert.fail("it should have failed"),
    (reason) => reason,
  );
  assert.ok(error instanceof MixtralError, String(error));
  return error.code;
}

test("jobs are answered by the scripts in order and then by the last", async () => {
  const server = new FakeServer("one", "two");
  const client = clientOf(server);
  for (const text of ["one", "two", "two"]) assert.equal((await client.answer(REQUEST)).text, text);
  server.answer("three little words");
  assert.deepEqual((await client.answer(REQUEST)).usage, { prompt_tokens: 3, completion_tokens: 3, total_tokens: 6, dropped_messages: 0 });
});

test("a job runs on unread up to a hold and release ends it", async () => {
  const server = new FakeServer(["a", { hold: true }, "b"]);
  const client = clientOf(server);
  const { id } = await client.submit(REQUEST);
  assert.deepEqual([(await client.job(id)).state, (await client.job(id)).text], ["streaming", "a"]);
  server.release();
  assert.deepEqual([(await client.job(id)).state, (await client.job(id)).text, (await client.job(id)).finish], ["done", "ab", "stop"]);
});

test("aborting ends a held stream and cancels its job", async () => {
  const server = new FakeServer(["a", { hold: true }]);
  const stop = new AbortController();
  const events = [];
  for await (const event of clientOf(server).stream(REQUEST, { signal: stop.signal })) {
    events.push(event.event);
    if (event.event === "token") setImmediate(() => stop.abort());
  }
  assert.deepEqual([events, server.states], [["queued", "token"], ["cancelled"]]);
});

test("a silent connection is replaced", async () => {
  const server = new FakeServer(["a", { cut: "silence" }, "b"]);
  assert.equal((await clientOf(server, { patience: { firstWaitMs: 1, silenceMs: 30 } }).answer(REQUEST)).text, "ab");
});

test("refusals are the service's", async () => {
  const server = new FakeServer();
  const client = clientOf(server);
  assert.equal(await codeOf(clientOf(server, { apiKey: "other" }).models()), "invalid_api_key");
  assert.equal(await codeOf(client.job("no")), "job_not_found");
  assert.equal(await codeOf(client.submit({})), "invalid_request");
  await client.submit(REQUEST, { idempotencyKey: "k" });
  assert.equal(await codeOf(client.submit({ prompt: "Ho" }, { idempotencyKey: "k" })), "idempotency_conflict");
  server.fail("models", { status: 429, code: "rate_limit_exceeded", retryAfter: "3600" });
  assert.equal(await codeOf(client.models()), "rate_limit_exceeded");
  assert.equal((await client.models())[0].id, "mixtral_chat");
  assert.equal((await (await server.fetch(`${server.url}/v1/chat`)).json()).error.code, "route_not_found");
});

test("a step that is none is refused when it is written", () => {
  assert.throws(() => new FakeServer(/** @type {any} */ ([{ hodl: true }])), /a step is a token's text or has one of cut, hold/);
  assert.throws(() => new FakeServer(/** @type {any} */ ([{ cut: "softly" }])), /a cut is one of close, abort, end, silence/);
});
