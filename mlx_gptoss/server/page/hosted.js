// Replies with the tools that the server runs itself: the Responses endpoint, as chunks of chat completions.

import { postStream } from "./stream.js";

/** Yields chunks as /v1/chat/completions sends them, and { hosted: item } for each call that the server has made. */
export async function* streamWithTools(body, tools, options) {
  const { messages, stream_options: _, max_completion_tokens: most, reasoning_effort: effort, ...rest } = body;
  const request = {
    ...rest,
    input: messages.map(({ role, content }) => ({ role, content: content ?? "" })),
    reasoning: { effort },
    tools: [...tools, ...(body.tools ?? []).map((tool) => ({ type: "function", ...tool.function }))],
    store: false,
    ...(most && { max_output_tokens: most }),
  };
  for await (const event of postStream("v1/responses", request, options)) yield* chunksOf(event);
}

function* chunksOf(event) {
  const delta = (fields, reason = null) => ({ choices: [{ index: 0, delta: fields, finish_reason: reason }] });
  if (event.type === "response.reasoning_text.delta") yield delta({ reasoning: event.delta });
  if (event.type === "response.output_text.delta") yield delta({ content: event.delta });
  if (event.type === "response.output_item.done" && isHosted(event.item)) yield { hosted: event.item };
  if (event.type === "response.output_item.done" && event.item.type === "function_call") {
    const { call_id: id, name, arguments: given } = event.item;
    yield delta({ tool_calls: [{ index: 0, id, function: { name, arguments: given } }] }, "tool_calls");
  }
  if (event.type === "response.failed") throw new Error(event.response.error?.message ?? "The reply failed.");
  if (event.type === "response.completed" || event.type === "response.incomplete") {
    const { input_tokens: prompt, output_tokens: generated, input_tokens_details: details } = event.response.usage;
    const usage = { prompt_tokens: prompt, completion_tokens: generated, prompt_tokens_details: details };
    yield { choices: [], usage };
  }
}

function isHosted(item) {
  return ["web_search_call", "code_interpreter_call", "mcp_call"].includes(item.type);
}

/** What a call of the server was, in a few words, and its details as text. */
export function describeCall(item) {
  if (item.type === "web_search_call") {
    const { type, query, url, pattern } = item.action ?? {};
    return [type === "search" ? "Searched the web" : "Opened a page", [query, url, pattern].filter(Boolean).join("\n")];
  }
  if (item.type === "code_interpreter_call") {
    const logs = (item.outputs ?? []).map((output) => output.logs ?? "").join("\n");
    return ["Ran Python", [item.code, logs].filter(Boolean).join("\n\n")];
  }
  return [`Called ${item.name}`, [item.arguments, item.error ?? item.output].filter(Boolean).join("\n\n")];
}
