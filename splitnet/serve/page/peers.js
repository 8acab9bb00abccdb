// The table of peers.

import { byId, element, keyed, setText } from "./dom.js";
import { blocks, count, figure, ms, small } from "./format.js";
import { coloured } from "./hues.js";
import { isThere } from "./coverage.js";

const COLUMNS = [
  ["Blocks", blocksOf],
  ["Device, weights", (peer) => `${peer.device}, ${heldAs(peer.weights)}`, "wraps"],
  ["ms/token", (peer) => figure(peer.token_ms), "number"],
  ["J/token", (peer) => small(peer.token_joules), "number"],
  ["Queue", (peer) => ms(peer.queue_ms), "number"],
  ["Sessions", (peer) => count(peer.sessions), "number"],
  ["Free KV", (peer) => count(peer.kv_free), "number"],
  ["Delay", (peer) => ms(peer.delay_ms), "number"],
  ["Version", (peer) => peer.version],
];

const WORDS = {
  float32: "32 bits",
  bfloat16: "16 bits",
  float16: "16 bits",
  int8: "8 bits",
  int4: "4 bits",
};

export function showPeers(snapshot) {
  keyed(byId("peers"), snapshot.peers, (peer) => peer.key, createRow, updateRow);
}

function createRow(peer) {
  const name = element(
    "th",
    "",
    element(
      "div",
      "peer-name",
      coloured(element("span", "dot"), peer.key),
      element("b", "", peer.short),
      element("span", "address"),
      element("span", "state"),
    ),
  );
  name.scope = "row";
  name.title = peer.key;
  const row = element("tr", "", name);
  for (const [label, , kind] of COLUMNS) {
    const cell = element("td", kind ?? "");
    cell.dataset.label = label;
    row.append(cell);
  }
  return row;
}

function updateRow(row, peer) {
  row.classList.toggle("gone", !isThere(peer));
  setText(row.querySelector(".address"), addressOf(peer));
  setText(row.querySelector(".state"), stateOf(peer));
  row.querySelector(".wraps").title = exactly(peer.weights);
  // Measurements of a peer that is gone are obsolete.
  COLUMNS.forEach(([, text, kind], index) => {
    setText(row.children[index + 1], kind === "number" && !isThere(peer) ? "–" : text(peer));
  });
}

/** `HELD/COMPUTED KV FORM`; only HELD is always present. */
function partsOf(weights) {
  const [types, form] = weights.split(" KV ");
  const [held, computed] = types.split("/");
  return { held, computed: computed ?? held, form };
}

function heldAs(weights) {
  const { held } = partsOf(weights);
  return held.startsWith("stored") ? "as in the files" : (WORDS[held] ?? held);
}

function exactly(weights) {
  const { held, computed, form } = partsOf(weights);
  const as = held.startsWith("stored") ? "in the codes of the model's files" : `as ${held}`;
  return `Weights are held ${as}; blocks compute in ${computed}${form ? `; keys and values are held as ${form}` : ""}`;
}

function blocksOf(peer) {
  const served = blocks(peer.start, peer.end);
  return peer.moving_to ? `${served} → ${blocks(...peer.moving_to)}` : served;
}

function addressOf(peer) {
  return peer.way === undefined || peer.way === "direct" ? peer.address : `${peer.way}, behind a router`;
}

function stateOf(peer) {
  if (peer.state === "gone") return `gone for ${Math.round(peer.state_s)} s`;
  if (peer.state === "refuses") return "does not accept this server's key";
  return peer.serves ? "" : "takes no sessions now";
}
