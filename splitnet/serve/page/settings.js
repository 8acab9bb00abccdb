// Settings of the chat's requests, kept in this browser.

import { byId, setText } from "./dom.js";

const STORED = "chat-settings";
const FIELDS = ["system", "temperature", "longest"].map(byId);
const form = byId("settings");
const opener = byId("settings-button");

/** The messages before the first question, and parameters of the request. */
export function settings() {
  const [system, temperature, longest] = FIELDS.map((field) => (field.validity.valid ? field.value.trim() : ""));
  const before = system ? [{ role: "system", content: system }] : [];
  return { before, parameters: { temperature: Number(temperature), ...(longest && { max_tokens: Number(longest) }) } };
}

function show() {
  const value = Number(byId("temperature").value);
  setText(byId("temperature-told"), value ? value.toFixed(1) : "0: always the likeliest word");
  opener.classList.toggle("changed", FIELDS.some((field) => field.value !== field.defaultValue));
}

function open(opened) {
  form.hidden = !opened;
  opener.setAttribute("aria-expanded", opened);
  (opened ? FIELDS[0] : opener).focus();
}

function keep() {
  localStorage.setItem(STORED, JSON.stringify(FIELDS.map((field) => field.value)));
  show();
}

opener.addEventListener("click", () => open(form.hidden));
form.addEventListener("input", keep);
form.addEventListener("reset", () => setTimeout(keep));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  open(false);
});
form.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  event.stopPropagation();
  open(false);
});
try {
  const kept = JSON.parse(localStorage.getItem(STORED)) ?? [];
  FIELDS.forEach((field, index) => (field.value = kept[index] ?? field.defaultValue));
} catch {} // no settings of ours
show();
