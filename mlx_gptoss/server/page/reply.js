// One reply of the model, during and after its stream: reasoning, text, function calls and statistics.

import { copyFrom, createButton, createElement } from "./elements.js";
import { describeCall } from "./hosted.js";
import { Markdown } from "./markdown.js";

export class Reply {
  /** key: returns the API key, for rendering. again: asks the question once more. */
  constructor(key, again) {
    this.key = key;
    this.again = again;
    this.reasoning = "";
    this.text = "";
    this.calls = [];
    this.usage = null;
    this.finishReason = null;
    this.askedAt = performance.now();
    this.firstAt = null; // time of the first and of the last delta
    this.lastAt = null;
    this.answerAt = null; // time of the first delta after the reasoning
    this.element = createElement("article", "reply waiting");
    this.element.setAttribute("aria-busy", "true");
  }

  /** Returns a reply that ended earlier, from the message that was kept of it. */
  static from(message, key, again) {
    const reply = new Reply(key, again);
    reply.text = message.content ?? "";
    reply.reasoning = message.reasoning_content ?? message.reasoning ?? "";
    reply.calls = (message.tool_calls ?? []).map(({ id, function: called }) => ({ id, ...called }));
    reply.stats = message.stats;
    reply.end();
    return reply;
  }

  /** Shows how much of the prompt has been read. */
  showProgress(done, total) {
    if (this.firstAt !== null) return;
    this.progress ??= this.#append(createElement("progress"));
    this.progress.setAttribute("aria-label", "Reading the conversation");
    this.progress.max = total;
    this.progress.value = done;
  }

  #showHosted(item) {
    const [title, details] = describeCall(item);
    const box = createElement("details", "hosted", createElement("summary", "", title), createElement("pre", "", details));
    this.element.insertBefore(box, this.body ?? null);
  }

  /** Adds one chunk of the stream. */
  add(chunk) {
    if (chunk.hosted) this.#showHosted(chunk.hosted);
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.finishReason = choice.finish_reason ?? this.finishReason;
    const { reasoning_content: more, reasoning = more, content, tool_calls: calls = [] } = choice.delta;
    if (!reasoning && !content && !calls?.length) return;
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.progress?.remove();
    if (reasoning) this.reasoning += reasoning;
    if (content || calls?.length) this.answerAt ??= this.lastAt;
    if (content) this.text += content;
    for (const call of calls ?? []) this.#addCall(call);
    this.#render();
  }

  #addCall({ index, id, function: { name, arguments: more } = {} }) {
    const call = (this.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id = id ?? call.id;
    call.name = name ?? call.name;
    call.arguments += more ?? "";
  }

  /** Renders at most once per frame, however fast chunks arrive. */
  #render() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#renderNow();
    });
  }

  #renderNow() {
    this.element.classList.toggle("waiting", this.firstAt === null && !this.ended);
    if (this.reasoning) this.#renderReasoning();
    if (this.text) {
      this.body ??= this.#append(createElement("div", "text"));
      this.shown ??= new Markdown(this.body, this.key);
      this.shown.update(this.text);
    }
    this.calls.forEach((call, index) => this.#renderCall(call, index));
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  #append(child) {
    this.element.append(child);
    return child;
  }

  #renderReasoning() {
    if (!this.reasoningElement) {
      const text = createElement("div", "reasoning-text");
      this.reasoningElement = createElement("details", "reasoning", createElement("summary"), text);
      this.element.prepend(this.reasoningElement);
    }
    const [summary, text] = this.reasoningElement.children;
    const endedAt = this.answerAt ?? (this.ended ? this.lastAt : null);
    const thought = endedAt === null ? "Thoughts" : `Thought for ${seconds(endedAt - this.firstAt)}`;
    summary.textContent = endedAt === null && !this.ended ? "Thinking" : thought;
    this.reasoningElement.classList.toggle("live", endedAt === null && !this.ended);
    this.shownReasoning ??= new Markdown(text, this.key);
    this.shownReasoning.update(this.reasoning);
  }

  #renderCall(call, index) {
    if (!call.element) {
      const heading = createElement("h2", "", "Calls ", createElement("code"));
      call.element = this.#append(createElement("section", "call", heading, createElement("pre")));
    }
    const [heading, json] = call.element.children;
    heading.lastChild.textContent = call.name || `function ${index + 1}`;
    json.textContent = this.ended ? pretty(call.arguments) : call.arguments;
  }

  /** Ends the reply. `note`: the reason, if it did not end by itself. */
  end(note = "") {
    this.ended = true;
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = null;
    this.#renderNow();
    this.element.removeAttribute("aria-busy");
    this.progress?.remove();
    const length = this.finishReason === "length" ? "cut off at the token limit" : "";
    this.stats ??= [note || length, ...this.#stats()].filter(Boolean).join(" · ");
    if (this.stats) this.#append(createElement("p", "stats", this.stats));
    if (this.text) this.#append(this.#actions());
  }

  #actions() {
    const copy = createButton("Copy", () => copyFrom(copy, this.text), { label: "Copy answer", className: "plain small" });
    const again = createButton("Regenerate", this.again, { className: "plain small" });
    return createElement("p", "actions", copy, again);
  }

  #stats() {
    if (!this.usage || this.firstAt === null) return [];
    const { prompt_tokens: prompt, completion_tokens: generated, prompt_tokens_details: details } = this.usage;
    const cached = details?.cached_tokens;
    const duration = (this.lastAt - this.firstAt) / 1000;
    const rate = generated > 1 && duration > 0 ? `${((generated - 1) / duration).toFixed(1)} tokens/s` : "";
    return [
      `${count(generated)} tokens`,
      rate,
      `first token after ${seconds(this.firstAt - this.askedAt)}`,
      `prompt ${count(prompt)}${cached ? `, ${count(cached)} cached` : ""}`,
    ];
  }

  /** Returns the message to send back in later requests, or null if there is no text and no complete call. */
  message(complete) {
    const calls = complete && this.finishReason === "tool_calls" ? this.calls : [];
    if (!this.text && !calls.length) return null;
    return {
      role: "assistant",
      content: this.text || null,
      ...(this.stats && { stats: this.stats }),
      ...(this.reasoning && { [calls.length ? "reasoning_content" : "reasoning"]: this.reasoning }),
      ...(calls.length && {
        tool_calls: calls.map((call) => ({
          id: call.id,
          type: "function",
          function: { name: call.name, arguments: call.arguments },
        })),
      }),
    };
  }

  /** Shows fields for the results of the calls. `send` is given the messages and returns whether it succeeded. */
  askForResults(send) {
    const form = createElement("form", "results");
    for (const call of this.calls) {
      const field = createElement("textarea", "code");
      field.rows = 2;
      field.required = true;
      field.placeholder = "What the function returned";
      form.append(createElement("label", "", `Result of ${call.name}`, field));
    }
    form.append(createElement("button", "", this.calls.length > 1 ? "Send results" : "Send result"));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const fields = [...form.querySelectorAll("textarea")];
      const enable = (enabled) => [...form.elements].forEach((element) => (element.disabled = !enabled));
      enable(false);
      const results = fields.map((field, index) => ({
        role: "tool",
        tool_call_id: this.calls[index].id,
        content: field.value,
      }));
      if (await send(results)) form.querySelector("button").remove();
      else enable(true);
    });
    this.#append(form);
    form.querySelector("textarea").focus();
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // not valid JSON: shown as the model wrote it
  }
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 2 : 0)} s`;
}

function count(number) {
  return number.toLocaleString("en");
}
