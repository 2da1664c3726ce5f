// @ts-check
/**
 * The settings drawer and the key dialog.
 *
 * Decides what their fields show and when a change counts. Leaves limits and defaults to conversation.js, and keeping the key
 * and trying it out to chat.js.
 */

import { DEFAULT_SETTINGS, effectiveSettings } from "./conversation.js";
import { element } from "./view.js";

/** @typedef {import("./conversation.js").Chat} Chat */
/** @typedef {import("./conversation.js").Settings} Settings */

export class SettingsDrawer {
  #dialog = /** @type {HTMLDialogElement} */ (element("settings"));
  #system = /** @type {HTMLTextAreaElement} */ (element("system"));
  #temperature = /** @type {HTMLInputElement} */ (element("temperature"));
  #maxTokens = /** @type {HTMLInputElement} */ (element("max-tokens"));
  #change;

  /** @param {{change: (settings: Partial<Settings>) => void, changeKey: () => void}} acts */
  constructor({ change, changeKey }) {
    this.#change = change;
    this.#system.addEventListener("input", () => change({ system: this.#system.value }));
    this.#temperature.addEventListener("input", () => change({ temperature: this.#temperature.valueAsNumber }));
    this.#maxTokens.addEventListener("input", () => this.#changeMaxTokens());
    element("defaults").addEventListener("click", () => change(DEFAULT_SETTINGS));
    element("change-key").addEventListener("click", () => {
      this.#dialog.close();
      changeKey();
    });
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // a click beside the drawer
    });
  }

  /** @param {Chat} chat */
  open(chat) {
    if (chat.page === null) return;
    this.draw(chat);
    this.#dialog.showModal();
  }

  /** A field one is typing in keeps what one typed. @param {Chat} chat */
  draw(chat) {
    if (chat.page === null) return;
    const { temperature, maxTokens } = effectiveSettings(chat);
    const { max_tokens: tokenLimits, temperature: range } = chat.page;
    if (this.#system.value !== chat.settings.system) this.#system.value = chat.settings.system;
    Object.assign(this.#temperature, { min: range.min, max: range.max, value: temperature });
    element("temperature-value").textContent = String(temperature);
    this.#maxTokens.max = String(tokenLimits.max);
    if (document.activeElement !== this.#maxTokens || chat.settings.maxTokens === null) this.#maxTokens.value = String(maxTokens);
    element("max-tokens-hint").textContent = `From 1 to ${tokenLimits.max.toLocaleString("en")}. A token is about three quarters of a word.`;
    element("key-field").hidden = chat.page.public;
  }

  /** A number out of range is not taken on; closing the drawer shows the browser's own sentence first. */
  #changeMaxTokens() {
    if (this.#maxTokens.value !== "" && this.#maxTokens.validity.valid) this.#change({ maxTokens: this.#maxTokens.valueAsNumber });
  }
}

export class KeyDialog {
  #dialog = /** @type {HTMLDialogElement} */ (element("key-dialog"));
  #field = /** @type {HTMLInputElement} */ (element("key"));
  #error = element("key-error");

  /** @param {{use: (key: string) => Promise<string | null>}} acts use answers null when the key is good, else the sentence to show */
  constructor({ use }) {
    element("key-cancel").addEventListener("click", () => this.#dialog.close());
    element("key-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      const refusal = await use(this.#field.value.trim());
      if (refusal === null) this.#dialog.close();
      else this.#refuse(refusal);
    });
    this.#dialog.addEventListener("close", () => (this.#field.value = ""));
  }

  open() {
    this.#refuse("");
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  /** @param {string} sentence */
  #refuse(sentence) {
    this.#error.textContent = sentence;
    this.#error.hidden = sentence === "";
    this.#field.select();
  }
}
