// The chat page: sends messages, shows replies as they stream in and keeps the conversation until the page is closed.

import { createElement } from "./markdown.js";
import { Reply } from "./reply.js";
import { ApiError, getJson, postStream } from "./stream.js";

const $ = (selector) => document.querySelector(selector);
const question = $("#question");
const log = $("#log");
const scroller = $("#scroller");
const errorBox = $("#error");
const keyForm = $("#unlock");
const dialog = $("#settings");

let model = null; // the model's name; null until the server has been asked
let messages = []; // the conversation in the format of chat completions
let running = null; // the AbortController of the reply in progress
let settings = { instructions: "", tools: "", temperature: "", max_tokens: "", ...load("settings") };

/** Returns what this browser has stored under a name. The API key is kept for this tab only. */
function load(name) {
  return JSON.parse(localStorage.getItem(`mlx-gptoss ${name}`) ?? "{}");
}

function store(name, value) {
  localStorage.setItem(`mlx-gptoss ${name}`, JSON.stringify(value));
}

const apiKey = () => sessionStorage.getItem("mlx-gptoss key") ?? "";

async function findModel() {
  try {
    model = (await getJson("v1/models", { key: apiKey() })).data[0].id;
    $("#model").textContent = document.title = model.split("/").at(-1);
    showError(null);
  } catch (error) {
    showError(error);
  }
}

/** Shows an error, with the form for the API key if the key is the problem. null hides the error. */
function showError(error) {
  if (error && !(error instanceof ApiError)) console.error(error);
  errorBox.textContent = error?.message ?? "";
  errorBox.hidden = !error;
  keyForm.hidden = error?.status !== 401;
  if (!keyForm.hidden) $("#key").focus();
}

function requestBody() {
  const instructions = settings.instructions ? [{ role: "developer", content: settings.instructions }] : [];
  return {
    model,
    messages: [...instructions, ...messages],
    stream: true,
    stream_options: { include_usage: true },
    reasoning_effort: $("#effort input:checked").value,
    ...(settings.tools && { tools: JSON.parse(settings.tools) }),
    ...(settings.temperature !== "" && { temperature: Number(settings.temperature) }),
    ...(settings.max_tokens !== "" && { max_completion_tokens: Number(settings.max_tokens) }),
  };
}

/**
 * Appends messages to the conversation and streams the reply. Returns whether any of it arrived; if not, the messages
 * are removed again.
 */
async function ask(added) {
  if (model === null) await findModel();
  if (model === null || running) return false;
  const before = messages;
  messages = [...messages, ...added];
  const reply = new Reply();
  const controller = begin(reply);
  try {
    const options = { key: apiKey(), signal: controller.signal };
    for await (const chunk of postStream("v1/chat/completions", requestBody(), options)) reply.add(chunk);
    reply.end();
    keep(reply, before, true);
    return true;
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (stopped || reply.firstAt !== null) {
      reply.end(stopped ? "stopped" : "interrupted");
      keep(reply, before, false);
    } else {
      reply.element.remove();
      messages = before;
    }
    if (!stopped && controller === running) showError(error);
    return stopped || reply.firstAt !== null;
  } finally {
    if (controller === running) finish();
  }
}

function begin(reply) {
  running = new AbortController();
  showError(null);
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

/** Appends a reply to the conversation. If it has no content, its question is removed from the conversation. */
function keep(reply, before, complete) {
  if (!reply.element.isConnected) return; // a new chat was started in the meantime
  const message = reply.message(complete);
  messages = message ? [...messages, message] : before;
  if (reply.usage) {
    const tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens;
    $("#used").textContent = `${tokens.toLocaleString("en")} tokens so far`;
  }
  if (message?.tool_calls) reply.askForResults(ask);
  scrollToEnd();
}

async function send(text) {
  const bubble = createElement("article", "question", text);
  $("#welcome").hidden = true;
  log.append(bubble);
  question.value = "";
  resizeInput();
  if (await ask([{ role: "user", content: text }])) return;
  bubble.remove();
  $("#welcome").hidden = log.childElementCount > 0;
  question.value ||= text;
  resizeInput();
}

function newChat() {
  running?.abort();
  finish();
  messages = [];
  log.replaceChildren();
  $("#welcome").hidden = false;
  $("#used").textContent = "";
  showError(null);
  question.focus();
}

/** Makes the input field as high as its text. */
function resizeInput() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  $("#send").disabled = !question.value.trim();
}

let atEnd = true; // whether the reader has scrolled to the end; if so, new text keeps the end in view
function scrollToEnd() {
  if (atEnd) scroller.scrollTop = scroller.scrollHeight;
}

function openSettings() {
  for (const [name, value] of Object.entries(settings)) dialog.querySelector("form").elements[name].value = value;
  dialog.querySelector(".form-error").hidden = true;
  dialog.showModal();
}

function saveSettings(event) {
  event.preventDefault();
  const formError = dialog.querySelector(".form-error");
  const entered = Object.fromEntries(new FormData(event.target));
  formError.hidden = isListOrEmpty(entered.tools);
  formError.textContent = "Functions must be a JSON list in OpenAI's format, or empty.";
  if (!formError.hidden) return;
  settings = { ...entered, tools: entered.tools.trim() };
  store("settings", settings);
  dialog.close();
}

function isListOrEmpty(text) {
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
question.addEventListener("input", resizeInput);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("#composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !dialog.open) running?.abort();
});
$("#stop").addEventListener("click", () => running?.abort());
$("#new-chat").addEventListener("click", newChat);
$("#open-settings").addEventListener("click", openSettings);
$("#close-settings").addEventListener("click", () => dialog.close());
dialog.querySelector("form").addEventListener("submit", saveSettings);
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => !running && send(example.textContent));
}
keyForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem("mlx-gptoss key", $("#key").value);
  await findModel();
  if (keyForm.hidden) question.focus();
});
scroller.addEventListener("scroll", () => {
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
});
log.addEventListener("grown", scrollToEnd);
$("#effort").addEventListener("change", (event) => store("effort", { value: event.target.value }));

const effort = load("effort").value;
if (effort) $(`#effort input[value="${effort}"]`).checked = true;
findModel();
