// The API key, if the server wants one: kept for this tab only.

import { byId } from "./dom.js";

const STORED = "api-key";
const dialog = byId("key-dialog");
let asking = null;

/** Headers of a request. */
export function authorized() {
  const key = sessionStorage.getItem(STORED);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Asks for a key; resolves when there is a new one, or the question was put aside. */
export function askForKey() {
  byId("key-button").hidden = false;
  const hadOne = sessionStorage.getItem(STORED) !== null;
  byId("key-note").textContent = hadOne
    ? "The server does not accept this key. Enter another."
    : "This server answers only to those who have one of its keys.";
  asking ??= new Promise((resolve) => {
    dialog.addEventListener("close", () => ((asking = null), resolve()), { once: true });
    dialog.showModal();
  });
  return asking;
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(STORED, key);
  byId("key").value = "";
  dialog.close();
});
byId("key-cancel").addEventListener("click", () => dialog.close());
byId("key-button").addEventListener("click", askForKey);
