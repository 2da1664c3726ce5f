// @ts-check
/** What words.js promises: every state and every failure has words, and every failure a remedy that exists. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { emptyChat, lastExchange, reduce } from "../../frontend/conversation.js";
import { about, explain, figures, standing } from "../../frontend/words.js";

const PAGE = { public: true, model: "m", title: "M", description: "", max_tokens: { default: 512, max: 2048 }, temperature: { default: 0.8, min: 0, max: 2 } };

/** The answer after these events. @param {...any} events @returns {any} */
function answer(...events) {
  return lastExchange([{ type: "page", page: PAGE }, { type: "ask", text: "?" }, ...events].reduce(reduce, emptyChat()))?.answer;
}

/** @param {string} code @param {Partial<import("../../frontend/conversation.js").Failure>} [more] */
const failure = (code, more = {}) => ({ code, status: null, message: "", retryAfterS: null, ...more });

test("a waiting answer says its place in the queue, and how long if the server knows", () => {
  const queued = (/** @type {any} */ event) => standing(answer({ type: "queued", ...event }));
  assert.equal(queued({ position: 3, eta_s: 12.4 }), "Waiting: number 3 in the queue, about 12 seconds…");
  assert.equal(queued({ position: 3, eta_s: null }), "Waiting: number 3 in the queue…");
  assert.equal(queued({ position: 1, eta_s: null }), "Waiting: next in the queue…");
});

test("an answer that streams needs no words, unless it moved", () => {
  const token = { type: "token", offset: 1, text: "a" };
  assert.equal(standing(answer(token)), "");
  assert.match(standing(answer(token, { type: "moved", attempt: 2 })), /another worker; nothing was lost/);
});

test("trouble on the way is said before anything else", () => {
  const token = { type: "token", offset: 1, text: "a" };
  assert.match(standing(answer(token, { type: "trouble", trouble: "connection_lost" })), /does not answer; trying again/);
  assert.match(standing(answer({ type: "queued", position: 1 }, { type: "trouble", trouble: "busy" })), /busy; trying again/);
  assert.match(standing(answer({ type: "trouble", trouble: "away" })), /away for a moment; trying again/);
});

test("waiting times are rounded as a person would", () => {
  assert.deepEqual([0, 1.4, 2, 89, 90, 600, 7200].map(about), [
    "about a second",
    "about a second",
    "about 2 seconds",
    "about 89 seconds",
    "about 2 minutes",
    "about 10 minutes",
    "about 2 hours",
  ]);
});

test("a finished answer shows tokens and rate, and says when the limit cut it", () => {
  const first = { type: "token", offset: 1, text: "a", atMs: 0 };
  const done = { type: "done", finish: "stop", usage: { completion_tokens: 1201 }, timings: { first_token_s: 1, total_s: 31 } };
  assert.equal(figures(answer(first, done)), "1,201 tokens · 40 tokens/s");
  assert.equal(figures(answer(first, { ...done, usage: { completion_tokens: 100 } })), "100 tokens · 3.3 tokens/s");
  assert.equal(figures(answer(first, { ...done, usage: { completion_tokens: 1 } })), "1 token");
  assert.match(figures(answer(first, { ...done, finish: "length" })), /cut at the token limit, which Settings can raise/);
});

test("a stopped answer says so, also before its first word", () => {
  assert.equal(figures(answer({ type: "token", offset: 1, text: "a" }, { type: "stop" })), "1 token · stopped");
  assert.equal(figures(answer({ type: "stop" })), "Stopped before the first word");
});

test("an answer that ended without a word says so", () => {
  assert.equal(figures(answer({ type: "done", finish: "stop", usage: { completion_tokens: 0 } })), "The model ended without a word");
});

test("the server's sentence is shown as a sentence", () => {
  assert.equal(explain(failure("strange", { message: "gpu 3 fell off the bus" }), true).what, "Gpu 3 fell off the bus.");
  assert.equal(explain(failure("strange", { message: "what now?" }), true).what, "What now?");
});

test("every failure has words, something to do, and a button, with a message and without", () => {
  const codes = [
    ["invalid_api_key", "not_allowed", "context_length_exceeded", "queue_full", "rate_limit_exceeded", "connection_lost", "redis_unavailable"],
    ["unavailable", "job_not_found", "expired", "not_taken_on", "invalid_request", "internal_error", "bad_answer", "http_502", "page_error"],
  ].flat();
  for (const code of codes) {
    for (const message of ["", "the rule is 7; got 8"]) {
      for (const isPublic of [true, false]) {
        const { what, todo, remedy, button } = explain(failure(code, { message }), isPublic);
        assert.match(what, /^[A-Z].*[.!?]$/, code);
        assert.match(todo, /^[A-Z].*[.!?]$/, code);
        assert.ok(["again", "key", "clear", "settings"].includes(remedy), code);
        assert.notEqual(button, "", code);
      }
    }
  }
});

test("a refused key asks for another where keys are used, and for a reload where they are not", () => {
  assert.equal(explain(failure("invalid_api_key"), false).remedy, "key");
  assert.match(explain(failure("invalid_api_key"), true).todo, /Reload/);
});

test("a full queue says when to try again, as far as the server said it", () => {
  assert.match(explain(failure("queue_full", { retryAfterS: 30 }), true).todo, /Try again in about 30 seconds\./);
  assert.match(explain(failure("queue_full"), true).todo, /Try again in a moment\./);
});

test("a chat that grew too long offers a new one", () => {
  assert.equal(explain(failure("context_length_exceeded", { message: "prompt is 9 tokens" }), true).remedy, "clear");
});
