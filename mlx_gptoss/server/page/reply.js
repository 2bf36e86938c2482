// One reply of the model while it arrives and afterwards: its reasoning, text, calls and what it cost.

import { make, show } from "./markdown.js";

export class Reply {
  constructor() {
    this.reasoning = "";
    this.text = "";
    this.calls = [];
    this.usage = null;
    this.finish = null;
    this.asked = performance.now();
    this.first = null; // when the first piece came, and the last
    this.last = null;
    this.answering = null; // when the reasoning was over
    this.element = make("article", "reply waiting");
    this.element.setAttribute("aria-busy", "true");
  }

  /** Takes in one chunk of the stream. */
  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    const { reasoning_content: more, reasoning = more, content, tool_calls: calls = [] } = choice.delta;
    if (!reasoning && !content && !calls?.length) return;
    this.last = performance.now();
    this.first ??= this.last;
    if (reasoning) this.reasoning += reasoning;
    if (content || calls?.length) this.answering ??= this.last;
    if (content) this.text += content;
    for (const call of calls ?? []) this.#addCall(call);
    this.#draw();
  }

  #addCall({ index, id, function: { name, arguments: more } = {} }) {
    const call = (this.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id = id ?? call.id;
    call.name = name ?? call.name;
    call.arguments += more ?? "";
  }

  /** Draws at most once a frame, however fast pieces come. */
  #draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.#drawNow();
    });
  }

  #drawNow() {
    this.element.classList.toggle("waiting", this.first === null && !this.ended);
    if (this.reasoning) this.#drawReasoning();
    if (this.text) {
      this.body ??= this.#append(make("div", "text"));
      show(this.body, this.text);
    }
    this.calls.forEach((call, place) => this.#drawCall(call, place));
    this.element.dispatchEvent(new CustomEvent("grown", { bubbles: true }));
  }

  #append(child) {
    this.element.append(child);
    return child;
  }

  #drawReasoning() {
    if (!this.thoughts) {
      this.thoughts = make("details", "reasoning", make("summary"), make("div", "thoughts"));
      this.element.prepend(this.thoughts);
    }
    const [summary, thoughts] = this.thoughts.children;
    const over = this.answering ?? (this.ended ? this.last : null);
    summary.textContent = over === null ? "Thinking" : `Thought for ${seconds(over - this.first)}`;
    this.thoughts.classList.toggle("live", over === null);
    show(thoughts, this.reasoning);
  }

  #drawCall(call, place) {
    call.element ??= this.#append(make("section", "call", make("h3", "", "Calls ", make("code")), make("pre")));
    const [title, shown] = call.element.children;
    title.lastChild.textContent = call.name || `function ${place + 1}`;
    shown.textContent = this.ended ? pretty(call.arguments) : call.arguments;
  }

  /** The reply is over. `note`: why, where it did not end by itself. */
  end(note = "") {
    this.ended = true;
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = null;
    this.#drawNow();
    this.element.removeAttribute("aria-busy");
    const length = this.finish === "length" ? "cut off: no more tokens were left" : "";
    const facts = [note || length, ...this.#costs()].filter(Boolean);
    if (facts.length) this.#append(make("p", "facts", facts.join(" · ")));
  }

  #costs() {
    if (!this.usage || this.first === null) return [];
    const { prompt_tokens: asked, completion_tokens: written, prompt_tokens_details: details } = this.usage;
    const cached = details?.cached_tokens;
    const lasted = (this.last - this.first) / 1000;
    const rate = written > 1 && lasted > 0 ? `${((written - 1) / lasted).toFixed(1)} tokens/s` : "";
    return [
      `${count(written)} tokens`,
      rate,
      `first after ${seconds(this.first - this.asked)}`,
      `prompt ${count(asked)}${cached ? `, ${count(cached)} of them cached` : ""}`,
    ];
  }

  /** The message that the model is shown when the conversation goes on; null when it said nothing whole. */
  message(complete) {
    const calls = complete && this.finish === "tool_calls" ? this.calls : [];
    if (!this.text && !calls.length) return null;
    return {
      role: "assistant",
      content: this.text || null,
      ...(this.reasoning && calls.length && { reasoning_content: this.reasoning }),
      ...(calls.length && {
        tool_calls: calls.map((call) => ({
          id: call.id,
          type: "function",
          function: { name: call.name, arguments: call.arguments },
        })),
      }),
    };
  }

  /** Fields for the results of the calls; `send` gets the messages and says whether they arrived. */
  askForResults(send) {
    const form = make("form", "results");
    for (const call of this.calls) {
      const field = make("textarea", "code");
      field.rows = 2;
      field.required = true;
      field.placeholder = "What the function returned";
      form.append(make("label", "", `Result of ${call.name}`, field));
    }
    form.append(make("button", "", this.calls.length > 1 ? "Send results" : "Send result"));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const fields = [...form.querySelectorAll("textarea")];
      const enable = (enabled) => [...form.elements].forEach((element) => (element.disabled = !enabled));
      enable(false);
      const results = fields.map((field, place) => ({
        role: "tool",
        tool_call_id: this.calls[place].id,
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
    return json; // not JSON: as the model wrote it
  }
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 2 : 0)} s`;
}

function count(number) {
  return number.toLocaleString("en");
}
