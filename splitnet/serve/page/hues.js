// One colour per peer, the same everywhere on the page and for as long as it is open.

const HUES = 8;
const given = new Map();

/** The class that colours what belongs to a peer. */
export function hueOf(key) {
  if (!given.has(key)) given.set(key, given.size % HUES);
  return `hue-${given.get(key)}`;
}
