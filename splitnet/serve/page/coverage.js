// How many peers serve each block.

/** Whether a peer counts as present. */
export const isThere = (peer) => peer.state === "here" || peer.state === "unknown";

/** Replicas of each block; this server's own blocks count once. */
export function replicas(snapshot) {
  const counts = new Array(snapshot.num_blocks).fill(0);
  const spans = snapshot.peers.filter((peer) => isThere(peer) && peer.serves).map((peer) => [peer.start, peer.end]);
  for (const [start, end] of [...spans, ...snapshot.local_spans]) {
    for (let block = start; block < end; block += 1) counts[block] += 1;
  }
  return counts;
}

/** Joins neighbours with the same value to runs `{start, end, value}`. */
export function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    const last = found.at(-1);
    if (last && last.value === value) last.end = index + 1;
    else found.push({ start: index, end: index + 1, value });
  });
  return found;
}
