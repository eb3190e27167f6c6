// The server's API as the page uses it: model list, health, and a streamed chat completion.
import { createSseParser } from "./sse.js";

/** A failure that a person can read; `status` is the HTTP status, 0 where no reply came. */
export class ChatError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ChatError";
    this.status = status;
  }
}

const UNREACHABLE = "The server cannot be reached. Check that it is running, then try again.";
const LOST = "The connection to the server was lost before the answer was complete.";
const CUT_OFF = "The server ended the stream before the answer was complete.";

// Paths are relative to the page, so that a proxy may serve all of it below a prefix.
async function request(path, options) {
  try {
    return await fetch(path, { cache: "no-store", credentials: "same-origin", ...options });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ChatError(UNREACHABLE);
  }
}

function authorization(apiKey) {
  return apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  let message = "";
  try {
    message = JSON.parse(text).error?.message ?? "";
  } catch {
    message = text.slice(0, 500); // a proxy's plain text or page; shown as text
  }
  return new ChatError(message || `The server answered with status ${response.status}.`, response.status);
}

/** "ready", "starting" (the server answers, but takes no requests yet) or "offline". */
export async function health() {
  try {
    const response = await request("health", {});
    return response.ok ? "ready" : "starting";
  } catch {
    return "offline";
  }
}

/** @returns {Promise<{id: string, max_model_len?: number}[]>} */
export async function listModels(apiKey) {
  const response = await request("v1/models", { headers: authorization(apiKey) });
  if (!response.ok) throw await failure(response);
  const models = (await response.json()).data ?? [];
  if (models.length === 0) throw new ChatError("The server lists no model.", response.status);
  return models;
}

function parseChunk(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ChatError(`The server sent a piece that is not JSON: ${data.slice(0, 200)}`);
  }
  if (chunk.error) throw new ChatError(chunk.error.message || "The server failed while it wrote the answer.");
  return chunk;
}

/**
 * Streams one chat completion; aborting `signal` closes the connection, which cancels the request on the server.
 *
 * @param {object} body the request, less the fields that make it a stream
 * @yields {{text: string, reasoning: string, finishReason: string|null, usage: object|null}} as pieces arrive
 * @throws {ChatError} refused, failed or cut off; or the signal's own error
 */
export async function* streamChat(body, apiKey, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...authorization(apiKey) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);

  const parser = createSseParser();
  const reader = response.body.getReader();
  let finished = false;
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        if (finished) return;
        throw new ChatError(LOST);
      }
      if (part.done) break;
      for (const data of parser.push(part.value)) {
        if (data.startsWith("[DONE]")) return;
        const chunk = parseChunk(data);
        const choice = chunk.choices?.[0]; // the usage chunk has none
        const delta = choice?.delta ?? {};
        finished ||= Boolean(choice?.finish_reason);
        yield {
          text: delta.content ?? "",
          reasoning: delta.reasoning_content ?? delta.reasoning ?? "", // the two names carry the same text
          finishReason: choice?.finish_reason ?? null,
          usage: chunk.usage ?? null,
        };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // after an error of the stream itself there is nothing left to cancel
  }
  if (!finished) throw new ChatError(CUT_OFF);
}
