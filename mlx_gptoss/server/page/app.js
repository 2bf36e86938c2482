// The chat page: one conversation at a time, its questions and replies, and the list of all of them.

import { createButton, createElement } from "./elements.js";
import { streamWithTools } from "./hosted.js";
import { Reply } from "./reply.js";
import { DEFAULTS, openSettings, requestFields } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { openStore, tellOthers } from "./store.js";
import { ApiError, getJson, postStream } from "./stream.js";

const $ = (selector) => document.querySelector(selector);
const question = $("#question");
const log = $("#log");
const scroller = $("#scroller");
const errorBox = $("#error");
const keyForm = $("#unlock");
const PROGRESS_AFTER = 1500; // milliseconds without a token, after which the progress of reading is shown

let model = null; // the model's name; null until the server has been asked
let hostedTools = []; // that the server runs itself
let running = null; // the AbortController of the reply in progress
let conversation = fresh();
let sidebar = null;

/** Returns a new conversation, with the settings of the last one. */
function fresh() {
  const settings = { ...DEFAULTS, ...load("settings") };
  return { id: crypto.randomUUID(), title: "", created: Date.now(), updated: 0, version: 0, settings, messages: [] };
}

/** Returns what this browser has stored under a name; {} if it stores nothing. The API key is kept for this tab only. */
function load(name) {
  try {
    return JSON.parse(localStorage.getItem(`mlx-gptoss ${name}`) ?? "{}");
  } catch {
    return {};
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`mlx-gptoss ${name}`, JSON.stringify(value));
  } catch {
    // Some private windows store nothing.
  }
}

let keyOfTab = "";
try {
  keyOfTab = sessionStorage.getItem("mlx-gptoss key") ?? "";
} catch {
  // as above
}
const apiKey = () => keyOfTab;

async function findModel() {
  try {
    model = (await getJson("v1/models", { key: apiKey() })).data[0].id;
    $("#model").textContent = document.title = model.split("/").at(-1);
    hostedTools = (await getJson("props", { key: apiKey() })).hosted_tools ?? [];
    $("#hosted-field").hidden = !hostedTools.length;
    showError(null);
  } catch (error) {
    showError(error);
  }
}

/** Shows an error, with the form for the API key if the key is the problem. null hides the error. */
function showError(error) {
  if (error && !(error instanceof ApiError)) console.info(error);
  errorBox.textContent = error?.message ?? "";
  errorBox.hidden = !error;
  keyForm.hidden = error?.status !== 401;
  if (!keyForm.hidden) $("#key").focus();
}

function requestBody() {
  const { settings, messages } = conversation;
  const instructions = settings.instructions ? [{ role: "developer", content: settings.instructions }] : [];
  const sent = messages.map(({ stats, reasoning, ...message }) => message);
  const options = { stream: true, stream_options: { include_usage: true } };
  return { model, messages: [...instructions, ...sent], ...options, ...requestFields(settings) };
}

/**
 * Appends messages to the conversation and streams the reply. Returns whether any of it arrived; if not, the messages
 * are removed again.
 */
async function ask(added) {
  if (model === null) await findModel();
  if (model === null || running) return false;
  const talk = conversation;
  const before = talk.messages;
  talk.messages = [...before, ...added];
  const reply = new Reply(apiKey, () => regenerate(talk.messages.length - 1));
  const controller = begin(reply);
  try {
    const options = { key: apiKey(), signal: controller.signal };
    const stream = talk.settings.hosted && hostedTools.length
      ? streamWithTools(requestBody(), hostedTools, options)
      : postStream("v1/chat/completions", requestBody(), options);
    for await (const chunk of stream) reply.add(chunk);
    reply.end();
    await keep(talk, reply, before, true);
    return true;
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (stopped || reply.firstAt !== null) {
      reply.end(stopped ? "stopped" : "interrupted");
      await keep(talk, reply, before, false);
    } else {
      reply.element.remove();
      talk.messages = before;
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
  watchProgress(reply, running);
  return running;
}

/** Shows how much of a long prompt the server has read, until the first token is there. */
async function watchProgress(reply, controller) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, PROGRESS_AFTER));
    if (controller !== running || reply.firstAt !== null) return;
    const slots = await getJson("slots", { key: apiKey() }).catch(() => []);
    const slot = slots.find((each) => each.n_prompt_tokens);
    if (slot && controller === running) reply.showProgress(slot.n_prompt_tokens_processed, slot.n_prompt_tokens);
  }
}

function finish() {
  running = null;
  $("#stop").hidden = true;
  $("#send").hidden = false;
  if (document.activeElement === document.body) question.focus();
}

