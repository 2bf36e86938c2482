// The page: asks, shows replies as they arrive, keeps the conversation. It is gone when the page is closed.

import { make } from "./markdown.js";
import { Reply } from "./reply.js";
import { Failure, get, post } from "./stream.js";

const $ = (selector) => document.querySelector(selector);
const question = $("#question");
const log = $("#log");
const scroller = $("#scroller");
const error = $("#error");
const unlock = $("#unlock");
const settings = $("#settings");

let model = null; // its name; null until the server has told it
let messages = []; // what was said, as the API takes it
let running = null; // the AbortController of the reply that is arriving
let chosen = { instructions: "", tools: "", temperature: "", max_tokens: "", ...remembered("settings") };

/** What this browser remembers under a name. The API key is kept for the tab alone. */
function remembered(name) {
  return JSON.parse(localStorage.getItem(`mlx-gptoss ${name}`) ?? "{}");
}

function remember(name, value) {
  localStorage.setItem(`mlx-gptoss ${name}`, JSON.stringify(value));
}

const key = () => sessionStorage.getItem("mlx-gptoss key") ?? "";

async function findModel() {
  try {
    model = (await get("v1/models", { key: key() })).data[0].id;
    $("#model").textContent = document.title = model.split("/").at(-1);
    complain(null);
  } catch (failure) {
    complain(failure);
  }
}

/** Says what went wrong, and asks for a key when that is it. null takes it back. */
function complain(failure) {
  if (failure && !(failure instanceof Failure)) console.error(failure);
  error.textContent = failure?.message ?? "";
  error.hidden = !failure;
  unlock.hidden = failure?.status !== 401;
  if (!unlock.hidden) $("#key").focus();
}

function body() {
  const instructions = chosen.instructions ? [{ role: "developer", content: chosen.instructions }] : [];
  return {
    model,
    messages: [...instructions, ...messages],
    stream: true,
    stream_options: { include_usage: true },
    reasoning_effort: $("#effort input:checked").value,
    ...(chosen.tools && { tools: JSON.parse(chosen.tools) }),
    ...(chosen.temperature !== "" && { temperature: Number(chosen.temperature) }),
    ...(chosen.max_tokens !== "" && { max_completion_tokens: Number(chosen.max_tokens) }),
  };
}

/** One reply to what was said and `added`. When it fails, nothing was said; returns whether it did not. */
async function ask(added) {
  if (model === null) await findModel();
  if (model === null || running) return false;
  const before = messages;
  messages = [...messages, ...added];
  const reply = new Reply();
  const controller = begin(reply);
  try {
    for await (const chunk of post("v1/chat/completions", body(), { key: key(), signal: controller.signal })) {
      reply.add(chunk);
    }
    reply.end();
    keep(reply, before, true);
    return true;
  } catch (failure) {
    const stopped = failure.name === "AbortError";
    if (stopped || reply.first !== null) {
      reply.end(stopped ? "stopped" : "broken off");
      keep(reply, before, false);
    } else {
      reply.element.remove();
      messages = before;
    }
    if (!stopped && controller === running) complain(failure);
    return stopped || reply.first !== null;
  } finally {
    if (controller === running) finish();
  }
}

function begin(reply) {
  running = new AbortController();
  complain(null);
  log.append(reply.element);
  $("#stop").hidden = false;
  $("#send").hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
  return running;
}

function finish() {
  running = null;
  $("#stop").hidden = true;
  $("#send").hidden = false;
  if (document.activeElement === document.body) question.focus();
}

/** Adds the reply to the conversation; a question that got none is taken out of it. */
function keep(reply, before, complete) {
  if (!reply.element.isConnected) return; // a new chat has begun
  const message = reply.message(complete);
  messages = message ? [...messages, message] : before;
  if (reply.usage) {
    const tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens;
    $("#used").textContent = `${tokens.toLocaleString("en")} tokens so far`;
  }
  if (message?.tool_calls) reply.askForResults(ask);
  stickToBottom();
}

async function send(text) {
  const asked = make("article", "question", text);
  $("#welcome").hidden = true;
  log.append(asked);
  question.value = "";
  fit();
  if (await ask([{ role: "user", content: text }])) return;
  asked.remove();
  $("#welcome").hidden = log.childElementCount > 0;
  question.value ||= text;
  fit();
}

function newChat() {
  running?.abort();
  finish();
  messages = [];
  log.replaceChildren();
  $("#welcome").hidden = false;
  $("#used").textContent = "";
  complain(null);
  question.focus();
}

/** The field is as high as its text. */
function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  $("#send").disabled = !question.value.trim();
}

let follows = true; // whether the reader is at the end, and wants to stay there
function stickToBottom() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
}

function openSettings() {
  for (const [name, value] of Object.entries(chosen)) settings.querySelector("form").elements[name].value = value;
  settings.querySelector(".complaint").hidden = true;
  settings.showModal();
}

function saveSettings(event) {
  event.preventDefault();
  const complaint = settings.querySelector(".complaint");
  const entered = Object.fromEntries(new FormData(event.target));
  complaint.hidden = isListOrNothing(entered.tools);
  complaint.textContent = "The functions must be a JSON list in OpenAI's form, or nothing.";
  if (!complaint.hidden) return;
  chosen = { ...entered, tools: entered.tools.trim() };
  remember("settings", chosen);
  settings.close();
}

function isListOrNothing(text) {
  try {
    return !text.trim() || Array.isArray(JSON.parse(text));
  } catch {
    return false;
  }
}

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (text && !running) send(text);
});
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("#composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !settings.open) running?.abort();
});
$("#stop").addEventListener("click", () => running?.abort());
$("#new-chat").addEventListener("click", newChat);
$("#open-settings").addEventListener("click", openSettings);
$("#close-settings").addEventListener("click", () => settings.close());
settings.querySelector("form").addEventListener("submit", saveSettings);
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => !running && send(example.textContent));
}
unlock.addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("mlx-gptoss key", $("#key").value);
  await findModel();
  if (unlock.hidden) question.focus();
});
scroller.addEventListener("scroll", () => {
  follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
});
log.addEventListener("grown", stickToBottom);
$("#effort").addEventListener("change", (event) => remember("effort", { value: event.target.value }));

const effort = remembered("effort").value;
if (effort) $(`#effort input[value="${effort}"]`).checked = true;
findModel();
