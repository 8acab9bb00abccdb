// An answer of a model: its reasoning, text and calls, its progress, and its buttons.

import { copyButton } from "./copy.js";
import { button, element } from "./dom.js";
import { count, figure, plural, seconds } from "./format.js";
import { hasChoice } from "./models.js";
import { showMarkdown } from "./markdown.js";

/** The data of an answer before it begins. Kept as JSON while the page is open, so it has no functions or nodes. */
export const newAnswer = (model) => ({ model, text: "", reasoning: "", calls: [], note: "", problem: "", timing: "" });

/** Adds the `delta` of a chunk; returns whether it has content. */
export function grow(answer, { content, reasoning_content: reasoning, tool_calls: calls }) {
  answer.text += content ?? "";
  answer.reasoning += reasoning ?? "";
  for (const call of calls ?? []) {
    let known = answer.calls.find((each) => each.index === call.index);
    if (!known) answer.calls.push((known = { index: call.index, name: "", arguments: "" }));
    known.name += call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  return Boolean(content || reasoning || calls?.length);
}

/** The time until the first content, and the speed after it, measured by the browser. */
export function timingText(began, first, last, tokens) {
  if (first === null) return "";
  const parts = [`first token after ${seconds((first - began) / 1000)}`];
  if (tokens > 1 && last > first) parts.push(`${figure((tokens - 1) / ((last - first) / 1000))} tokens/s`);
  if (tokens) parts.push(plural(tokens, "token"));
  return parts.join(" · ");
}

/** Shows an answer; `again` is called to generate it again. */
export class AnswerView {
  constructor(answer, again) {
    this.answer = answer;
    this.reasoning = element("details", "reasoning", element("summary"), element("p"));
    this.text = element("div", "text");
    this.calls = element("div", "calls");
    this.reading = element("progress");
    this.reading.setAttribute("aria-label", "How much of the prompt is read");
    this.problem = element("p", "problem");
    this.note = element("p", "note");
    this.route = element("p", "route-of");
    this.timing = element("p", "timing");
    const actions = element("div", "actions", copyButton("the answer", () => answer.text), button("Again", "answer anew", again));
    const foot = element("div", "foot", this.timing, actions);
    const parts = [this.reasoning, this.text, this.calls, this.reading, this.problem, this.note, this.route, foot];
    this.node = element("article", "message answer", ...parts);
    this.node.setAttribute("aria-label", `Answer of ${answer.model}`);
    this.show();
  }

  show() {
    const { model, text, reasoning, calls, note, problem, timing } = this.answer;
    const grows = this.node.classList.contains("growing");
    this.reasoning.hidden = !reasoning;
    this.reasoning.firstChild.textContent = grows && !text ? "Thinking" : "Reasoning";
    this.reasoning.lastChild.textContent = reasoning;
    showMarkdown(this.text, text);
    this.calls.replaceChildren(...calls.map(callNode));
    this.reading.hidden = true;
    this.note.textContent = note;
    this.problem.textContent = problem;
    this.timing.textContent = hasChoice() && !grows ? `${model}${timing && " · "}${timing}` : timing;
  }

  /** How much of the prompt is read, until the answer has content. */
  showReading(read, prompt) {
    if (this.answer.timing || !this.node.classList.contains("growing")) return;
    Object.assign(this.reading, { hidden: false, max: prompt, value: read });
    this.timing.textContent = `${count(read)} of ${count(prompt)} tokens of the prompt are read`;
  }
}

function callNode({ name, arguments: given }) {
  let shown = given; // as it was written, if it is not whole or no JSON
  try {
    shown = JSON.stringify(JSON.parse(given), null, 2);
  } catch {}
  return element("div", "call", element("p", "", "Calls ", element("code", "", name)), element("pre", "", shown));
}