/** Appends a reply to its conversation and stores that. A reply without content takes its question with it. */
async function keep(talk, reply, before, complete) {
  const message = reply.message(complete);
  talk.messages = message ? [...talk.messages, message] : before;
  if (talk !== conversation) return store(talk); // another conversation was opened in the meantime
  if (reply.usage) {
    const tokens = reply.usage.prompt_tokens + reply.usage.completion_tokens;
    $("#used").textContent = `${tokens.toLocaleString("en")} tokens so far`;
  }
  if (message?.tool_calls) reply.askForResults(ask);
  $("#said").textContent = message?.content ?? "";
  scrollToEnd();
  await store(talk);
}

async function store(talk) {
  if (!talk.messages.length) return;
  talk.title ||= talk.messages[0].content.split("\n")[0].slice(0, 60);
  talk.updated = Date.now();
  await sidebar.store.put(talk);
  tellOthers();
  if (talk === conversation) sidebar.mark(talk.id);
  else sidebar.refresh();
}

async function send(text) {
  const bubble = showQuestion(text, conversation.messages.length);
  question.value = "";
  resizeInput();
  if (await ask([{ role: "user", content: text }])) return;
  bubble.remove();
  $("#welcome").hidden = log.childElementCount > 0;
  question.value ||= text;
  resizeInput();
}

function showQuestion(text, index) {
  $("#welcome").hidden = true;
  const edit = createButton("Edit", () => editQuestion(index), { label: "Edit question", className: "plain small" });
  const bubble = createElement("article", "question", createElement("div", "said", text), edit);
  log.append(bubble);
  return bubble;
}

/** Shows a conversation that was kept. quietly: only its title has changed. */
function show(kept, { quietly = false } = {}) {
  if (quietly) return Object.assign(conversation, { title: kept.title, version: kept.version });
  running?.abort();
  finish();
  conversation = { ...kept, settings: { ...DEFAULTS, ...kept.settings } };
  log.replaceChildren();
  $("#welcome").hidden = conversation.messages.length > 0;
  $("#used").textContent = "";
  checkEffort();
  showError(null);
  conversation.messages.forEach((message, index) => {
    if (message.role === "user") showQuestion(message.content, index);
    if (message.role === "assistant") log.append(Reply.from(message, apiKey, () => regenerate(index)).element);
    if (message.role === "tool") log.append(createElement("pre", "result", message.content));
  });
  sidebar?.mark(kept.id);
  scroller.scrollTop = scroller.scrollHeight;
}

/** Puts a question into the input field; sending it replaces what was said from there on. */
function editQuestion(index) {
  if (running) return;
  const { content } = conversation.messages[index];
  show({ ...conversation, messages: conversation.messages.slice(0, index) });
  question.value = content;
  resizeInput();
  question.focus();
}

/** Asks again for the answer at an index. */
function regenerate(index) {
  if (running) return;
  const last = conversation.messages.slice(0, index).findLastIndex((message) => message.role === "user");
  const { content } = conversation.messages[last];
  show({ ...conversation, messages: conversation.messages.slice(0, last) });
  send(content);
}

function newChat() {
  show(fresh());
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

function saveSettings(settings) {
  conversation.settings = { ...conversation.settings, ...settings };
  remember("settings", conversation.settings);
  if (conversation.messages.length) store(conversation);
}

function checkEffort() {
  $(`#effort input[value="${conversation.settings.effort}"]`).checked = true;
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
  if (event.key === "Escape" && !$("#settings").open) running?.abort();
});
$("#stop").addEventListener("click", () => running?.abort());
$("#new-chat").addEventListener("click", newChat);
$("#open-settings").addEventListener("click", () => openSettings(conversation.settings, saveSettings));
for (const example of document.querySelectorAll(".examples button")) {
  example.addEventListener("click", () => !running && send(example.textContent));
}
keyForm.addEventListener("submit", async (event) => {
  event.preventDefault();
  keyOfTab = $("#key").value;
  try {
    sessionStorage.setItem("mlx-gptoss key", keyOfTab);
  } catch {
    // The key is then kept until the page is closed.
  }
  await findModel();
  if (keyForm.hidden) question.focus();
});
scroller.addEventListener("scroll", () => {
  atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
});
log.addEventListener("grown", scrollToEnd);
$("#effort").addEventListener("change", (event) => saveSettings({ effort: event.target.value }));

checkEffort();
findModel();
sidebar = new Sidebar(await openStore(), { open: show, fresh: newChat, fail: showError });
document.documentElement.dataset.ready = "true";
