// OpenAI's own client for Node against a real server: SERVER and KEY name it; its worker's answers are w<number> words.
// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const { SERVER, KEY, HELLO } = /** @type {Record<string, string>} */ (process.env);
const client = new OpenAI({ baseURL: `${SERVER}/v1`, apiKey: KEY, maxRetries: 0, timeout: 20_000 });
/** @type {import("openai").OpenAI.ChatCompletionCreateParamsNonStreaming} */
const asked = { model: "mixtral_chat", messages: [{ role: "user", content: "hello" }] };

test("whole answers with usage and request id", async () => {
  const answer = await client.chat.completions.create({ ...asked, n: 2, seed: 3, logprobs: true, top_logprobs: 1 });
  assert.deepEqual(answer.choices.map((choice) => choice.message.content), [HELLO, HELLO]);
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.choices[0].logprobs?.content?.map((one) => one.token).join(""), HELLO);
  assert.equal(answer.usage?.completion_tokens, 20);
  assert.equal(answer.usage?.prompt_tokens, 2);
  assert.match(answer._request_id ?? "", /^req-/);
});

test("a stream, token by token, with usage last", async () => {
  const stream = await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const texts = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta.content ?? "");
  assert.equal(texts.join(""), HELLO);
  assert.equal(chunks.at(-1)?.usage?.completion_tokens, 10);
  assert.deepEqual(chunks.at(-1)?.choices, []);
});

test("the streaming helper puts n answers together", async () => {
  const runner = client.chat.completions.stream({ ...asked, n: 2 });
  const final = await runner.finalChatCompletion();
  assert.deepEqual(final.choices.map((choice) => choice.message.content), [HELLO, HELLO]);
});

test("a stream that is left gives its job up, and with a key is taken up again", async () => {
  const headers = { "Idempotency-Key": "from node" };
  const left = await client.chat.completions.create({ ...asked, stream: true }, { headers });
  for await (const chunk of left) {
    assert.equal(chunk.choices[0].delta.role, "assistant");
    break;
  }
  const again = await client.chat.completions.create({ ...asked, stream: true }, { headers });
  const texts = [];
  for await (const chunk of again) texts.push(chunk.choices[0].delta.content ?? "");
  assert.equal(texts.join(""), HELLO);
});

test("completions of a list of prompts", async () => {
  const answer = await client.completions.create({ model: "mixtral_chat", prompt: ["one", "two"], max_tokens: 2, n: 2 });
  assert.deepEqual(answer.choices.map((choice) => [choice.index, choice.finish_reason]), [0, 1, 2, 3].map((index) => [index, "length"]));
  assert.equal(answer.choices[0].text, answer.choices[1].text);
  assert.notEqual(answer.choices[0].text, answer.choices[2].text);
});

test("models with what they take", async () => {
  const [model] = (await client.models.list()).data;
  assert.equal(model.id, "mixtral_chat");
  assert.equal(/** @type {any} */ (model).max_tokens, 32_768);
});

test("refusals are the package's own errors, with code and field", async () => {
  await assert.rejects(client.chat.completions.create({ ...asked, model: "gpt-4" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.deepEqual([error.status, error.code, error.param], [404, "model_not_found", "model"]);
    return true;
  });
  await assert.rejects(
    client.chat.completions.create({ ...asked, tools: [{ type: "function", function: { name: "f" } }] }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "tools" && /calls no tools/.test(error.message),
  );
  await assert.rejects(client.completions.create({ model: "mixtral_chat", prompt: "x", echo: true }), OpenAI.BadRequestError);
  await assert.rejects(new OpenAI({ baseURL: `${SERVER}/v1`, apiKey: "no", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);
});

test("ignored fields are named in a header", async () => {
  const { response } = await client.chat.completions.create({ ...asked, store: true, metadata: { a: "b" } }).withResponse();
  assert.deepEqual(response.headers.get("x-ignored-fields")?.split(", ").sort(), ["metadata", "store"]);
});
