// Conversations as files: JSON to keep and to import again, Markdown to read.

export const MAX_FILE_BYTES = 64 << 20;
const FORMAT = "mlx-gptoss conversations";
const MAX_CONVERSATIONS = 10_000;
const MAX_MESSAGES = 10_000;
const MAX_TITLE = 200;
const ROLES = ["user", "assistant", "tool"];

export function toJson(conversations) {
  const kept = conversations.map(({ title, created, updated, settings, messages }) => {
    return { title, created, updated, settings, messages };
  });
  return JSON.stringify({ format: FORMAT, version: 1, conversations: kept }, null, 1);
}

export function toMarkdown({ title, messages }) {
  const parts = [`# ${title}`];
  for (const { role, content, tool_calls: calls = [] } of messages) {
    const heading = { user: "Question", assistant: "Answer", tool: "Result" }[role];
    if (content) parts.push(`## ${heading}\n\n${content}`);
    for (const call of calls) parts.push(`Calls \`${call.function.name}\`:\n\n\`\`\`json\n${call.function.arguments}\n\`\`\``);
  }
  return `${parts.join("\n\n")}\n`;
}

/** Returns the conversations of a file that toJson made, as new ones. Throws an Error that says what is wrong. */
export function fromJson(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is not JSON. Choose one that “Export all” made.");
  }
  const list = data?.conversations;
  if (data?.format !== FORMAT || data.version !== 1 || !Array.isArray(list) || list.length > MAX_CONVERSATIONS) {
    throw new Error("This file has no conversations of this page. Choose one that “Export all” made.");
  }
  return list.map(read);
}

function read(entry, index) {
  const wrong = (what) => new Error(`Conversation ${index + 1} of the file ${what}.`);
  if (typeof entry?.title !== "string" || !Array.isArray(entry.messages)) throw wrong("has no title or no messages");
  if (entry.messages.length > MAX_MESSAGES) throw wrong("is too long");
  const messages = entry.messages.map((message) => {
    const known = ROLES.includes(message?.role) && (message.content === null || typeof message.content === "string");
    if (!known || !(message.tool_calls ?? []).every(isCall)) throw wrong("has a message that is not one");
    return pick(message, ["role", "content", "reasoning", "reasoning_content", "tool_call_id", "stats"], {
      tool_calls: message.tool_calls,
    });
  });
  return {
    id: crypto.randomUUID(),
    title: entry.title.slice(0, MAX_TITLE),
    created: Number(entry.created) || Date.now(),
    updated: Number(entry.updated) || Date.now(),
    settings: pick(entry.settings ?? {}, ["instructions", "tools", "temperature", "top_p", "max_tokens", "effort", "hosted"]),
    messages,
  };
}

function isCall(call) {
  const strings = [call?.id, call?.function?.name, call?.function?.arguments];
  return strings.every((value) => typeof value === "string");
}

/** The entries that are strings, and those given. */
function pick(object, names, more = {}) {
  const strings = names.filter((name) => typeof object[name] === "string").map((name) => [name, object[name]]);
  const given = Object.entries(more).filter(([, value]) => value !== undefined);
  return { content: null, ...Object.fromEntries([...strings, ...given]) };
}
