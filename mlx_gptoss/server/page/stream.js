// Talks to the server: JSON in, JSON or server-sent events out. Knows nothing of the page.

/** What went wrong, in words. `status` is HTTP's, 0 when there was no answer. */
export class Failure extends Error {
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
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await failure(response, key);
  return response;
}

async function failure(response, key) {
  const { status } = response;
  if (status === 401) {
    return new Failure(key ? "The server does not take this API key." : "This server asks for an API key.", status);
  }
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${status} ${response.statusText}.`;
  const wait = response.headers.get("Retry-After");
  return new Failure(wait ? `${message} Try again in ${wait} s.` : message, status);
}

/** The JSON that a GET answers with. */
export async function get(url, options) {
  return (await request(url, options)).json();
}

/** The JSON objects of the event stream that a POST answers with, as they arrive. Aborting `signal` ends it. */
export async function* post(url, body, options) {
  const headers = { "Content-Type": "application/json" };
  const response = await request(url, { ...options, method: "POST", headers, body: JSON.stringify(body) });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure(chunk.error.message, response.status);
    yield chunk;
  }
  throw new Failure("The answer broke off: the server closed the connection.");
}

/** The `data` of each server-sent event; comments and other fields are for proxies. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Failure("The answer broke off: the connection was lost.");
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
