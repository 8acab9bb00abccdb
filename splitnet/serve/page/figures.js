// The sentence at the top and the figures below it.

import { byId, element, keyed, setText, svgElement } from "./dom.js";
import { blocks, count, figure, plural } from "./format.js";
import { isThere, replicas, runs } from "./coverage.js";

const FEW_RANGES = 3;

const area = svgElement("path", { class: "spark-area" });
const line = svgElement("path", { class: "spark-line" });
byId("sparkline").append(area, line);

export function showFigures(snapshot) {
  setText(byId("model"), `${snapshot.model}, ${plural(snapshot.num_blocks, "block")}`);
  document.title = `${snapshot.model}: ${snapshot.holes.length ? "blocks are missing" : "every block is served"}`;
  const [verdict, detail] = verdictOf(snapshot);
  setText(byId("verdict"), verdict);
  byId("verdict").classList.toggle("bad", snapshot.holes.length > 0);
  setText(byId("verdict-detail"), detail);
  keyed(byId("holes"), snapshot.holes, (hole) => hole.advice, createHole, () => {});
  setText(byId("rate"), figure(snapshot.tokens_per_s));
  setText(byId("per-round-trip"), snapshot.tokens_per_round_trip ? snapshot.tokens_per_round_trip.toFixed(2) : "–");
  setText(byId("running"), count(snapshot.requests.running));
  setText(byId("waiting"), count(snapshot.requests.waiting));
  setText(byId("peer-count"), count(snapshot.peers.filter(isThere).length));
  drawHistory(snapshot.history);
}

function verdictOf(snapshot) {
  const there = snapshot.peers.filter(isThere);
  const missing = snapshot.holes.reduce((sum, hole) => sum + hole.end - hole.start, 0);
  if (missing === snapshot.num_blocks) {
    return ["No block is served", snapshot.problem ?? "There are no peers that answer."];
  }
  if (missing) {
    const verb = missing === 1 ? "is" : "are";
    return [`${missing} of ${snapshot.num_blocks} blocks ${verb} served by nobody`, "Answers wait for them for a while, and then fail."];
  }
  const local = snapshot.local_spans.map(([start, end]) => blocks(start, end)).join(", ");
  const who = `${plural(there.length, "peer")} ${there.length === 1 ? "serves" : "serve"} the model`;
  const here = local ? `, and this server runs ${local} itself` : "";
  return ["Every block is served", `${who}${here}. ${replicasText(replicas(snapshot))}`];
}

function replicasText(counts) {
  const safe = runs(counts.map((value) => value > 1)).filter((run) => run.value);
  const number = safe.reduce((sum, run) => sum + run.end - run.start, 0);
  if (!number) return "No block has a second peer yet.";
  if (number === counts.length) return "Every block has more than one.";
  if (safe.length > FEW_RANGES) return `${number} of ${counts.length} blocks have more than one.`;
  return `Blocks ${safe.map((run) => blocks(run.start, run.end)).join(", ")} have more than one.`;
}

function createHole(hole) {
  const item = element("li", "hole");
  // Text between backticks is a command.
  hole.advice.split("`").forEach((part, index) => {
    item.append(index % 2 ? element("code", "", part) : part);
  });
  return item;
}

function drawHistory(points) {
  const peak = Math.max(...points);
  const x = (index) => (300 * index) / (points.length - 1);
  const y = (value) => 38 - (36 * value) / Math.max(peak, 1);
  const path = points.map((value, index) => `${index ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  line.setAttribute("d", path);
  area.setAttribute("d", `${path}L300 40L0 40Z`);
  const told = peak ? `last 5 minutes, at most ${figure(peak)}` : "last 5 minutes: none";
  setText(byId("sparkline-note"), told);
  byId("sparkline").setAttribute("aria-label", `Tokens per second, ${told}`);
}
