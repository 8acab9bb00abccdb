// The chat: turns of a question and its answer, kept while the page is open.

import { AnswerView, grow, newAnswer, timingText } from "./answer.js";
import { button, byId, element } from "./dom.js";
import { contentOf, takeImages, thumbnail } from "./images.js";
import { askForKey } from "./key.js";
import { chosenModel, showModels } from "./models.js";
import { routeLine } from "./routes.js";
import { settings } from "./settings.js";
import { documents, RequestError } from "./stream.js";

const STORED = "chat";
const messages = byId("messages");
const question = byId("question");
const chat = document.querySelector(".chat");
const nothing = messages.firstElementChild;
const turns = []; // {asked, images, answer, view, node, id, counted}; id: the server's, until it has told of the answer's end
let running = null;

/** Updates the answers of this page, found by id, with the server's data on answers. */
export function showInChat(snapshot) {
  showModels(snapshot.model);
  for (const turn of turns) {
    const told = turn.id && snapshot.answers.find((answer) => answer.id === turn.id);
    if (!told) continue;
    if (told.routes.length) turn.view.route.replaceChildren(routeLine(told.routes));
    if (told.ended) turn.id = "";
    if (told.first_token_s !== null) turn.counted(told.tokens);
    else if (!told.ended) turn.view.showReading(told.read, told.prompt);
  }
}

/** Adds a turn to the page. */
function add(asked, images, answer) {
  const view = new AnswerView(answer, () => {
    goBack(turn);
    ask(asked, images);
  });
  const edit = button("Edit", "your message", () => editTurn(turn));
  const node = element("article", "message asked", ...images.map(thumbnail), element("p", "text", asked), edit);
  node.setAttribute("aria-label", "Your message");
  const turn = { asked, images, answer, view, node };
  nothing.remove();
  messages.append(node, view.node);
  turns.push(turn);
  return turn;
}

/** Removes a turn and all later turns. */
function goBack(turn) {
  running?.abort();
  for (const gone of turns.splice(turns.indexOf(turn))) for (const each of [gone.node, gone.view.node]) each.remove();
  if (!turns.length) messages.append(nothing);
}

async function ask(text, images) {
  // A turn without an answer is not sent to the model: chat templates require alternating roles.
  const said = turns.filter(({ answer }) => answer.text.trim()).flatMap(({ asked, images, answer }) => [
    { role: "user", content: contentOf(asked, images) },
    { role: "assistant", content: answer.text },
  ]);
  const model = chosenModel();
  const turn = add(text, images, newAnswer(model));
  const [{ answer, view }, own, began] = [turn, new AbortController(), performance.now()];
  const { before, parameters } = settings();
  let [first, last, tokens, frame] = [null, null, null, 0];
  // The server's count also covers stopped answers; the usage at the end of an answer overrides it.
  let known = null;
  turn.counted = (count) => {
    known = count;
    answer.timing = timingText(began, first, last, tokens ?? known);
    frame ||= requestAnimationFrame(show);
  };
  const show = () => {
    const follows = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
    frame = 0;
    view.show();
    if (follows) scrollToEnd();
  };
  setRunning(own);
  view.node.classList.add("growing");
  view.timing.textContent = "waiting for the first token";
  scrollToEnd();
  try {
    const sent = [...before, ...said, { role: "user", content: contentOf(text, images) }];
    const request = { model, messages: sent, ...parameters, stream: true, stream_options: { include_usage: true } };
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(request), signal: own.signal };
    const takeId = (told) => (turn.id = told.get("x-answer-id"));
    for await (const chunk of documents("/v1/chat/completions", options, takeId)) {
      if (chunk.error) throw new RequestError(502, chunk.error.message);
      tokens = chunk.usage?.completion_tokens ?? tokens;
      const choice = chunk.choices[0];
      if (choice?.finish_reason === "length") answer.note = cutOff(parameters.max_tokens);
      if (!choice || !grow(answer, choice.delta)) continue;
      last = performance.now();
      first ??= last;
      answer.timing = timingText(began, first, last, known);
      frame ||= requestAnimationFrame(show);
    }
  } catch (error) {
    if (error.status === 401) askForKey();
    if (error.name === "AbortError") answer.note = "stopped";
    else answer.problem = error.message;
  } finally {
    cancelAnimationFrame(frame);
    if (running === own) setRunning(null);
    answer.timing = timingText(began, first, last, tokens ?? known);
    view.node.classList.remove("growing");
    show();
  }
}

