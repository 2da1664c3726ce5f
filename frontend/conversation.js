// @ts-check
/**
 * The chat as a value: what was asked, what has come in so far, what is sent next.
 *
 * Decides what every event does to the chat, what counts as history, and which numbers a request may carry. Leaves the
 * sentences to words.js, drawing to view.js, and network, clock and storage to chat.js. Pure: every function returns a new
 * value, and a part that did not change stays the same object, so the view redraws only what did.
 */

/**
 * What a request met on its way and is being tried again for: nobody answers, a limit, the server is restarting.
 * @typedef {"connection_lost" | "busy" | "away"} Trouble
 */

/**
 * `sending` → `queued` → `streaming` → `done` | `stopped` | `failed`. A chat that moves to another worker may wait again.
 * @typedef {"sending" | "queued" | "streaming" | "done" | "stopped" | "failed"} Status
 */

/**
 * @typedef {object} Failure
 * @property {string} code        one word, the server's or the client's
 * @property {number | null} status  HTTP status, null where none came
 * @property {string} message     the sentence that came with it
 * @property {number | null} retryAfterS  when the server says it can be asked again
 */

/**
 * @typedef {object} Answer
 * @property {Status} status
 * @property {string} text            every token so far
 * @property {readonly number[]} ends ends[i] is where token i+1 ends in text: the place to cut at on a rewind
 * @property {string | null} job      what a reload, or a stop, names
 * @property {string | null} eventId  the last event in text: where a reload goes on
 * @property {{position: number, etaS: number | null} | null} queue  while it waits
 * @property {boolean} moved          another worker took it over
 * @property {Trouble | null} trouble while the server is being tried again
 * @property {string | null} finish   why the model ended: "stop", "length", …
 * @property {number} tokens
 * @property {number | null} tokensPerS
 * @property {{fromMs: number, toMs: number} | null} pace  arrival of the first and of the last token by the page's clock
 * @property {Failure | null} failure
 */

/** @typedef {{question: string, answer: Answer}} Exchange */

/** What the person set; null takes the server's default. @typedef {{system: string, temperature: number | null, maxTokens: number | null}} Settings */

/**
 * What the server says about itself (GET /v1/page).
 * @typedef {object} Page
 * @property {boolean} public     true: visitors need no key
 * @property {string} model
 * @property {string} title
 * @property {string} description
 * @property {{default: number, max: number}} max_tokens
 * @property {{default: number, min: number, max: number}} temperature
 */

/** @typedef {{exchanges: readonly Exchange[], settings: Settings, page: Page | null}} Chat */

/**
 * What can happen: the person's acts, the server's events (as the client yields them; atMs is the page's clock), failures.
 * @typedef {{type: "page", page: Page}
 *   | {type: "settings", settings: Partial<Settings>}
 *   | {type: "ask", text: string}
 *   | {type: "again"}
 *   | {type: "stop"}
 *   | {type: "clear"}
 *   | {type: "accepted", job: string}
 *   | {type: "trouble", trouble: Trouble | null}
 *   | {type: "queued", position: number, eta_s?: number | null}
 *   | {type: "token", offset: number, text: string, id?: string | null, atMs?: number | null}
 *   | {type: "moved", attempt: number}
 *   | {type: "rewind", to: number, id?: string | null}
 *   | {type: "done", finish: string, usage?: {completion_tokens: number} | null, timings?: Timings | null}
 *   | {type: "failed", failure: Failure}} Event
 */

/** @typedef {{first_token_s?: number | null, total_s?: number | null}} Timings */

const FORMAT = 1;

/** @type {Answer} */
const BLANK_ANSWER = Object.freeze({
  status: "sending",
  text: "",
  ends: [],
  job: null,
  eventId: null,
  queue: null,
  moved: false,
  trouble: null,
  finish: null,
  tokens: 0,
  tokensPerS: null,
  pace: null,
  failure: null,
});

/** @type {Settings} */
export const DEFAULT_SETTINGS = Object.freeze({ system: "", temperature: null, maxTokens: null });

/** @returns {Chat} */
export function emptyChat() {
  return { exchanges: [], settings: DEFAULT_SETTINGS, page: null };
}

// ------------------------------------------------------------------------------------------------ questions about a chat

/** @param {Chat} chat @returns {Exchange | null} */
export function lastExchange(chat) {
  return chat.exchanges[chat.exchanges.length - 1] ?? null;
}

