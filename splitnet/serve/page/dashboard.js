// Follows the server's stream while the page is visible, and shows its data.

import { showInChat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { showEvents } from "./events.js";
import { showFigures } from "./figures.js";
import { askForKey } from "./key.js";
import { showMap } from "./map.js";
import { showPeers } from "./peers.js";
import { showRoutes } from "./routes.js";
import { documents } from "./stream.js";
import { showTuning } from "./tuning.js";

const RETRY_MS = 1000;
let following = null;

async function follow() {
  const looking = new AbortController();
  following = looking;
  while (!looking.signal.aborted) {
    try {
      await followOnce(looking.signal);
    } catch (error) {
      if (looking.signal.aborted) return;
      if (error.status === 401) {
        setConnected(false, "a key is needed");
        await askForKey();
        continue;
      }
    }
    if (looking.signal.aborted) return;
    setConnected(false, "the server does not answer: trying again");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function followOnce(signal) {
  let first = true;
  for await (const told of documents("/dashboard/events", { signal })) {
    if (told.type === "snapshot") {
      setConnected(true, "live");
      for (const show of [showFigures, showMap, showRoutes, showPeers, showInChat, showTuning]) show(told);
    } else if (told.type === "events") {
      showEvents(told.events, first);
      first = false;
    }
  }
}

function setConnected(connected, text) {
  document.body.classList.toggle("disconnected", !connected);
  setText(byId("connection"), text);
}

// The server pings the peers only while a page is open.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) following?.abort();
  else follow();
});
if (!document.hidden) follow();
