// A run of `splitnet tune`: its losses, evaluations and costs.

import { byId, setText, svgElement } from "./dom.js";
import { count, figure, seconds } from "./format.js";

const HEIGHT = 80;
const line = svgElement("path", { class: "spark-line" });
const held = svgElement("path", { class: "held-line" });
byId("losses").append(line, held);

export function showTuning({ tuning }) {
  byId("tuning").hidden = !tuning;
  if (!tuning) return;
  const told = tuning.evaluations.map((each) => [each.step, each.eval_loss]);
  const all = [...tuning.losses, ...told];
  setText(byId("tuning-title"), `Fine-tuning: ${tuning.name}`);
  if (!all.length) return setText(byId("tuning-note"), "No step is done yet.");
  const last = Math.max(1, ...all.map(([step]) => step));
  const most = Math.max(...all.map(([, loss]) => loss)) || 1;
  line.setAttribute("d", path(tuning.losses, last, most));
  held.setAttribute("d", path(told, last, most));
  const [step, loss] = tuning.losses.at(-1) ?? told.at(-1);
  const parts = [`Step ${count(step)}, loss ${loss.toFixed(3)}`];
  const latest = tuning.evaluations.at(-1);
  if (latest) {
    const accuracy = latest.eval_accuracy == null ? "" : `, accuracy ${(100 * latest.eval_accuracy).toFixed(1)} %`;
    parts.push(`held-out loss ${latest.eval_loss.toFixed(3)}${accuracy} at step ${count(latest.step)}`);
  }
  setText(byId("tuning-note"), `${parts.join("; ")}.`);
  const cost = [`${figure(tuning.tokens_per_s)} tokens/s`, `${count(tuning.tokens)} tokens in ${seconds(tuning.seconds)}`];
  cost.push(`${figure(tuning.sent_bytes / 1e6)} MB sent, ${figure(tuning.received_bytes / 1e6)} received`);
  if (tuning.joules) cost.push(`${figure(tuning.joules)} J at the peers`);
  setText(byId("tuning-cost"), `${cost.join("; ")}.`);
}

function path(points, last, most) {
  const at = ([step, loss]) => `${((300 * step) / last).toFixed(1)} ${((HEIGHT - 2) * (1 - loss / most) + 1).toFixed(1)}`;
  return points.map((point, index) => `${index ? "L" : "M"}${at(point)}`).join("");
}