/** @param {Answer} answer */
export function isComing(answer) {
  return answer.status === "sending" || answer.status === "queued" || answer.status === "streaming";
}

/** True while an answer is on its way: nothing else can be asked, and there is something to stop. @param {Chat} chat */
export function isBusy(chat) {
  const last = lastExchange(chat);
  return last !== null && isComing(last.answer);
}

/** @param {Chat} chat @param {string} text */
export function canAsk(chat, text) {
  return chat.page !== null && !isBusy(chat) && text.trim() !== "";
}

/**
 * An exchange that brought no text is not told to the model: it would leave two questions in a row, which the chat form does
 * not know, and a question that was refused for its length would be refused with every later one.
 * @param {Exchange} exchange
 */
export function isRemembered(exchange) {
  return exchange.answer.text.trim() !== "";
}

/**
 * The settings as a request carries them: the server's default where the person set none, within the server's limits.
 * @param {Chat} chat
 */
export function effectiveSettings({ settings, page }) {
  if (page === null) throw new Error("settings were asked for before the server had named its limits; read /v1/page first");
  const { temperature, max_tokens: maxTokens } = page;
  return {
    system: settings.system.trim(),
    temperature: clamp(settings.temperature ?? temperature.default, temperature.min, temperature.max),
    maxTokens: clamp(Math.round(settings.maxTokens ?? maxTokens.default), 1, maxTokens.max),
  };
}

/** @param {number} value @param {number} low @param {number} high */
function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

/**
 * The body that asks for the answer in hand: system prompt, remembered exchanges, the open question.
 * @param {Chat} chat
 */
export function nextRequest(chat) {
  const open = lastExchange(chat);
  if (open === null || open.answer.status !== "sending") throw new Error("a request was asked for, but no question is open; ask one first");
  const { system, temperature, maxTokens } = effectiveSettings(chat);
  /** @type {{role: "system" | "user" | "assistant", content: string}[]} */
  const messages = system === "" ? [] : [{ role: "system", content: system }];
  for (const exchange of chat.exchanges.slice(0, -1).filter(isRemembered)) {
    messages.push({ role: "user", content: exchange.question }, { role: "assistant", content: exchange.answer.text });
  }
  messages.push({ role: "user", content: open.question });
  return { model: /** @type {Page} */ (chat.page).model, messages, temperature, max_tokens: maxTokens };
}

// ------------------------------------------------------------------------------------------------ what events do

/** @param {Chat} chat @param {Event} event @returns {Chat} */
export function reduce(chat, event) {
  switch (event.type) {
    case "page":
      return { ...chat, page: event.page };
    case "settings":
      return { ...chat, settings: { ...chat.settings, ...event.settings } };
    case "ask":
      return canAsk(chat, event.text) ? open(chat, chat.exchanges, event.text.trim()) : chat;
    case "again":
      return askAgain(chat);
    case "clear":
      return { ...chat, exchanges: [] };
    default:
      return changeAnswer(chat, event);
  }
}

/** @param {Chat} chat @param {readonly Exchange[]} before @param {string} question @returns {Chat} */
function open(chat, before, question) {
  return { ...chat, exchanges: [...before, { question, answer: BLANK_ANSWER }] };
}

/** @param {Chat} chat @returns {Chat} */
function askAgain(chat) {
  const last = lastExchange(chat);
  if (last === null || isComing(last.answer) || chat.page === null) return chat;
  return open(chat, chat.exchanges.slice(0, -1), last.question);
}

/**
 * The server's events meet the last answer only, and only while it is coming: what still arrives after a stop is dropped.
 * @param {Chat} chat @param {Event} event @returns {Chat}
 */
function changeAnswer(chat, event) {
  const last = lastExchange(chat);
  if (last === null || !isComing(last.answer)) return chat;
  const answer = answerAfter(last.answer, event);
  return answer === last.answer ? chat : { ...chat, exchanges: [...chat.exchanges.slice(0, -1), { ...last, answer }] };
}

/** @param {Answer} answer @param {Event} event @returns {Answer} */
function answerAfter(answer, event) {
  switch (event.type) {
    case "accepted":
      return { ...answer, job: event.job };
    case "trouble":
      return answer.trouble === event.trouble ? answer : { ...answer, trouble: event.trouble };
    case "queued":
      return { ...answer, status: "queued", queue: { position: event.position, etaS: event.eta_s ?? null } };
    case "token":
      return withToken(answer, event);
    case "moved":
      return { ...answer, moved: true };
    case "rewind":
      return rewound(answer, event.to, event.id ?? null);
    case "done":
      return finished(answer, event);
    case "stop":
      return ended(answer, "stopped");
    case "failed":
      return { ...ended(answer, "failed"), failure: event.failure };
    default:
      return answer;
  }
}

