// One colour per peer, made of its key, so that it is the same everywhere and always.

const HUES = 12; // that are told apart

/** Colours a node with the hue of a peer; returns the node. */
export function coloured(node, key) {
  let hash = 0x811c9dc5; // FNV-1a
  for (const letter of key) hash = Math.imul(hash ^ letter.codePointAt(0), 0x01000193) >>> 0;
  node.style.setProperty("--hue", ((hash >>> 8) % HUES) * (360 / HUES));
  return node;
}
