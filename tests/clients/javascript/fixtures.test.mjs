// @ts-check
/**
 * The golden fixtures that both clients share (Python: test_fixtures.py), over HTTP and against the fake server of this package.
 * SCRIPTED_API names a server as in client.test.mjs.
 */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { AnswerText, MixtralClient, MixtralError } from "../../../clients/javascript/mixtral-client.js";
import { FakeServer } from "../../../clients/javascript/testing.js";

/** @typedef {import("../../../clients/javascript/mixtral-client.js").JobEvent} JobEvent */

const API = process.env.SCRIPTED_API ?? "";
const REQUEST = { prompt: "Hello" };
const QUICK = { firstWaitMs: 1, maxWaitMs: 10 };
const wire = fixture("wire.json");
const { cases } = fixture("chats.json");

/** @param {string} name */
function fixture(name) {
  return JSON.parse(readFileSync(new URL(`../fixtures/${name}`, import.meta.url), "utf8"));
}

/** A client whose every request gets this answer. @param {() => Response} answer @param {object} [patience] */
function clientOf(answer, patience = {}) {
  return new MixtralClient({ baseUrl: "http://x", apiKey: "k", patience: { ...QUICK, ...patience }, fetch: async () => answer() });
}

/** What a reader of one connection is given. @param {Uint8Array[]} chunks */
async function readStream(chunks) {
  const body = () => new ReadableStream({ start: (controller) => (chunks.forEach((chunk) => controller.enqueue(chunk)), controller.close()) });
  const events = [];
  for await (const event of clientOf(() => new Response(body())).follow("job")) events.push(event);
  return events;
}

test("the server's stream is read the same when split in two anywhere", async () => {
  const raw = new TextEncoder().encode(wire.stream.text);
  for (let at = 0; at <= raw.length; at += 1) {
    assert.deepEqual(await readStream([raw.slice(0, at), raw.slice(at)]), wire.stream.events, `split at ${at}`);
  }
  assert.deepEqual(await readStream(Array.from(raw, (byte) => Uint8Array.of(byte))), wire.stream.events);
});

test("bodies are given as they came", async () => {
  assert.deepEqual(await clientOf(() => Response.json(wire.accepted)).submit(REQUEST), wire.accepted);
  assert.deepEqual(await clientOf(() => Response.json(wire.view)).job("x"), wire.view);
});

for (const { name, status, headers, body, error: expected } of wire.errors) {
  test(`an answer becomes the error that the fixture says: ${name}`, async (context) => {
    context.mock.method(Date, "now", () => Date.parse(wire.now));
    const error = await clientOf(() => new Response(body, { status, headers }), { maxTries: 1 })
      .models()
      .then(() => assert.fail("it should have failed"), (reason) => reason);
    assert.ok(error instanceof MixtralError, String(error));
    const { code, kind, param } = error;
    const seconds = error.retryAfterMs === null ? null : error.retryAfterMs / 1000;
    const facts = { code, status: error.status, kind, param, request_id: error.requestId, retry_after_s: seconds, is_passing: error.isPassing };
    assert.deepEqual(facts, expected);
  });
}

/** @param {JobEvent} event */
function told(event) {
  if (event.event === "token") return [{ token: [event.offset, event.text] }];
  if (event.event === "moved") return [{ moved: event.attempt }];
  if (event.event === "rewind") return [{ rewind: event.to }];
  return event.event === "done" ? [{ done: event.finish }] : [];
}

/**
 * @param {any} expected
 * @param {MixtralClient} client
 * @param {() => Promise<{call: string, headers: Record<string, string>}[]>} requests
 */
async function check(expected, client, requests) {
  const events = [];
  const said = new AnswerText();
  let code = null;
  try {
    for await (const event of client.stream(REQUEST)) {
      events.push(...told(event));
      said.take(event);
    }
  } catch (error) {
    assert.ok(error instanceof MixtralError, String(error));
    code = error.code;
  }
  assert.deepEqual(events, expected.events);
  assert.deepEqual([said.text, code], [expected.text, expected.error]);
  const ids = (await requests()).filter(({ call }) => call === "events").map(({ headers }) => headers["Last-Event-ID"]);
  assert.deepEqual(ids.map((id) => (id === undefined ? null : Number.parseInt(id, 10))), expected.after);
}

for (const chat of cases) {
  test(`a chat that goes wrong is read as the fixture says: ${chat.name}`, async () => {
    const script = { scripts: [chat.script], faults: chat.faults };
    const { base } = await (await fetch(`${API}/scripts`, { method: "POST", body: JSON.stringify(script) })).json();
    const client = new MixtralClient({ baseUrl: API + base, apiKey: "test-key", patience: QUICK });
    await check(chat, client, async () => (await (await fetch(`${API}${base}/history`)).json()).requests);
  });

  test(`the fake server of this package plays it alike: ${chat.name}`, async () => {
    const server = new FakeServer(chat.script);
    for (const { on, lose, retry_after: retryAfter, ...failure } of chat.faults) {
      if (lose) server.loseAnswer(on);
      else server.fail(on, retryAfter === undefined ? failure : { ...failure, retryAfter });
    }
    const client = new MixtralClient({ baseUrl: server.url, apiKey: server.apiKey, fetch: server.fetch, patience: QUICK });
    await check(chat, client, async () => server.requests);
  });
}
