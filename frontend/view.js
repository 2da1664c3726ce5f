// @ts-check
/**
 * Draws a chat into the page, keeps its end in sight while one reads there, and tells screen readers what changed.
 *
 * Decides what is visible when. Leaves the state to conversation.js, sentences to words.js, and what a press of a button does
 * to chat.js. Whatever a model or a person wrote becomes text nodes, never markup.
 */

import { canAsk, effectiveSettings, isBusy, isComing, isRemembered, lastExchange } from "./conversation.js";
import { explain, figures, standing } from "./words.js";

/** @typedef {import("./conversation.js").Chat} Chat */
/** @typedef {import("./conversation.js").Exchange} Exchange */

const NEAR_END_PX = 48; // closer to the end than this counts as reading there
const COPIED_MS = 1600;

/**
 * What the view asks for when a button in the chat is pressed.
 * @typedef {object} Acts
 * @property {() => void} again
 * @property {(remedy: import("./words.js").Remedy) => void} remedy
 */

/** @template {HTMLElement} E @param {string} id @returns {E} */
export function element(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element with id "${id}"; index.html and the scripts are of different versions`);
  return /** @type {E} */ (found);
}

export class View {
  #scroller = element("scroller");
  #list = element("exchanges");
  #status = element("status");
  #toEnd = element("to-end");
  /** @type {Row[]} */
  #rows = [];
  #isFollowing = true;
  #acts;

  /** @param {Acts} acts */
  constructor(acts) {
    this.#acts = acts;
    this.#scroller.addEventListener("scroll", () => this.#noteScroll());
    this.#toEnd.addEventListener("click", () => this.showEnd());
    new ResizeObserver(() => this.#keepEnd()).observe(this.#scroller);
  }

  /** @param {Chat} chat @param {string} draft what stands in the question field */
  draw(chat, draft) {
    chat.exchanges.forEach((exchange, index) => this.#drawRow(chat, exchange, index));
    for (const row of this.#rows.splice(chat.exchanges.length)) row.node.remove();
    element("welcome").hidden = chat.exchanges.length > 0;
    element("new-chat").hidden = chat.exchanges.length === 0;
    this.drawComposer(chat, draft);
    this.#announce(chat);
    this.#keepEnd();
  }

  /** @param {Chat} chat @param {string} draft */
  drawComposer(chat, draft) {
    const send = /** @type {HTMLButtonElement} */ (element("send"));
    const stop = element("stop");
    const stopHadFocus = document.activeElement === stop;
    send.disabled = !canAsk(chat, draft);
    send.hidden = isBusy(chat);
    stop.hidden = !isBusy(chat);
    if (stop.hidden && stopHadFocus) element("question").focus();
    element("summary").textContent = chat.page === null ? "" : settingsLine(chat);
    for (const button of element("wishes").querySelectorAll("button")) button.disabled = chat.page === null;
  }

  /** What the server says of itself. @param {import("./conversation.js").Page} page */
  drawPage({ title, model, description }) {
    document.title = title;
    element("title").textContent = title;
    element("model").textContent = model;
    element("about").textContent = description;
  }

  showEnd() {
    this.#isFollowing = true;
    this.#keepEnd();
  }

  /** @param {Chat} chat @param {Exchange} exchange @param {number} index */
  #drawRow(chat, exchange, index) {
    if (this.#rows[index] === undefined) {
      const row = new Row(this.#acts);
      this.#rows[index] = row;
      this.#list.append(row.node);
    }
    this.#rows[index].draw(exchange, index === chat.exchanges.length - 1, chat.page?.public ?? true);
  }

  /** One region speaks: where an answer stands, then the answer as a whole. Single tokens would be noise. @param {Chat} chat */
  #announce(chat) {
    const last = lastExchange(chat);
    const words = last === null ? "" : spoken(last.answer, chat.page?.public ?? true);
    if (this.#status.textContent !== words) this.#status.textContent = words;
  }

  #noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.#isFollowing = scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
    this.#toEnd.hidden = this.#isFollowing || this.#rows.length === 0;
  }

  #keepEnd() {
    if (this.#isFollowing && this.#rows.length > 0) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#noteScroll();
  }
}

/** The elements of one exchange. */
class Row {
  /** @type {Record<string, HTMLElement>} */
  #parts = {};
  #drawn = "";
  /** @type {Exchange | null} */
  #exchange = null;

  /** @param {Acts} acts */
  constructor(acts) {
    const template = /** @type {HTMLTemplateElement} */ (element("exchange"));
    const copy = /** @type {DocumentFragment} */ (template.content.cloneNode(true));
    this.node = /** @type {HTMLElement} */ (copy.firstElementChild);
    for (const part of this.node.querySelectorAll("[data-part]")) {
      this.#parts[/** @type {HTMLElement} */ (part).dataset.part ?? ""] = /** @type {HTMLElement} */ (part);
    }
    this.#parts.again.addEventListener("click", () => acts.again());
    this.#parts.remedy.addEventListener("click", () => acts.remedy(/** @type {any} */ (this.#parts.remedy.dataset.remedy)));
    this.#parts.copy.addEventListener("click", () => this.#copyAnswer());
  }

  /** @param {Exchange} exchange @param {boolean} isLast @param {boolean} isPublic */
  draw(exchange, isLast, isPublic) {
    const circumstances = `${isLast} ${isPublic}`;
    if (exchange === this.#exchange && circumstances === this.#drawn) return;
    this.#exchange = exchange;
    this.#drawn = circumstances;
    const { question, answer } = exchange;
    const parts = this.#parts;
    const isForgotten = !isLast && !isRemembered(exchange);
    this.node.className = `exchange${isComing(answer) ? " coming" : ""}${isForgotten ? " forgotten" : ""}`;
    parts.answer.dataset.state = answer.status;
    grow(parts.question, question);
    parts["left-out"].hidden = !isForgotten;
    grow(parts.text, answer.text);
    show(parts.standing, parts["standing-words"], isComing(answer) ? standing(answer) : "");
    parts.foot.hidden = isComing(answer);
    parts.figures.textContent = isComing(answer) ? "" : figures(answer);
    parts.copy.hidden = answer.text === "";
    parts.again.hidden = !isLast;
    parts.failure.hidden = answer.failure === null;
    if (answer.failure !== null) this.#drawFailure(explain(answer.failure, isPublic), isLast);
  }

  /** @param {ReturnType<typeof explain>} words @param {boolean} isLast */
  #drawFailure({ what, todo, remedy, button }, isLast) {
    const parts = this.#parts;
    parts["failure-what"].textContent = what;
    parts["failure-todo"].textContent = isLast ? todo : "";
    parts.remedy.textContent = button;
    parts.remedy.dataset.remedy = remedy;
    parts.remedy.hidden = !isLast;
    parts.again.hidden = !isLast || remedy === "again";
  }

  async #copyAnswer() {
    const words = this.#parts["copy-words"];
    words.textContent = (await copied(this.#parts.text)) ? "Copied" : "Press Ctrl+C";
    setTimeout(() => (words.textContent = "Copy"), COPIED_MS);
  }
}

/** Bring an element's text to `text`, adding only what is new, so that a reader's selection survives. @param {HTMLElement} node @param {string} text */
function grow(node, text) {
  const shown = node.firstChild instanceof Text ? node.firstChild : null;
  if (shown === null || !text.startsWith(shown.data)) node.textContent = text;
  else if (text.length > shown.data.length) shown.appendData(text.slice(shown.data.length));
}

/** @param {HTMLElement} box @param {HTMLElement} inner @param {string} words */
function show(box, inner, words) {
  box.hidden = words === "";
  if (inner.textContent !== words) inner.textContent = words;
}

/** @param {import("./conversation.js").Answer} answer @param {boolean} isPublic */
function spoken(answer, isPublic) {
  if (isComing(answer)) return standing(answer) || "The answer is coming.";
  if (answer.failure === null) return `${answer.status === "stopped" ? "Stopped" : "Answer"}: ${answer.text}`;
  const { what, todo } = explain(answer.failure, isPublic);
  return `${what} ${todo}`;
}

/** @param {Chat} chat */
function settingsLine(chat) {
  const { system, temperature, maxTokens } = effectiveSettings(chat);
  return `${system === "" ? "" : "System prompt · "}Temperature ${temperature} · Up to ${maxTokens} tokens`;
}

/**
 * Put an element's text on the clipboard. Where the browser keeps the clipboard to itself (plain http on another host), the
 * old command is tried, and failing that the text is left selected. @param {HTMLElement} node
 */
async function copied(node) {
  try {
    await navigator.clipboard.writeText(node.textContent ?? "");
    return true;
  } catch {
    getSelection()?.selectAllChildren(node);
    return document.execCommand("copy");
  }
}
