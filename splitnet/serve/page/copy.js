// Copies texts, also on pages over plain HTTP, where browsers offer no clipboard.

import { button, element } from "./dom.js";

const TOLD_MS = 1500;

/** A button that copies the text of `textOf`; `more`: a description of the text for screen readers. */
export function copyButton(more, textOf) {
  const made = button("Copy", more, async () => {
    const copied = await navigator.clipboard?.writeText(textOf()).then(() => true, () => false);
    made.replaceChildren(copied || copyBySelection(textOf(), made) ? "Copied" : "Not copied");
    setTimeout(() => made.replaceChildren(...named), TOLD_MS);
  });
  const named = [...made.childNodes];
  return made;
}

function copyBySelection(text, focused) {
  const area = element("textarea", "visually-hidden");
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused.focus();
  return copied;
}
