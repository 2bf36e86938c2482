// The list of conversations: search, open, rename, delete, export and import.

import { createButton, createElement, download } from "./elements.js";
import { onOthersChange, tellOthers } from "./store.js";
import { fromJson, MAX_FILE_BYTES, toJson, toMarkdown } from "./transfer.js";

const $ = (selector) => document.querySelector(selector);
const UNDO_TIME = 8000;

export class Sidebar {
  #shown = 0; // counts refreshes, so that an older one does not overwrite a newer one

  /** open, fresh: what to do when a conversation is chosen, and when the open one is deleted. */
  constructor(store, { open, fresh, fail }) {
    Object.assign(this, { store, open, fresh, fail, current: null });
    this.panel = $("#sidebar");
    $("#search").addEventListener("input", () => this.refresh());
    $("#toggle-sidebar").addEventListener("click", () => this.toggle());
    $("#close-sidebar").addEventListener("click", () => this.toggle(false));
    $("#export-all").addEventListener("click", () => this.#exportAll());
    $("#import").addEventListener("click", () => $("#import-file").click());
    $("#import-file").addEventListener("change", (event) => this.#import(event.target));
    this.panel.addEventListener("keydown", (event) => event.key === "Escape" && this.toggle(false));
    onOthersChange(() => this.refresh());
    if (!store.isKept) $("#not-kept").hidden = false;
    this.refresh();
  }

  toggle(open = this.panel.hidden) {
    this.panel.hidden = !open;
    $("#toggle-sidebar").setAttribute("aria-expanded", String(open));
    (open ? $("#search") : $("#toggle-sidebar")).focus();
  }

  async refresh() {
    const turn = ++this.#shown;
    const words = $("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = (await this.store.all()).sort((a, b) => b.updated - a.updated);
    if (turn !== this.#shown) return;
    const found = all.filter((each) => words.every((word) => textOf(each).includes(word)));
    $("#conversations").replaceChildren(...found.map((each) => this.#item(each)));
    $("#none").hidden = found.length > 0;
    $("#none").textContent = all.length ? "Nothing found" : "Conversations appear here.";
    $("#export-all").disabled = !all.length;
  }

  #item(conversation) {
    const name = createButton(conversation.title, () => this.#choose(conversation.id), { className: "title" });
    if (conversation.id === this.current) name.setAttribute("aria-current", "true");
    const label = (action) => ({ label: `${action} “${conversation.title}”`, className: "plain small" });
    const item = createElement("li", "", name);
    const actions = createElement(
      "span",
      "actions",
      createButton("Rename", () => this.#rename(item, conversation), label("Rename")),
      createButton("Export", () => exportOne(conversation), label("Export")),
      createButton("Delete", () => this.#delete(conversation), label("Delete")),
    );
    item.append(actions);
    return item;
  }

  async #choose(id) {
    const conversation = await this.store.get(id);
    if (!conversation) return this.refresh();
    if (matchMedia("(max-width: 60rem)").matches) this.toggle(false);
    this.open(conversation);
  }

  /** Marks the open conversation. */
  mark(id) {
    this.current = id;
    this.refresh();
  }

  #rename(item, conversation) {
    const field = createElement("input");
    field.value = conversation.title;
    field.maxLength = 200;
    field.setAttribute("aria-label", "New title");
    const form = createElement("form", "rename", field, createElement("button", "small", "Save"));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const stored = await this.store.get(conversation.id);
      if (stored && field.value.trim()) {
        stored.title = field.value.trim();
        await this.store.put(stored);
        if (stored.id === this.current) this.open(stored, { quietly: true });
        tellOthers();
      }
      this.refresh();
    });
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.refresh();
    });
    item.replaceChildren(form);
    field.select();
  }

  async #delete(conversation) {
    await this.store.remove(conversation.id);
    tellOthers();
    if (conversation.id === this.current) this.fresh();
    this.refresh();
    const undo = createButton("Undo", async () => {
      await this.store.put({ ...conversation, version: 0 });
      tellOthers();
      toast.hidden = true;
      this.refresh();
    });
    const toast = $("#toast");
    toast.replaceChildren(`Deleted “${conversation.title}”`, undo);
    toast.hidden = false;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (toast.hidden = true), UNDO_TIME);
  }

  async #exportAll() {
    download("conversations.json", "application/json", toJson(await this.store.all()));
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      if (file.size > MAX_FILE_BYTES) throw new Error("This file is too large.");
      for (const conversation of fromJson(await file.text())) await this.store.put(conversation);
      this.fail(null);
      tellOthers();
    } catch (error) {
      this.fail(error);
    }
    this.refresh();
  }
}

function exportOne(conversation) {
  const name = conversation.title.replace(/[^\p{L}\p{N}._-]+/gu, " ").trim().slice(0, 60) || "conversation";
  download(`${name}.md`, "text/markdown", toMarkdown(conversation));
}

function textOf({ title, messages }) {
  return [title, ...messages.map((message) => message.content ?? "")].join("\n").toLowerCase();
}
