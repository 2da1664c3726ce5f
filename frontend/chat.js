// @ts-check
/**
 * The chat page: joins the state (conversation.js), its drawing (view.js, dialogs.js) and the server (mixtral-client.js).
 *
 * Decides what keys and buttons do, what is kept across a reload, and how long an unreachable server is waited for. Everything
 * kept is kept in the tab's sessionStorage: the chat with its settings, and the key where the server asks for one.
 */

import { MixtralClient, MixtralError } from "../client/mixtral-client.js";
import { canAsk, isBusy, lastExchange, nextRequest, reduce, restored, saved } from "./conversation.js";
import { KeyDialog, SettingsDrawer } from "./dialogs.js";
import { element, View } from "./view.js";
import { explain } from "./words.js";

/** @typedef {import("./conversation.js").Event} ChatEvent */
/** @typedef {import("./conversation.js").Failure} Failure */

const CHAT = "mixtral.chat";
const KEY = "mixtral.key";
const PATIENCE = { giveUpAfterMs: 8_000, resumeForMs: 60_000 }; // a person is looking on: say so sooner than a program would

const question = /** @type {HTMLTextAreaElement} */ (element("question"));
let chat = restored(sessionStorage.getItem(CHAT));
/** @type {AbortController | null} ends the reading of the answer that is coming */
let reading = null;
let isDrawingDue = false;

const view = new View({ again, remedy });
const settings = new SettingsDrawer({ change: changeSettings, changeKey: () => keyDialog.open() });
const keyDialog = new KeyDialog({ use: useKey });

// ------------------------------------------------------------------------------------------------ state, drawing, keeping

/** @param {ChatEvent} event */
function dispatch(event) {
  const before = chat;
  chat = reduce(chat, event);
  if (chat === before) return;
  if (event.type !== "token") keep(); // tokens come fast; pagehide keeps them
  if (isDrawingDue) return;
  isDrawingDue = true;
  requestAnimationFrame(draw);
}

function draw() {
  isDrawingDue = false;
  view.draw(chat, question.value);
}

function keep() {
  try {
    sessionStorage.setItem(CHAT, saved(chat));
  } catch {
    sessionStorage.removeItem(CHAT); // better none than a chat that ends somewhere in its middle
    notice("This chat has become too long to be kept across a reload.");
  }
}

/** @param {string} words "" takes it away */
function notice(words) {
  element("notice").textContent = words;
  element("notice").hidden = words === "";
}

// ------------------------------------------------------------------------------------------------ acts

function ask(text = question.value) {
  if (!canAsk(chat, text)) return;
  if (lacksKey()) return keyDialog.open(); // the question stays where it was written
  dispatch({ type: "ask", text });
  question.value = "";
  fitQuestion();
  view.showEnd();
  fetchAnswer();
}

function again() {
  dispatch({ type: "again" });
  fetchAnswer();
}

function stop() {
  dispatch({ type: "stop" });
  reading?.abort(); // the client cancels the job
  reading = null;
}

function newChat() {
  stop();
  dispatch({ type: "clear" });
  notice("");
  question.focus();
}

/** @param {Partial<import("./conversation.js").Settings>} changed */
function changeSettings(changed) {
  dispatch({ type: "settings", settings: changed });
  settings.draw(chat);
}

/** @param {import("./words.js").Remedy} kind */
function remedy(kind) {
  const acts = { again, clear: newChat, key: () => keyDialog.open(), settings: () => settings.open(chat) };
  acts[kind]();
}

/**
 * Keep the key if the server knows it; go on with the question that failed for want of one.
 * @param {string} key @returns {Promise<string | null>} why it cannot be used
 */
async function useKey(key) {
  try {
    await new MixtralClient({ apiKey: key, patience: PATIENCE }).models();
  } catch (error) {
    const { what, todo } = explain(failureOf(error), false);
    return `${what} ${todo}`;
  }
  sessionStorage.setItem(KEY, key);
  if (["invalid_api_key", "not_allowed"].includes(lastExchange(chat)?.answer.failure?.code ?? "")) again();
  else fetchAnswer();
  return null;
}

function lacksKey() {
  return chat.page?.public === false && sessionStorage.getItem(KEY) === null;
}

// ------------------------------------------------------------------------------------------------ the server

/** Ask for the answer in hand, or go on reading the one that a reload interrupted. */
async function fetchAnswer() {
  const answer = lastExchange(chat)?.answer;
  if (answer === undefined || !isBusy(chat) || reading !== null) return;
  const mine = new AbortController();
  reading = mine;
  const { signal } = mine;
  const client = new MixtralClient({ apiKey: sessionStorage.getItem(KEY) ?? undefined, fetch: watchedFetch(signal), patience: PATIENCE });
  const events =
    answer.job === null
      ? client.stream(nextRequest(chat), { signal, onJob: (job) => signal.aborted || dispatch({ type: "accepted", job }) })
      : client.follow(answer.job, { after: answer.eventId ?? "", signal });
  try {
    for await (const event of events) {
      if (signal.aborted) return;
      dispatch(/** @type {ChatEvent} */ ({ ...event, type: event.event, atMs: performance.now() }));
    }
  } catch (error) {
    if (!signal.aborted) dispatch({ type: "failed", failure: failureOf(error) });
  } finally {
    if (reading === mine) reading = null;
  }
}

/**
 * fetch that tells the page when the client is about to try again, and when that helped.
 * @param {AbortSignal} signal @returns {typeof fetch}
 */
function watchedFetch(signal) {
  /** @param {import("./conversation.js").Trouble | null} trouble */
  const report = (trouble) => signal.aborted || dispatch({ type: "trouble", trouble });
  return async (url, init) => {
    try {
      const response = await fetch(url, init);
      report(response.status === 429 ? "busy" : response.status >= 502 ? "away" : null);
      return response;
    } catch (error) {
      report("connection_lost");
      throw error;
    }
  };
}

/** @param {unknown} error @returns {Failure} */
function failureOf(error) {
  if (!(error instanceof MixtralError)) console.error(error); // ours to mend: the console has the place
  const { code = "page_error", status = null, message, retryAfterMs = null } = /** @type {MixtralError} */ (error);
  return { code, status, message, retryAfterS: retryAfterMs === null ? null : retryAfterMs / 1000 };
}

// ------------------------------------------------------------------------------------------------ keys, buttons, start

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  view.drawComposer(chat, question.value);
}

function listen() {
  element("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  question.addEventListener("input", fitQuestion);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && document.querySelector("dialog[open]") === null) stop();
  });
  element("stop").addEventListener("click", stop);
  element("new-chat").addEventListener("click", newChat);
  element("open-settings").addEventListener("click", () => settings.open(chat));
  element("summary").addEventListener("click", () => settings.open(chat));
  element("wishes").addEventListener("click", (event) => {
    if (event.target instanceof HTMLButtonElement) ask(event.target.textContent ?? "");
  });
  addEventListener("pagehide", keep);
  document.addEventListener("visibilitychange", () => document.visibilityState === "hidden" && keep());
}

async function start() {
  listen();
  draw();
  try {
    const answer = await fetch("/v1/page", { signal: AbortSignal.timeout(10_000), cache: "no-store" });
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    const page = await answer.json();
    dispatch({ type: "page", page });
    view.drawPage(page);
  } catch (error) {
    return notice(`The server does not say what it serves (${/** @type {Error} */ (error).message}). Check that it is running, then reload the page.`);
  }
  if (lacksKey()) keyDialog.open();
  else fetchAnswer();
}

start();
