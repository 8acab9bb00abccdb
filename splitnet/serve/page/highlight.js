// Colours for code: comments, strings, numbers and keywords, found alike in all common languages.

import { element } from "./dom.js";

const MOST = 50_000; // characters: longer code stays plain
const HASH = new Set(
  "bash console cmake conf docker dockerfile elixir fish ini jl julia make makefile nix perl pl ps1 powershell py python r rb ruby sh shell toml yaml yml zsh".split(" "),
);
const DASHES = new Set("ada elm haskell hs lua plsql postgresql psql sql vhdl".split(" "));
const KEYWORDS = new Set(
  `abstract and as assert async await begin bool boolean break case catch char class const continue def default defer
  del delete do double elif else end enum except export extends extern false False final finally float fn for foreach
  from func function global go if impl implements import in include int interface internal is lambda let local long
  loop match mod module mut namespace new nil None nonlocal not null or package pass private protected pub public
  raise return select self short signed static string struct super switch then this throw trait true True try type
  typedef typeof union unsafe unsigned until use using var virtual void volatile when where while with yield
  ALTER AND AS BY CREATE DELETE DISTINCT DROP FROM GROUP HAVING INNER INSERT INTO JOIN LEFT LIMIT NOT NULL ON OR ORDER
  SELECT SET TABLE UPDATE VALUES WHERE done echo esac fi`.split(/\s+/),
);

// Every opening matches up to its closing or the end of the code, so that any code takes linear time.
const BLOCK_COMMENT = String.raw`\/\*[^]*?(?:\*\/|$)|<!--[^]*?(?:-->|$)`;
const STRING = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n]){0,400}'|${"`"}(?:\\[^]|[^\\${"`"}])*${"`"}?`;
const NUMBER = String.raw`\b(?:0[xX][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const tokens = (comment) => new RegExp(`(?<comment>${comment})|(?<string>${STRING})|(?<number>${NUMBER})|[A-Za-z_]\\w*`, "g");
const IN_HASH = tokens(String.raw`(?<=^|\s)#.*`);
const IN_DASHES = tokens(`--.*|${BLOCK_COMMENT}`);
const IN_OTHERS = tokens(String.raw`\/\/.*|${BLOCK_COMMENT}`);

/** Nodes that show code; an unnamed or unknown language is read with the comments of C. */
export function highlighted(code, language) {
  if (!language || language === "text" || code.length > MOST) return [code];
  const nodes = [];
  let plain = 0;
  const pattern = HASH.has(language) ? IN_HASH : DASHES.has(language) ? IN_DASHES : IN_OTHERS;
  for (const { 0: text, index, groups } of code.matchAll(pattern)) {
    const kind = Object.keys(groups).find((name) => groups[name] !== undefined) ?? (KEYWORDS.has(text) && "keyword");
    if (!kind) continue;
    nodes.push(code.slice(plain, index), element("span", `code-${kind}`, text));
    plain = index + text.length;
  }
  return [...nodes, code.slice(plain)];
}