/** Replaces a question by a form; a changed question replaces the turn and all later turns. */
function editTurn(turn) {
  const kept = [...turn.node.childNodes];
  const field = element("textarea");
  field.value = turn.asked;
  field.setAttribute("aria-label", "Your message");
  const leave = () => {
    turn.node.replaceChildren(...kept);
    kept.at(-1).focus();
  };
  const send = () => {
    if (!field.value.trim()) return;
    goBack(turn);
    ask(field.value.trim(), turn.images);
    question.focus();
  };
  const actions = element("div", "actions", button("Cancel", "the change", leave), button("Send again", "", send));
  turn.node.replaceChildren(field, actions);
  field.addEventListener("keydown", (event) => {
    if (isKey(event, "Escape")) leave();
    else if (isSending(event)) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  field.focus();
}

const cutOff = (longest) => `cut off: ${longest ? `the settings allow ${longest} tokens` : "there is no room for more tokens"}`;

const isKey = (event, name) => event.key === name && !event.isComposing;

/** Whether a key sends the question. Touch keyboards have no Shift+Enter, so only the button sends there. */
const isSending = (event) => isKey(event, "Enter") && !event.shiftKey && !matchMedia("(pointer: coarse)").matches;

const scrollToEnd = () => (messages.scrollTop = messages.scrollHeight);

function setRunning(controller) {
  running = controller;
  byId("send").hidden = Boolean(running);
  byId("stop").hidden = !running;
  byId("new-chat").hidden = !turns.length;
  messages.setAttribute("aria-busy", Boolean(running));
}

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (running || !chosenModel()) return;
  const images = takeImages();
  if (!text && !images.length) return;
  question.value = "";
  ask(text, images);
});
question.addEventListener("keydown", (event) => {
  if (!isSending(event)) return;
  event.preventDefault();
  byId("chat-form").requestSubmit();
});
addEventListener("keydown", (event) => {
  if (!isKey(event, "Escape") || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else expand(false);
});
byId("stop").addEventListener("click", () => {
  running?.abort();
  question.focus();
});
byId("new-chat").addEventListener("click", () => {
  if (turns.length) goBack(turns[0]);
  byId("new-chat").hidden = true;
  question.focus();
});
byId("expand").addEventListener("click", () => expand(!chat.classList.contains("wide")));

/** Shows the chat alone, with the rest of the page hidden from keyboards and screen readers; or shows all. */
function expand(wide) {
  chat.classList.toggle("wide", wide);
  byId("expand").textContent = wide ? "Back to the swarm" : "Full page";
  for (const rest of document.querySelectorAll("header, main > :not(.chat)")) rest.inert = wide;
  scrollToEnd();
}

// Kept in the tab like the API key, also across reloads. Images would exceed what a tab may keep, so a text names them.
const kept = ({ asked, images, answer }) => ({ asked: images.length ? `${asked} (images were here)`.trim() : asked, answer });
const store = () => sessionStorage.setItem(STORED, JSON.stringify(turns.map(kept)));
for (const name of ["pagehide", "visibilitychange"]) addEventListener(name, store);
for (const { asked, answer } of JSON.parse(sessionStorage.getItem(STORED) ?? "[]")) {
  add(asked, [], { ...newAnswer(), ...answer });
}
setRunning(null);
scrollToEnd();
