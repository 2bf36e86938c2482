// Requests to the server: JSON in, JSON or server-sent events out. Independent of the page.

/** An error with a message for the user. `status` is the HTTP status, 0 if there was no response. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function request(url, { key, ...options }) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(url, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not respond. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response, key);
  return response;
}

async function errorOf(response, key) {
  const { status } = response;
  if (status === 403) {
    const body = await response.json().catch(() => null);
    return new ApiError(`The server refuses this page: ${body?.error?.message ?? response.statusText}.`, status);
  }
  if (status === 401) {
    return new ApiError(key ? "The server rejects this API key." : "This server needs an API key.", status);
  }
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server responded with ${status} ${response.statusText}.`;
  const wait = response.headers.get("Retry-After");
  return new ApiError(wait ? `${message} Try again in ${wait} s.` : message, status);
}

/** Sends a GET request and returns the JSON of the response. */
export async function getJson(url, options) {
  return (await request(url, options)).json();
}

/** Sends JSON in a POST request and returns the JSON of the response. */
export async function postJson(url, body, options) {
  const headers = { "Content-Type": "application/json" };
  return (await request(url, { ...options, method: "POST", headers, body: JSON.stringify(body) })).json();
}

/** Sends a POST request and yields the JSON objects of its event stream as they arrive. Aborting `signal` ends it. */
export async function* postStream(url, body, options) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(url, { ...options, method: "POST", headers, body: JSON.stringify(body) });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
    if (chunk.type === "response.completed" || chunk.type === "response.incomplete") return;
  }
  throw new ApiError("The reply was interrupted: the server closed the connection.");
}

/** Yields the `data` of each server-sent event; comments and other fields are skipped. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The reply was interrupted: the connection was lost.");
    });
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
