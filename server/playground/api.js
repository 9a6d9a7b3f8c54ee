// The server's API, and what can go wrong with it, in words.

let apiKey = "";

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  apiKey = key;
}

export function hasKey() {
  return apiKey !== "";
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(apiKey ? { Authorization: `Bearer ${apiKey}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw new Refused(await complaint(response), response.status);
  return response;
}

async function complaint(response) {
  const wait = response.headers.get("Retry-After");
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not ours: a proxy's page, say. The status has to do.
  }
  return wait ? `${message} Try again in ${wait} s.` : message;
}

export async function get(path) {
  return (await request(path)).json();
}

// Ask, and call `onText` with each piece of the answer. Returns { answer, pruning, usage }.
export async function ask(body, signal, onText) {
  const payload = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", { method: "POST", headers, body: payload, signal });
  const reply = { answer: "", pruning: null, usage: null };
  for await (const chunk of events(response.body)) {
    if (chunk.error) throw new Refused(chunk.error.message, 500);
    const text = chunk.choices[0]?.delta.content;
    if (text) {
      reply.answer += text;
      onText(reply.answer);
    }
    reply.pruning = chunk.pruning ?? reply.pruning;
    reply.usage = chunk.usage ?? reply.usage;
  }
  if (!reply.usage) throw new Refused("The answer broke off. Ask again.", 0);
  return reply;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The connection broke before the answer was complete. Ask again.", 0);
    }
    if (part.done) return;
    buffer += part.value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}
