// Routes as chains: from this server through the hops and back, with the delay and traffic of each link.

import { byId, element, keyed, setText } from "./dom.js";
import { blocks, count, figure, ms, plural } from "./format.js";
import { isThere } from "./coverage.js";
import { coloured } from "./hues.js";

const HERE = "this server";
const short = (key) => key.slice(0, 9);

export function showRoutes(snapshot) {
  const live = snapshot.answers.filter((answer) => !answer.ended && answer.routes.length);
  const groups = new Map();
  for (const answer of live) {
    const route = JSON.stringify(answer.routes.map((each) => each.hops));
    groups.set(route, [...(groups.get(route) ?? []), answer]);
  }
  const last = snapshot.answers.filter((answer) => answer.ended && answer.routes.length).at(-1);
  if (!groups.size && last) groups.set("last", [last]);
  const note = live.length
    ? `${titleOf(live)} under way.`
    : `No answer is under way.${last ? " The last one went this way:" : ""}`;
  setText(byId("routes-note"), note);
  const gone = new Set(snapshot.peers.filter((peer) => !isThere(peer)).map((peer) => peer.key));
  const update = (node, [, answers]) => updateGroup(node, answers, groups.size > 1 ? titleOf(answers) : "", gone);
  keyed(byId("routes"), [...groups.entries()], ([key]) => key, createGroup, update);
}

function createGroup() {
  return element("div", "route-group", element("p", "route-title"), element("ol", "route"));
}

function titleOf(answers) {
  const rate = answers.reduce((sum, answer) => sum + (answer.tokens_per_s ?? 0), 0);
  return `${plural(answers.length, "answer")}${rate ? ` with ${figure(rate)} tokens/s` : ""}`;
}

function updateGroup(node, answers, title, gone) {
  setText(node.firstElementChild, title);
  keyed(node.lastElementChild, stopsOf(answers.at(-1).routes), (stop) => stop.key, createStop, (each, stop) => {
    updateStop(each, stop);
    each.lastElementChild.classList.toggle("gone", Boolean(stop.hop) && gone.has(stop.hop.peer));
  });
}

/** The ends and hops of a route, each with the link that leads to it. */
function stopsOf(routes) {
  const stops = [{ key: "start" }];
  routes.forEach((route, number) => {
    route.links.forEach((link, index) => {
      const hop = route.hops[index];
      stops.push({ key: hop ? `${hop.peer} ${hop.start}-${hop.end}` : `end ${number}`, link, hop });
    });
  });
  return stops;
}

/** Keeps a link in the same line as the stop that it leads to. */
function createStop({ link, hop }) {
  const stop = hop ? coloured(element("div", "stop hop", element("b"), element("span")), hop.peer) : element("div", "stop here", HERE);
  return element("li", "", ...(link ? [element("div", "link", element("b"), element("span"))] : []), stop);
}

function updateStop(node, { link, hop }) {
  const [arrow, stop] = [node.firstElementChild, node.lastElementChild];
  if (hop) {
    setText(stop.firstElementChild, short(hop.peer));
    setText(stop.lastElementChild, blocks(hop.start, hop.end));
  }
  if (!link) return;
  const { delay_ms: delay, codec, bytes_per_token: bytes, via_client: carried } = link;
  setText(arrow.firstElementChild, ms(delay));
  setText(arrow.lastElementChild, `codec ${codec}${carried ? ", through this server" : ""}`);
  arrow.title = `${ms(delay)} one way, codec ${codec}, ${count(bytes)} bytes per token`;
}

/** One line that names the hops of an answer. */
export function routeLine(routes) {
  const line = element("span", "route-line");
  for (const hop of routes.flatMap((route) => route.hops)) {
    const name = element("b", "", short(hop.peer));
    const chip = coloured(element("span", "chip", name, ` ${blocks(hop.start, hop.end)}`), hop.peer);
    line.append(element("span", "route-step", line.childElementCount ? "→ " : "", chip));
  }
  return line;
}
