// @ts-check
/** What conversation.js promises: every event's effect on a chat, what is sent next, and what survives a reload. */

import assert from "node:assert/strict";
import { test } from "node:test";

import * as conversation from "../../frontend/conversation.js";

const { canAsk, effectiveSettings, emptyChat, isBusy, isRemembered, lastExchange, nextRequest, reduce, restored, saved } = conversation;

const PAGE = { public: true, model: "mixtral_chat", title: "Mixtral", description: "", max_tokens: { default: 512, max: 2048 }, temperature: { default: 0.8, min: 0, max: 2 } };
const FAILURE = { code: "queue_full", status: 429, message: "the queue holds 1,000 jobs", retryAfterS: 3 };

/** @param {any[]} events @param {any} chat */
const after = (events, chat = reduce(emptyChat(), { type: "page", page: PAGE })) => events.reduce(reduce, chat);
/** @param {string} text */
const ask = (text) => ({ type: "ask", text });
/** @param {number} offset @param {string} text @param {number | null} [atMs] */
const token = (offset, text, atMs = null) => ({ type: "token", offset, text, id: `${offset}.aa`, atMs });
/** @param {...string} texts */
const tokens = (...texts) => texts.map((text, index) => token(index + 1, text));
const done = { type: "done", finish: "stop", usage: { completion_tokens: 2 }, timings: null };
/** @param {any} chat */
const answerOf = (chat) => /** @type {any} */ (lastExchange(chat)).answer;
/** @param {string} question @param {string} answer */
const exchange = (question, answer) => [ask(question), ...tokens(answer), done];

/** Freeze a value all the way down, so that a reducer that changes its input throws. @param {any} value @returns {any} */
function frozen(value) {
  if (value !== null && typeof value === "object" && !Object.isFrozen(value)) Object.values(Object.freeze(value)).forEach(frozen);
  return value;
}

// ------------------------------------------------------------------------------------------------ asking

test("a question is trimmed, opens an answer, and makes the chat busy", () => {
  const chat = after([ask("  Hello?\n")]);
  assert.equal(lastExchange(chat)?.question, "Hello?");
  assert.equal(answerOf(chat).status, "sending");
  assert.ok(isBusy(chat));
});

test("nothing can be asked without words, before the server has said what it serves, or while an answer is coming", () => {
  const ready = after([]);
  assert.ok(canAsk(ready, "Hi"));
  assert.ok(!canAsk(ready, " \n\t"));
  assert.ok(!canAsk(emptyChat(), "Hi"));
  for (const events of [[], [{ type: "queued", position: 2 }], tokens("a")]) {
    const busy = after([ask("one"), ...events]);
    assert.ok(!canAsk(busy, "two"));
    assert.equal(reduce(busy, ask("two")), busy);
  }
});

test("a question that ended in any way leaves room for the next", () => {
  for (const end of [done, { type: "stop" }, { type: "failed", failure: FAILURE }]) {
    const chat = after([ask("one"), ...tokens("a"), end, ask("two")]);
    assert.deepEqual(chat.exchanges.map((/** @type {any} */ each) => each.question), ["one", "two"]);
  }
});

test("asking again puts the same question with a fresh answer in place of the last", () => {
  const chat = after([...exchange("one", "1"), ask("two"), ...tokens("half"), { type: "stop" }, { type: "again" }]);
  assert.deepEqual(chat.exchanges.map((/** @type {any} */ each) => [each.question, each.answer.text, each.answer.status]), [
    ["one", "1", "done"],
    ["two", "", "sending"],
  ]);
});

test("asking again does nothing to an empty chat, nor while the answer is coming", () => {
  for (const chat of [after([]), after([ask("one")]), after([ask("one"), ...tokens("a")])]) assert.equal(reduce(chat, { type: "again" }), chat);
});

test("a new chat forgets the exchanges and keeps settings and limits", () => {
  const chat = after([{ type: "settings", settings: { system: "Be brief." } }, ...exchange("one", "1"), { type: "clear" }]);
  assert.deepEqual([chat.exchanges, chat.settings.system, chat.page], [[], "Be brief.", PAGE]);
});

// ------------------------------------------------------------------------------------------------ what is sent

