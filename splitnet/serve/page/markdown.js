// Markdown as models write it: headings, lists, tables, quotes, code, emphasis and links.
//
// The text is untrusted. It becomes text nodes and elements that this file chooses; links lead to http and https only.
// Long or deeply nested parts stay plain, so that no text takes much more than linear time.

import { copyButton } from "./copy.js";
import { element } from "./dom.js";
import { highlighted } from "./highlight.js";

const LONG_TEXT = 200_000; // characters
const LONG_BLOCK = 20_000;
const DEEP = 6;

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const FIRST_ITEM = /^[ \t]*([-*+]|1[.)])[ \t]+\S/; // within a paragraph a year at the begin of a line is no item
const SPECIAL = /\\[!-/:-@[-`{-~]|`+|!?\[|<(?:https?:[^<>\s]+|br ?\/?)>|https?:\/\/[^\s<>"`]+|\*\*|__|~~|[*_]/g;
const LINK = /([^[\]]{0,1000})\]\(\s{0,9}<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,500}\)[^\s<>()]{0,500})?)>?(?:\s{1,9}"[^"]{0,500}")?\s{0,9}\)/y;
const EMPHASIS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };

const sources = new WeakMap(); // of elements

/** Shows a text in `parent`. Unchanged blocks keep their elements, so that a text can grow. */
export function showMarkdown(parent, text) {
  const blocks = blocksOf(text.slice(0, LONG_TEXT).split("\n"));
  if (text.length > LONG_TEXT) blocks.push({ kind: "plain", source: text.slice(LONG_TEXT) });
  const shown = [...parent.children];
  blocks.forEach((block, index) => {
    const there = shown[index];
    if (there && sources.get(there) === block.source) return;
    const made = rendered(block, 0);
    sources.set(made, block.source);
    if (there) there.replaceWith(made);
    else parent.append(made);
  });
  for (const over of shown.slice(blocks.length)) over.remove();
}

/** `{kind, lines, source}` of each block, in order. */
function blocksOf(lines) {
  const blocks = [];
  for (let at = 0, end; at < lines.length; at = end) {
    const [kind, own] = lines[at].trim() ? blockAt(lines, at) : [null, at + 1];
    end = own;
    if (kind) blocks.push({ kind, lines: lines.slice(at, end), source: lines.slice(at, end).join("\n") });
  }
  return blocks;
}

function blockAt(lines, at) {
  const first = lines[at];
  const endWhere = (isOver) => {
    let end = at + 1;
    while (end < lines.length && !isOver(lines[end], end)) end += 1;
    return end;
  };
  const fence = FENCE.exec(first)?.[1];
  if (fence) return ["code", endWhere((line) => closes(line, fence)) + 1];
  if (HEADING.test(first)) return ["heading", at + 1];
  if (RULE.test(first)) return ["rule", at + 1];
  if (QUOTE.test(first)) return ["quote", endWhere((line) => !line.trim() || (!QUOTE.test(line) && begins(line)))];
  if (ITEM.test(first)) return ["list", listEnd(lines, at)];
  if (isTable(lines, at)) return ["table", endWhere((line) => !line.includes("|"))];
  return ["text", endWhere((line, index) => !line.trim() || begins(line) || isTable(lines, index))];
}

const begins = (line) => [FENCE, HEADING, RULE, QUOTE, FIRST_ITEM].some((pattern) => pattern.test(line));
const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
const indent = (line) => line.search(/\S/);
const isOrdered = (line) => /\d/.test(ITEM.exec(line)[2]);

function isTable(lines, at) {
  const divider = lines[at + 1] ?? "";
  return lines[at].includes("|") && divider.includes("|") && divider.includes("-") && /^[ \t|:-]+$/.test(divider);
}

function listEnd(lines, at) {
  const [base, ordered] = [indent(lines[at]), isOrdered(lines[at])];
  let end = at + 1;
  for (let next = end; next < lines.length; next += 1) {
    const line = lines[next];
    if (!line.trim()) continue;
    const goesOn = next === end && !begins(line) && !ITEM.test(line);
    const isNext = ITEM.test(line) && !RULE.test(line) && isOrdered(line) === ordered;
    if (indent(line) <= base && !goesOn && !isNext) break;
    end = next + 1;
  }
  return end;
}

function rendered({ kind, lines, source }, depth) {
  if (kind === "code") return codeBlock(lines);
  if (kind === "plain" || depth > DEEP || source.length > LONG_BLOCK) return element("p", "", source);
  const inner = (own) => blocksOf(own).map((block) => rendered(block, depth + 1));
  const [, level, title] = HEADING.exec(lines[0]) ?? [];
  if (kind === "heading") return element(`h${Math.min(level.length + 2, 6)}`, "", ...inline(title)); // below the page's
  if (kind === "rule") return element("hr");
  if (kind === "quote") return element("blockquote", "", ...inner(lines.map((line) => line.replace(QUOTE, ""))));
  if (kind === "list") return list(lines, inner);
  if (kind === "table") return table(lines);
  return element("p", "", ...inline(source));
}

