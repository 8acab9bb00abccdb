// The API key, if the server requires one; kept for this tab only.

import { byId } from "./dom.js";

const STORED = "api-key";
const dialog = byId("key-dialog");
let waiting = [];

/** Headers of a request. */
export function authorized() {
  const key = sessionStorage.getItem(STORED);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Asks for a key after a refused request; resolves when the user has given one. */
export function askForKey() {
  const refused = sessionStorage.getItem(STORED) !== null;
  show(refused ? "The server does not accept this key. Enter another." : "This server answers only to its keys.");
  return new Promise((resolve) => waiting.push(resolve));
}

function show(note) {
  byId("key-button").hidden = false;
  byId("key-note").textContent = note;
  if (!dialog.open) dialog.showModal();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(STORED, key);
  byId("key").value = "";
  dialog.close();
  for (const resolve of waiting) resolve();
  waiting = [];
});
byId("key-cancel").addEventListener("click", () => dialog.close());
byId("key-button").addEventListener("click", () => show("Enter another key."));
