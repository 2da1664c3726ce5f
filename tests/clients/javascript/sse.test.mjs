// @ts-check
/** The JavaScript SSE decoder: every golden case, at every split position, within its bounds. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { EventTooLarge, SseDecoder } from "../../../clients/javascript/sse.js";

/** @type {{name: string, bytes: string, events: object[], retry_ms: number | null}[]} */
const cases = JSON.parse(readFileSync(new URL("../fixtures/sse.json", import.meta.url), "utf8")).cases;

/** @param {Uint8Array[]} chunks */
function decoded(chunks) {
  const decoder = new SseDecoder();
  const events = chunks.flatMap((chunk) => decoder.feed(chunk));
  return { events, retry_ms: decoder.retryMs };
}

for (const { name, bytes, events, retry_ms } of cases) {
  const stream = Uint8Array.from(Buffer.from(bytes, "latin1"));

  test(`${name}: decodes as the rules say`, () => {
    assert.deepEqual(decoded([stream]), { events, retry_ms });
  });

  test(`${name}: decodes the same when split in two anywhere`, () => {
    for (let at = 0; at <= stream.length; at += 1) {
      assert.deepEqual(decoded([stream.slice(0, at), stream.slice(at)]), { events, retry_ms }, `split at ${at}`);
    }
  });

  test(`${name}: decodes the same byte by byte`, () => {
    assert.deepEqual(decoded(Array.from(stream, (byte) => Uint8Array.of(byte))), { events, retry_ms });
  });
}

const bytesOf = (/** @type {string} */ text) => new TextEncoder().encode(text);

test("an event is given with the bytes that end it and not later", () => {
  const decoder = new SseDecoder();
  assert.deepEqual(decoder.feed(bytesOf("data: 1\r")), []);
  assert.equal(decoder.feed(bytesOf("\r"))[0].data, "1");
});

test("an endless line is refused at the limit", () => {
  const decoder = new SseDecoder({ maxEventChars: 100 });
  decoder.feed(bytesOf(`data: ${"x".repeat(94)}`));
  assert.throws(() => decoder.feed(bytesOf("x")), EventTooLarge);
});

test("endless data lines are refused at the limit", () => {
  const decoder = new SseDecoder({ maxEventChars: 100 });
  assert.throws(() => {
    for (let line = 0; line < 30; line += 1) decoder.feed(bytesOf("data: xyz\n"));
  }, EventTooLarge);
});

test("endless comments and events within the limit are never refused", () => {
  const decoder = new SseDecoder({ maxEventChars: 100 });
  let count = 0;
  for (let turn = 0; turn < 1000; turn += 1) count += decoder.feed(bytesOf(`: ping\ndata: ${"x".repeat(80)}\n\n`)).length;
  for (let turn = 0; turn < 1000; turn += 1) decoder.feed(bytesOf(": ping\n"));
  assert.equal(count, 1000);
});