function codeBlock(lines) {
  const [, fence, info] = FENCE.exec(lines[0]);
  const whole = lines.length > 1 && closes(lines.at(-1), fence);
  const [code, language] = [lines.slice(1, whole ? -1 : undefined).join("\n"), info.trim().split(/\s/)[0].slice(0, 30)];
  const copy = copyButton("the code", () => code);
  const head = language ? element("div", "code-head", element("span", "", language), copy) : element("div", "code-head bare", copy);
  const shown = element("pre", "", element("code", "", ...highlighted(code, language.toLowerCase())));
  shown.tabIndex = 0; // it scrolls
  return element("div", "code-block", head, shown);
}

function list(lines, inner) {
  const [base, items] = [indent(lines[0]), []];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base) items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(line.slice(Math.min(Math.max(indent(line), 0), items.at(-1).width)));
  }
  const made = element(isOrdered(lines[0]) ? "ol" : "ul", "", ...items.map((item) => element("li", "", ...inner(item.lines))));
  if (made.tagName === "OL") made.start = parseInt(lines[0].trim(), 10);
  return made;
}

function table([first, divider, ...rest]) {
  const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/);
  const sides = cells(divider).map((cell) => (/^-+:$/.test(cell.trim()) ? "number" : ""));
  const row = (tag) => (line) => {
    const made = cells(line).slice(0, sides.length);
    return element("tr", "", ...made.map((cell, side) => element(tag, sides[side], ...inline(cell.trim().replaceAll("\\|", "|")))));
  };
  const body = element("tbody", "", ...rest.map(row("td")));
  return element("div", "table", element("table", "", element("thead", "", row("th")(first)), body));
}

/** Nodes of a text within a block. */
function inline(text, depth = 0) {
  if (depth > DEEP) return [text];
  const [nodes, missing, special] = [[], new Set(), new RegExp(SPECIAL)];
  let plain = 0;
  for (let found = special.exec(text); found; found = special.exec(text)) {
    const { 0: mark, index } = found;
    let [node, end] = [null, index + mark.length];
    if (mark[0] === "\\") {
      node = mark[1];
    } else if (mark.endsWith("[")) {
      LINK.lastIndex = end;
      const [whole, label, href] = LINK.exec(text) ?? [];
      if (whole) [node, end] = [link(href, label.replace(/\*\*|`/g, "") || "image"), end + whole.length];
    } else if (mark[0] === "<") {
      node = mark.startsWith("<br") ? element("br") : link(mark.slice(1, -1), mark.slice(1, -1));
    } else if (mark.startsWith("http")) {
      const href = withoutStop(mark);
      [node, end] = [link(href, href), index + href.length];
    } else if (!missing.has(mark) && opens(text, mark, index)) {
      const close = closing(text, mark, end);
      if (close < 0) missing.add(mark);
      else if (mark[0] === "`") node = element("code", "", text.slice(end, close).trim());
      else node = element(EMPHASIS[mark], "", ...inline(text.slice(end, close), depth + 1));
      if (node) end = close + mark.length;
    }
    if (node === null) continue;
    nodes.push(text.slice(plain, index), node);
    plain = special.lastIndex = end;
  }
  return [...nodes, text.slice(plain)];
}

/** A link to the web; null: the address is not http or https. */
function link(href, label) {
  const url = URL.canParse(href) && new URL(href);
  if (!url || !["http:", "https:"].includes(url.protocol)) return null;
  return Object.assign(element("a", "", label), { href: url.href, target: "_blank", rel: "noopener noreferrer" });
}

/** An address without the punctuation of the sentence around it. */
function withoutStop(address) {
  let end = address.length;
  while (".,;:!?'*_".includes(address[end - 1]) || (address[end - 1] === ")" && !address.includes("("))) end -= 1;
  return address.slice(0, end);
}

function opens(text, mark, index) {
  if (mark[0] === "`") return true;
  return /\S/.test(text[index + mark.length] ?? "") && !(mark[0] === "_" && /\w/.test(text[index - 1] ?? ""));
}

/** The index of the mark that closes an opened one; negative: there is none. */
function closing(text, mark, from) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at)) {
    const begin = at;
    while (text[at] === mark[0]) at += 1;
    if (mark[0] === "`") {
      if (at - begin === mark.length) return begin;
    } else if (begin > from && at - begin !== 3 - mark.length && /\S/.test(text[begin - 1])) {
      if (mark[0] !== "_" || !/\w/.test(text[at] ?? "")) return at - mark.length;
    }
  }
  return -1;
}
