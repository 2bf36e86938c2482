// Markdown that grows, rendered by the server (POST v1/markdown): safe HTML, block by block.

import { copyFrom, createButton, createElement } from "./elements.js";
import { postJson } from "./stream.js";

const PAUSE = 150; // milliseconds between two requests for the same text

export class Markdown {
  #lines = []; // of the open block, the last one
  #finished = 0; // lines that are rendered for good
  #busy = false;
  #next = null; // text to render after the present request

  constructor(element, key) {
    this.element = element;
    this.key = key; // returns the API key
    this.open = createElement("div", "open-block");
    element.append(this.open);
  }

  /** Shows a text that begins like the one before. Resolves once no newer one waits. */
  async update(text) {
    this.#next = text;
    if (this.#busy) return;
    this.#busy = true;
    while (this.#next !== null) {
      const wanted = this.#next;
      this.#next = null;
      await this.#render(wanted);
      if (this.#next !== null) await new Promise((resolve) => setTimeout(resolve, PAUSE));
    }
    this.#busy = false;
    this.done?.();
  }

  async #render(text) {
    this.#lines = text.split("\n").slice(this.#finished);
    const rest = this.#lines.join("\n");
    if (!this.open.childElementCount) this.open.textContent = rest; // until the answer is here
    try {
      const { blocks } = await postJson("v1/markdown", { text: rest }, { key: this.key() });
      const last = blocks.pop();
      for (const block of blocks) {
        const element = this.#block(block);
        this.open.before(element);
        this.#finished += block.lines;
      }
      this.open.replaceChildren(...(last ? this.#block(last).childNodes : []));
    } catch {
      this.open.replaceChildren(rest); // as it is, if the server cannot render it
      this.open.classList.add("plain-text");
      return;
    }
    this.open.classList.remove("plain-text");
    this.#orderHeadings();
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  /** For screen readers: no level is left out below the page's own heading. */
  #orderHeadings() {
    let level = 1;
    for (const heading of this.element.querySelectorAll("h3, h4, h5, h6")) {
      level = Math.min(Number(heading.tagName[1]) - 1, level + 1);
      heading.setAttribute("aria-level", level);
    }
  }

  /** The HTML is safe: the server lets only a list of elements and attributes through. */
  #block({ html }) {
    const block = createElement("div", "block");
    block.innerHTML = html;
    for (const table of block.querySelectorAll("table")) {
      const box = createElement("div", "table");
      box.tabIndex = 0;
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", "Table");
      table.replaceWith(box);
      box.append(table);
    }
    for (const box of block.querySelectorAll("input")) box.setAttribute("aria-label", box.checked ? "Done" : "To do");
    for (const code of block.querySelectorAll("pre")) this.#frame(code);
    return block;
  }

  #frame(code) {
    const language = /language-(\S+)/.exec(code.firstElementChild?.className ?? "")?.[1] ?? "text";
    const button = createButton("Copy", () => copyFrom(button, code.textContent), { className: "plain copy" });
    const frame = createElement("div", "code-block", createElement("span", "language", language), button);
    code.replaceWith(frame);
    code.tabIndex = 0;
    code.setAttribute("role", "region");
    code.setAttribute("aria-label", `Code, ${language}`);
    frame.append(code);
  }
}