test("the first request carries the question alone, with the server's defaults", () => {
  assert.deepEqual(nextRequest(after([ask("Hi")])), {
    model: "mixtral_chat",
    messages: [{ role: "user", content: "Hi" }],
    temperature: 0.8,
    max_tokens: 512,
  });
});

test("a later request carries system prompt, history and question in order, and the person's settings", () => {
  const settings = { type: "settings", settings: { system: " Be brief.\n", temperature: 0, maxTokens: 40 } };
  const request = nextRequest(after([...exchange("one", " 1"), settings, ask("two")]));
  assert.deepEqual(request, {
    model: "mixtral_chat",
    messages: [
      { role: "system", content: "Be brief." },
      { role: "user", content: "one" },
      { role: "assistant", content: " 1" },
      { role: "user", content: "two" },
    ],
    temperature: 0,
    max_tokens: 40,
  });
});

test("a system prompt of blanks is not sent", () => {
  const request = nextRequest(after([{ type: "settings", settings: { system: " \n " } }, ask("one")]));
  assert.deepEqual(request.messages, [{ role: "user", content: "one" }]);
});

test("what was stopped or broke off half-way is remembered, what brought no text is not", () => {
  const failed = { type: "failed", failure: FAILURE };
  const chat = after([ask("a"), ...tokens("half"), { type: "stop" }, ask("b"), failed, ask("c"), ...tokens("  "), done, ask("d"), ...tokens("x"), failed, ask("e")]);
  assert.deepEqual(chat.exchanges.map(isRemembered), [true, false, false, true, false]);
  assert.deepEqual(nextRequest(chat).messages.map(({ content }) => content), ["a", "half", "d", "x", "e"]);
});

test("roles of a request always alternate and end with the user, whatever became of the answers", () => {
  const ends = [[...tokens("x"), done], [{ type: "stop" }], [{ type: "failed", failure: FAILURE }], [...tokens("", " "), done], [...tokens("y"), { type: "stop" }]];
  for (const first of ends) {
    for (const second of ends) {
      for (const third of ends) {
        const { messages } = nextRequest(after([ask("1"), ...first, ask("2"), ...second, ask("3"), ...third, ask("4")]));
        messages.forEach(({ role }, index) => assert.equal(role, index % 2 === 0 ? "user" : "assistant"));
        assert.equal(messages.at(-1)?.content, "4");
      }
    }
  }
});

test("settings outside the server's limits are brought back to the nearest it takes", () => {
  const settled = (/** @type {any} */ settings) => effectiveSettings(after([{ type: "settings", settings }]));
  assert.equal(settled({ temperature: 9 }).temperature, 2);
  assert.equal(settled({ temperature: -1 }).temperature, 0);
  assert.equal(settled({ maxTokens: 99_999 }).maxTokens, 2048);
  assert.equal(settled({ maxTokens: 0 }).maxTokens, 1);
  assert.equal(settled({ maxTokens: 10.6 }).maxTokens, 11);
});

test("a request without an open question, or settings without the server's limits, are refused with a sentence", () => {
  assert.throws(() => nextRequest(after([])), /no question is open/);
  assert.throws(() => nextRequest(after(exchange("one", "1"))), /no question is open/);
  assert.throws(() => effectiveSettings(emptyChat()), /\/v1\/page/);
});

// ------------------------------------------------------------------------------------------------ the answer comes in

test("tokens join in order, those without text included, and name where a reload goes on", () => {
  const answer = answerOf(after([ask("one"), ...tokens("Once", "", " upon")]));
  assert.deepEqual([answer.text, answer.tokens, answer.status, answer.eventId], ["Once upon", 3, "streaming", "3.aa"]);
});

test("a repeated token changes nothing", () => {
  const chat = after([ask("one"), ...tokens("a", "b")]);
  assert.equal(reduce(chat, token(1, "a")), chat);
  assert.equal(reduce(chat, token(2, "other")), chat);
});

test("a token beyond the next is refused: no answer has a hole", () => {
  const chat = after([ask("one"), ...tokens("a", "b")]);
  assert.throws(() => reduce(chat, token(4, "d")), /token 4 came where token 3 was expected/);
});

