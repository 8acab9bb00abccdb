// Elements from data. Text only becomes text nodes: texts of peers are never read as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** An element with a class and children; strings become text. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/** A button with a text; `more` is a further text for screen readers only. */
export function button(text, more, act) {
  const made = element("button", "quiet", text, element("span", "visually-hidden", ` ${more}`));
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/** An SVG element with attributes. */
export function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Sets a text; does not touch the node if the text is the same, so that selections and screen readers are not disturbed. */
export function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

/**
 * Gives `parent` one child for each of `items`, in order; keeps elements whose key is still present.
 * `create(item)` makes an element, `update(element, item)` updates it.
 */
export function keyed(parent, items, keyOf, create, update) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = known.get(key);
    if (child) {
      known.delete(key);
    } else {
      child = create(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const child of known.values()) child.remove();
}
