// @ts-check
/**
 * What the page says about an answer, in sentences: where it stands, how it ended, what went wrong and what to do about it.
 *
 * Decides wording and which remedy a failure offers. Leaves the state to conversation.js and buttons to view.js. Pure.
 */

/** @typedef {import("./conversation.js").Answer} Answer */
/** @typedef {import("./conversation.js").Failure} Failure */
/** @typedef {"again" | "key" | "clear" | "settings"} Remedy  what the button beside a failure does */

const TROUBLES = {
  connection_lost: "The server does not answer; trying again…",
  busy: "The server is busy; trying again…",
  away: "The server is away for a moment; trying again…",
};

/** Where an answer that is coming stands, or "" when its own text says enough. @param {Answer} answer @returns {string} */
export function standing({ status, queue, moved, trouble }) {
  if (trouble !== null) return TROUBLES[trouble];
  if (status === "sending") return "Sending…";
  if (status === "queued" && queue !== null) return inQueue(queue);
  return moved ? "Moved to another worker; nothing was lost." : "";
}

/** @param {{position: number, etaS: number | null}} queue */
function inQueue({ position, etaS }) {
  const place = position > 1 ? `Waiting: number ${position} in the queue` : position === 1 ? "Waiting: next in the queue" : "A worker has it";
  return etaS === null ? `${place}…` : `${place}, ${about(etaS)}…`;
}

/** A waiting time as a person would say it. @param {number} seconds */
export function about(seconds) {
  if (seconds < 1.5) return "about a second";
  if (seconds < 90) return `about ${Math.round(seconds)} seconds`;
  if (seconds < 5400) return `about ${Math.round(seconds / 60)} minutes`;
  return `about ${Math.round(seconds / 3600)} hours`;
}

/** How an answer ended, as one line. @param {Answer} answer @returns {string} */
export function figures({ status, tokens, tokensPerS, finish }) {
  if (tokens === 0 && status === "stopped") return "Stopped before the first word";
  if (tokens === 0 && status === "done") return "The model ended without a word";
  const count = tokens === 1 ? "1 token" : `${tokens.toLocaleString("en")} tokens`;
  const said = tokens > 0 ? [count] : [];
  if (tokensPerS !== null) said.push(`${tokensPerS < 10 ? tokensPerS.toFixed(1) : Math.round(tokensPerS)} tokens/s`);
  if (status === "stopped") said.push("stopped");
  if (finish === "length") said.push("cut at the token limit, which Settings can raise");
  return said.join(" · ");
}

/**
 * A failure in words: what happened, what to do, and the button that does it.
 * @param {Failure} failure @param {boolean} isPublic visitors need no key here
 * @returns {{what: string, todo: string, remedy: Remedy, button: string}}
 */
export function explain(failure, isPublic) {
  const said = sentence(failure.message);
  const soon = failure.retryAfterS === null ? "in a moment" : `in ${about(failure.retryAfterS)}`;
  const again = { remedy: /** @type {Remedy} */ ("again"), button: "Try again" };
  switch (failure.code) {
    case "invalid_api_key":
      return isPublic
        ? { what: "The server no longer knows this browser.", todo: "Reload the page, then try again.", ...again }
        : { what: "The server does not know this key.", todo: "Enter a client key of this server.", remedy: "key", button: "Enter a key" };
    case "not_allowed":
      return { what: said || "This key may not chat here.", todo: "Enter a client key of this server.", remedy: "key", button: "Enter a key" };
    case "context_length_exceeded":
      return { what: said || "The chat is longer than the model can read.", todo: "Ask for a shorter answer in Settings, or begin a new chat.", remedy: "clear", button: "New chat" };
    case "queue_full":
      return { what: said || "The queue is full.", todo: `Your question was not taken on. Try again ${soon}.`, ...again };
    case "rate_limit_exceeded":
      return { what: said || "That was more than the server allows at once.", todo: `Try again ${soon}.`, ...again };
    case "connection_lost":
      return { what: "The server cannot be reached.", todo: "Check that it is running and that you are online, then try again.", ...again };
    case "redis_unavailable":
    case "unavailable":
      return { what: said || "The server cannot reach its queue.", todo: `It usually comes back by itself. Try again ${soon}.`, ...again };
    case "job_not_found":
      return { what: "The server no longer holds this answer.", todo: "Ask for it again.", ...again };
    case "expired":
      return { what: "No worker took the question in time.", todo: "Check that a worker is running, then try again.", ...again };
    case "not_taken_on":
      return { what: "The page was closed before the server had the question.", todo: "Send it again.", ...again };
    case "invalid_request":
      return { what: said || "The server refused the request.", todo: "Change what it names, then try again.", remedy: "settings", button: "Settings" };
    default:
      return { what: said || "The answer could not be finished.", todo: "Try again.", ...again };
  }
}

/** Messages on the wire begin in lower case and end without a stop. @param {string} message */
function sentence(message) {
  const text = message.trim();
  if (text === "") return "";
  return text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");
}
