// The map: spans in lanes, from the first block to the last, and holes across all of them.

import { byId, element, keyed, setText } from "./dom.js";
import { blocks, plural } from "./format.js";
import { coloured } from "./hues.js";
import { isThere, replicas, runs } from "./coverage.js";

const MAX_LANES = 16;
const MAX_COLUMNS = 32;
const LOCAL = "this server";

export function showMap(snapshot) {
  const busy = answersByPeer(snapshot.answers);
  const spans = [
    ...snapshot.local_spans.map(([start, end]) => ({ key: LOCAL, short: LOCAL, start, end, local: true })),
    ...snapshot.peers.map((peer) => ({ ...peer, gone: !isThere(peer), answers: busy.get(peer.key) ?? 0 })),
  ].sort((left, right) => left.start - right.start || Number(left.gone ?? false) - Number(right.gone ?? false));
  const lanes = inLanes(spans);
  const holes = snapshot.holes.map((hole) => ({ ...hole, hole: true, lane: 0 }));
  const shown = lanes.filter((span) => span.lane < MAX_LANES);
  const depth = Math.min(MAX_LANES, Math.max(1, ...lanes.map((span) => span.lane + 1)));
  const map = byId("map");
  map.style.setProperty("--lanes", depth);
  map.style.setProperty("--columns", snapshot.num_blocks / Math.ceil(snapshot.num_blocks / MAX_COLUMNS));
  map.classList.toggle("holed", holes.length > 0);
  keyed(map, [...holes, ...shown], keyOf, createSpan, (node, span) => updateSpan(node, span, snapshot.num_blocks));
  keyed(byId("coverage"), runs(replicas(snapshot)), (run) => `${run.start}-${run.end}`, createRun, (node, run) => {
    place(node, run, snapshot.num_blocks);
    node.classList.toggle("none", run.value === 0);
    node.classList.toggle("many", run.value > 1);
    setText(node.querySelector(".run-value"), run.value === 0 ? "none" : `×${run.value}`);
    setText(node.querySelector(".run-blocks"), blocks(run.start, run.end));
    node.setAttribute("aria-label", `blocks ${blocks(run.start, run.end)}: ${plural(run.value, "peer")}`);
  });
}

const keyOf = (span) => `${span.hole ? "hole" : span.key}:${span.start}-${span.end}`;

/** Gives every span the first lane with room: the first lane reads like the model, further lanes show replicas. */
function inLanes(spans) {
  const ends = [];
  return spans.map((span) => {
    let lane = ends.findIndex((end) => end <= span.start);
    if (lane < 0) lane = ends.length;
    ends[lane] = span.end;
    return { ...span, lane };
  });
}

function answersByPeer(answers) {
  const counted = new Map();
  for (const answer of answers.filter((each) => !each.ended)) {
    const peers = new Set(answer.routes.flatMap((route) => route.hops.map((hop) => hop.peer)));
    for (const peer of peers) counted.set(peer, (counted.get(peer) ?? 0) + 1);
  }
  return counted;
}

function createSpan(span) {
  if (span.hole) return element("div", "hole-band", element("span", "hole-label"));
  const parts = ["span-name", "span-blocks", "span-load"].map((name) => element("span", name));
  const node = element("div", "span", ...parts);
  return span.local ? node : coloured(node, span.key);
}

function updateSpan(node, span, total) {
  node.setAttribute("role", "listitem");
  place(node, span, total);
  if (span.hole) {
    setText(node.firstElementChild, `${blocks(span.start, span.end)} nobody`);
    return;
  }
  node.style.setProperty("--lane", span.lane);
  node.classList.toggle("gone", Boolean(span.gone));
  node.classList.toggle("busy", span.answers > 0);
  const served = blocks(span.start, span.end);
  setText(node.querySelector(".span-name"), span.short);
  setText(node.querySelector(".span-blocks"), span.gone ? `${served} gone` : served);
  setText(node.querySelector(".span-load"), span.answers && !span.gone ? plural(span.answers, "answer") : "");
  node.title = span.local ? `${LOCAL}: blocks ${served}` : `${span.short} at ${span.address}: blocks ${served}`;
}

function createRun() {
  const node = element("div", "run", element("span", "run-value"), element("span", "run-blocks"));
  node.setAttribute("role", "listitem");
  return node;
}

function place(node, { start, end }, total) {
  node.style.left = `${(100 * start) / total}%`;
  node.style.width = `${(100 * (end - start)) / total}%`;
}