test("a rewind cuts back to its token, and the tokens that come anew take their place", () => {
  const chat = after([ask("one"), ...tokens("Once", " upon", " a", " time"), { type: "rewind", to: 2, id: "2.bb" }]);
  assert.deepEqual([answerOf(chat).text, answerOf(chat).tokens, answerOf(chat).eventId], ["Once upon", 2, "2.bb"]);
  assert.equal(answerOf(reduce(chat, token(3, " the"))).text, "Once upon the");
});

test("a rewind to 0 empties the answer, one to the present end or beyond changes nothing", () => {
  const chat = after([ask("one"), ...tokens("a", "b")]);
  assert.deepEqual([answerOf(reduce(chat, { type: "rewind", to: 0 })).text, answerOf(reduce(chat, { type: "rewind", to: 0 })).tokens], ["", 0]);
  assert.equal(reduce(chat, { type: "rewind", to: 2 }), chat);
  assert.equal(reduce(chat, { type: "rewind", to: 7 }), chat);
});

test("any mix of tokens, repeats and rewinds gives the text a plain list would give, and changes no earlier state", () => {
  let seed = 1;
  const random = (/** @type {number} */ below) => (seed = (seed * 48271) % 2147483647) % below;
  for (let round = 0; round < 200; round += 1) {
    /** @type {string[]} */
    let model = [];
    let chat = frozen(after([ask("one")]));
    for (let step = 0; step < 40; step += 1) {
      const kind = random(10);
      const offset = model.length + 1;
      if (kind < 7 || model.length === 0) {
        const text = ["", "a", " bc", "é", "🙂", "\n"][random(6)];
        model.push(text);
        chat = reduce(chat, token(offset, text));
      } else if (kind < 9) {
        chat = reduce(chat, token(1 + random(model.length), "a repeat"));
      } else {
        const to = random(offset);
        model = model.slice(0, to);
        chat = reduce(chat, { type: "rewind", to });
      }
      frozen(chat);
      assert.equal(answerOf(chat).text, model.join(""));
      assert.equal(answerOf(chat).tokens, model.length);
    }
  }
});

test("the place in the queue is shown while it waits and is gone with the first token", () => {
  const waiting = after([ask("one"), { type: "accepted", job: "j1" }, { type: "queued", position: 3, eta_s: 12 }]);
  assert.deepEqual([answerOf(waiting).status, answerOf(waiting).queue, answerOf(waiting).job], ["queued", { position: 3, etaS: 12 }, "j1"]);
  const begun = reduce(waiting, token(1, "a"));
  assert.deepEqual([answerOf(begun).status, answerOf(begun).queue], ["streaming", null]);
});

test("a chat that moves to another worker keeps its text while it waits again", () => {
  const chat = after([ask("one"), ...tokens("a", "b"), { type: "moved", attempt: 2 }, { type: "queued", position: 1, eta_s: null }]);
  assert.deepEqual([answerOf(chat).moved, answerOf(chat).status, answerOf(chat).text], [true, "queued", "ab"]);
});

test("trouble on the way is remembered until it passes or the answer ends", () => {
  const troubled = after([ask("one"), { type: "trouble", trouble: "connection_lost" }]);
  assert.equal(answerOf(troubled).trouble, "connection_lost");
  assert.equal(answerOf(reduce(troubled, { type: "trouble", trouble: null })).trouble, null);
  assert.equal(answerOf(reduce(troubled, { type: "stop" })).trouble, null);
  const calm = after([ask("one")]);
  assert.equal(reduce(calm, { type: "trouble", trouble: null }), calm);
});

// ------------------------------------------------------------------------------------------------ the answer ends

test("a finished answer says why it ended and how many tokens the server counted", () => {
  const answer = answerOf(after([ask("one"), ...tokens("a", "b"), { ...done, finish: "length", usage: { completion_tokens: 7 } }]));
  assert.deepEqual([answer.status, answer.finish, answer.tokens, answer.failure], ["done", "length", 7, null]);
});

test("the rate is the server's where it gives times: tokens after the first over the time after the first", () => {
  const timings = { queue_s: 1, first_token_s: 2, total_s: 4 };
  const answer = answerOf(after([ask("one"), token(1, "a", 0), token(2, "b", 10), { ...done, usage: { completion_tokens: 21 }, timings }]));
  assert.equal(answer.tokensPerS, 10);
});

