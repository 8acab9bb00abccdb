// The choice of the server's model that the chat asks.

import { byId, element } from "./dom.js";
import { authorized } from "./key.js";

const REFRESH_MS = 30_000;
const choice = byId("model-choice");
let askedAt = -REFRESH_MS;

let seeing = new Set();

export const chosenModel = () => choice.value;
export const seesImages = () => seeing.has(choice.value);
export const hasChoice = () => choice.options.length > 1;

/** Reads the list of models regularly; `own`: the dashboard's model, which is always listed. */
export async function showModels(own) {
  if (performance.now() - askedAt < REFRESH_MS) return;
  askedAt = performance.now();
  if (!choice.value) offer([own]);
  const reply = await fetch("/v1/models", { headers: authorized() }).catch(() => null);
  if (!reply?.ok) return;
  const models = (await reply.json()).data;
  seeing = new Set(models.filter((each) => each.input_modalities?.includes("image")).map((each) => each.id));
  offer(models.map((each) => each.id));
  showWhatIsSeen();
}

/** Tells in the field of the question whether images may be pasted. */
function showWhatIsSeen() {
  byId("question").placeholder = seesImages() ? "Ask the swarm; paste or drop images" : "Ask the swarm";
}
choice.addEventListener("change", showWhatIsSeen);

function offer(names) {
  const chosen = names.includes(choice.value) ? choice.value : names[0];
  if (names.join("\n") === [...choice.options].map((option) => option.value).join("\n")) return;
  choice.replaceChildren(...names.map((name) => Object.assign(element("option", "", name), { value: name })));
  choice.value = chosen;
  choice.hidden = !hasChoice();
}
