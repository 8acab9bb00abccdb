// Images for the next question: pasted, dropped or chosen files, shown until they are sent or removed.

import { button, byId, element } from "./dom.js";
import { seesImages } from "./models.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const waiting = byId("images");
const form = byId("chat-form");

/** A small picture of an image. */
export const thumbnail = (url) => Object.assign(element("img", "thumbnail"), { src: url, alt: "image" });

/** The images for the next question as data URLs; they no longer wait. */
export function takeImages() {
  const urls = [...waiting.querySelectorAll("img")].map((image) => image.src);
  waiting.replaceChildren();
  return urls;
}

/** The content of a question in OpenAI's form. */
export const contentOf = (text, images) => images?.length
  ? [...images.map((url) => ({ type: "image_url", image_url: { url } })), ...(text ? [{ type: "text", text }] : [])]
  : text;

function add(event, files) {
  const images = [...(files ?? [])].filter((file) => TYPES.includes(file.type));
  if (!images.length || !seesImages()) return;
  event.preventDefault();
  for (const file of images) {
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      const shown = element("span", "waiting", thumbnail(reader.result), button("Remove", "image", () => shown.remove()));
      waiting.append(shown);
    });
    reader.readAsDataURL(file);
  }
}

form.addEventListener("paste", (event) => add(event, event.clipboardData?.files));
form.addEventListener("drop", (event) => add(event, event.dataTransfer?.files));
form.addEventListener("dragover", (event) => {
  if (seesImages() && event.dataTransfer?.types.includes("Files")) event.preventDefault();
});