test("without the server's times the rate is what the page saw, also of a stopped answer", () => {
  const seen = [ask("one"), token(1, "a", 1000), token(2, "b", 1100), token(3, "c", 1500)];
  for (const end of [{ type: "stop" }, { ...done, usage: null, timings: { queue_s: null, first_token_s: null, total_s: null } }]) {
    assert.equal(answerOf(after([...seen, end])).tokensPerS, 4);
  }
});

test("one token has no rate", () => {
  assert.equal(answerOf(after([ask("one"), token(1, "a", 5), { ...done, usage: { completion_tokens: 1 } }])).tokensPerS, null);
});

test("a stop keeps the partial text, and what arrives later is dropped", () => {
  const stopped = after([ask("one"), ...tokens("Once", " upon"), { type: "stop" }]);
  assert.deepEqual([answerOf(stopped).status, answerOf(stopped).text, isBusy(stopped)], ["stopped", "Once upon", false]);
  for (const late of [token(3, " a"), done, { type: "queued", position: 1 }, { type: "failed", failure: FAILURE }, { type: "stop" }]) {
    assert.equal(reduce(stopped, late), stopped);
  }
});

test("a failure keeps the partial text and says what went wrong", () => {
  const answer = answerOf(after([ask("one"), ...tokens("half"), { type: "failed", failure: FAILURE }]));
  assert.deepEqual([answer.status, answer.text, answer.failure], ["failed", "half", FAILURE]);
});

test("a job that another reader cancelled is a stopped answer; one that expired is a failed one", () => {
  assert.equal(answerOf(after([ask("one"), ...tokens("a"), { ...done, finish: "cancelled" }])).status, "stopped");
  const expired = answerOf(after([ask("one"), { ...done, finish: "expired" }]));
  assert.deepEqual([expired.status, expired.failure.code], ["failed", "expired"]);
});

test("server events without a question, and events of no known kind, change nothing", () => {
  const chat = after([]);
  for (const event of [token(1, "a"), done, { type: "queued", position: 1 }, { type: "stop" }]) assert.equal(reduce(chat, event), chat);
  const busy = after([ask("one")]);
  assert.equal(reduce(busy, /** @type {any} */ ({ type: "weather" })), busy);
});

test("an exchange that did not change stays the same object", () => {
  const before = after([...exchange("one", "1"), ask("two"), ...tokens("a")]);
  assert.equal(reduce(before, token(2, "b")).exchanges[0], before.exchanges[0]);
});

// ------------------------------------------------------------------------------------------------ across a reload

test("a finished chat comes back as it was, without the server's limits, which are asked for anew", () => {
  const chat = after([{ type: "settings", settings: { system: "Be brief.", temperature: 0.3 } }, ...exchange("one", "<b>1</b> \u2028 🙂")]);
  assert.deepEqual(restored(saved(chat)), { ...chat, page: null });
});

test("an answer that was coming goes on after its last token", () => {
  const chat = after([ask("one"), { type: "accepted", job: "j1" }, token(1, "Once", 5), token(2, " upon", 6)]);
  const back = restored(saved(chat));
  assert.deepEqual([answerOf(back).job, answerOf(back).eventId, isBusy(back)], ["j1", "2.aa", true]);
  const ended = after([token(2, " upon", 1), token(3, " a", 2), { ...done, usage: null }], back);
  assert.deepEqual([answerOf(ended).text, answerOf(ended).tokensPerS], ["Once upon a", null]);
});

test("an answer that was coming can still be rewound after a reload", () => {
  const back = restored(saved(after([ask("one"), { type: "accepted", job: "j1" }, ...tokens("a", "b", "c")])));
  assert.equal(answerOf(reduce(back, { type: "rewind", to: 1 })).text, "a");
});

test("a question the server had not taken on before the reload says so and can be asked again", () => {
  const back = restored(saved(after([ask("one")])));
  assert.deepEqual([answerOf(back).status, answerOf(back).failure.code], ["failed", "not_taken_on"]);
});

test("what was not written by this version gives an empty chat", () => {
  for (const text of [null, "", "{", "[]", "7", '"x"', "{}", '{"format":1}', '{"format":0,"exchanges":[],"settings":{}}', '{"format":1,"exchanges":{}}']) {
    assert.deepEqual(restored(text), emptyChat());
  }
});
