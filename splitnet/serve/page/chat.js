// The chat: streams answers of the swarm, and tells which way each of them went.

import { byId, element } from "./dom.js";
import { figure, plural, seconds } from "./format.js";
import { askForKey } from "./key.js";
import { routeLine } from "./routes.js";
import { documents, RequestError } from "./stream.js";

const messages = byId("messages");
const question = byId("question");
const said = [];
let model = "";
let running = null;
let unrouted = [];

/** Takes in what the server tells of answers: their routes belong to the answers here by id. */
export function showInChat(snapshot) {
  model = snapshot.model;
  unrouted = unrouted.filter(({ id, route }) => {
    const told = snapshot.answers.find((answer) => answer.id === id);
    if (told?.routes.length) route.replaceChildren(routeLine(told.routes));
    return !told?.ended;
  });
}

async function ask(text) {
  const began = performance.now();
  const bubble = element("div", "message answer", element("p", "text"), element("p", "route-of"), element("p", "timing"));
  const [body, route, timing] = bubble.children;
  const isAtEnd = () => messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
  const scrollToEnd = () => (messages.scrollTop = messages.scrollHeight);
  messages.querySelector(".empty")?.remove();
  messages.append(element("div", "message asked", element("p", "text", text)), bubble);
  scrollToEnd();
  said.push({ role: "user", content: text });
  let answer = "";
  let first = null;
  let last = null;
  let tokens = null;
  const entry = { id: null, route };
  running = new AbortController();
  setRunning(true);
  bubble.classList.add("growing");
  timing.textContent = "waiting for the first token";
  try {
    // Greedy, as `splitnet chat` is.
    const request = { model, messages: said, temperature: 0, stream: true, stream_options: { include_usage: true } };
    const options = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(request),
      signal: running.signal,
    };
    for await (const chunk of documents("/v1/chat/completions", options)) {
      if (chunk.error) throw new RequestError(502, chunk.error.message);
      if (entry.id === null) {
        entry.id = chunk.id;
        unrouted.push(entry);
      }
      tokens = chunk.usage?.completion_tokens ?? tokens;
      const piece = chunk.choices[0]?.delta.content;
      if (!piece) continue;
      last = performance.now();
      first ??= last;
      const follow = isAtEnd();
      answer += piece;
      body.append(piece);
      timing.textContent = `first token after ${seconds((first - began) / 1000)}`;
      if (follow) scrollToEnd();
    }
  } catch (error) {
    if (error.status === 401) askForKey();
    const stopped = error.name === "AbortError";
    bubble.append(element("p", stopped ? "note" : "problem", stopped ? "stopped" : error.message));
  } finally {
    running = null;
    setRunning(false);
    bubble.classList.remove("growing");
    timing.textContent = timingText(began, first, last, tokens);
    if (answer) said.push({ role: "assistant", content: answer });
    else said.pop();
    scrollToEnd();
  }
}

function timingText(began, first, last, tokens) {
  if (first === null) return "";
  const parts = [`first token after ${seconds((first - began) / 1000)}`];
  if (tokens > 1) parts.push(`${figure((tokens - 1) / ((last - first) / 1000))} tokens/s`);
  if (tokens) parts.push(plural(tokens, "token"));
  return parts.join(" · ");
}

function setRunning(runs) {
  byId("send").hidden = runs;
  byId("stop").hidden = !runs;
  byId("new-chat").hidden = runs || !said.length;
  messages.setAttribute("aria-busy", runs);
}

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running || !model) return;
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("chat-form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new-chat").addEventListener("click", () => {
  said.length = 0;
  messages.replaceChildren(element("p", "empty", "Ask something."));
  byId("new-chat").hidden = true;
  question.focus();
});