/** @param {Answer} answer @param {{offset: number, text: string, id?: string | null, atMs?: number | null}} token @returns {Answer} */
function withToken(answer, { offset, text, id = null, atMs = null }) {
  const next = answer.ends.length + 1;
  if (offset < next) return answer; // a repeat
  if (offset > next) throw new Error(`token ${offset} came where token ${next} was expected; the answer would have a hole`);
  const whole = answer.text + text;
  return {
    ...answer,
    status: "streaming",
    queue: null,
    text: whole,
    ends: [...answer.ends, whole.length],
    tokens: next,
    eventId: id ?? answer.eventId,
    pace: pacedTo(answer, atMs),
  };
}

/** A pace is measured from the first token on; an answer taken up after a reload has none. @param {Answer} answer @param {number | null} atMs */
function pacedTo(answer, atMs) {
  if (atMs === null) return null;
  if (answer.ends.length === 0) return { fromMs: atMs, toMs: atMs };
  return answer.pace === null ? null : { ...answer.pace, toMs: atMs };
}

/** @param {Answer} answer @param {number} to @param {string | null} id @returns {Answer} */
function rewound(answer, to, id) {
  if (to >= answer.ends.length) return answer;
  const ends = answer.ends.slice(0, to);
  return { ...answer, text: answer.text.slice(0, ends[to - 1] ?? 0), ends, tokens: to, eventId: id };
}

/** @param {Answer} answer @param {{finish: string, usage?: {completion_tokens: number} | null, timings?: Timings | null}} done @returns {Answer} */
function finished(answer, { finish, usage, timings }) {
  if (finish === "cancelled") return ended(answer, "stopped");
  if (finish !== "stop" && finish !== "length") {
    const failure = { code: finish, status: null, message: "", retryAfterS: null };
    return { ...ended(answer, "failed"), failure };
  }
  const tokens = usage?.completion_tokens || answer.tokens;
  const spanS = (timings?.total_s ?? 0) - (timings?.first_token_s ?? 0);
  const byServer = timings?.first_token_s && tokens > 1 && spanS > 0 ? (tokens - 1) / spanS : null;
  const over = ended(answer, "done");
  return { ...over, finish, tokens, tokensPerS: byServer ?? over.tokensPerS };
}

/** What is needed only while the answer comes is let go. @param {Answer} answer @param {Status} status @returns {Answer} */
function ended(answer, status) {
  const { pace, tokens } = answer;
  const spanS = pace === null ? 0 : (pace.toMs - pace.fromMs) / 1000;
  const tokensPerS = tokens > 1 && spanS > 0 ? (tokens - 1) / spanS : null;
  return { ...answer, status, queue: null, trouble: null, ends: [], eventId: null, pace: null, tokensPerS };
}

// ------------------------------------------------------------------------------------------------ across a reload

/** @param {Chat} chat @returns {string} */
export function saved(chat) {
  return JSON.stringify({ format: FORMAT, exchanges: chat.exchanges, settings: chat.settings });
}

/**
 * The chat that `saved` wrote. Text of another format, or of no format, gives an empty chat. An answer that the server had
 * not taken on before the reload cannot be found again and says so.
 * @param {string | null} text @returns {Chat}
 */
export function restored(text) {
  const kept = parsed(text);
  if (kept?.format !== FORMAT || !Array.isArray(kept.exchanges)) return emptyChat();
  const chat = { ...emptyChat(), exchanges: kept.exchanges.map(unpaced), settings: { ...DEFAULT_SETTINGS, ...kept.settings } };
  const last = lastExchange(chat);
  if (last === null || !isComing(last.answer) || last.answer.job !== null) return chat;
  return reduce(chat, { type: "failed", failure: { code: "not_taken_on", status: null, message: "", retryAfterS: null } });
}

/** The page's clock starts anew with a reload. @param {Exchange} exchange @returns {Exchange} */
function unpaced(exchange) {
  return { ...exchange, answer: { ...exchange.answer, pace: null } };
}

/** @param {string | null} text */
function parsed(text) {
  try {
    return JSON.parse(text ?? "null");
  } catch {
    return null; // not written by us: the same as nothing kept
  }
}
