// The events of peers and routes, the latest first.

import { byId, element } from "./dom.js";
import { clockTime } from "./format.js";

const KEPT = 100;
const BAD = new Set(["lost", "gone", "failed", "refused", "weights", "lied"]);
const GOOD = new Set(["repaired", "joined", "back"]);

/** Adds events; `all`: they replace the shown ones. */
export function showEvents(events, all) {
  const list = byId("events");
  if (all) list.replaceChildren();
  for (const { at, kind, text } of events) {
    const tone = BAD.has(kind) ? "bad" : GOOD.has(kind) ? "good" : "";
    const time = element("time", "", clockTime(at));
    time.dateTime = new Date(at * 1000).toISOString();
    list.prepend(element("li", `event ${tone}`, time, element("b", "", kind), element("span", "", text)));
  }
  while (list.childElementCount > KEPT) list.lastElementChild.remove();
  byId("no-events").hidden = list.childElementCount > 0;
}
