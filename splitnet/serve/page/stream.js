// Server-sent events by fetch, which can send an API key; EventSource cannot.

import { authorized } from "./key.js";

/** An error answer to a request; `status`: that of HTTP. */
export class RequestError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Yields the JSON documents of a stream until it ends; `onHeaders` is called first, with the reply's headers. */
export async function* documents(url, options = {}, onHeaders = () => {}) {
  const reply = await fetch(url, { ...options, headers: { ...options.headers, ...authorized() } });
  if (!reply.ok) {
    const body = await reply.json().catch(() => null);
    throw new RequestError(reply.status, body?.error?.message ?? `the server answers with status ${reply.status}`);
  }
  onHeaders(reply.headers);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (pending + value).split("\n\n");
      pending = events.pop();
      for (const event of events) {
        // Comments keep the connection open while there are no events.
        if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
