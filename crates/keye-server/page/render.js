// Text of a model to elements. Nothing here parses HTML: what looks like a tag stays text.

/** An element with properties and children. */
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") element.className = value;
    else if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const NUMBER = String.raw`\d+(?:\.\d+)?`;
const SECONDS = String.raw`(?:seconds?|secs?|s|秒)(?![a-z])`;
const TO = String.raw`\s*(?:-|–|—|~|to|and|until|到|至)\s*`;
const TIME = new RegExp(
  String.raw`(?<![\w.:])(?:(?:(\d{1,2}):)?(\d{1,2}):(\d{2}(?:\.\d+)?)(?![\w:])` +
    String.raw`|(\d+)\s?(?:minutes?|mins?|m|分钟?)\s?(?:and\s)?(${NUMBER})\s?${SECONDS}` +
    String.raw`|(?:(${NUMBER})(\s?${SECONDS})?(${TO}))?(${NUMBER})\s?${SECONDS})`,
  "giu",
);

/** Stretches of time as models mark them, made readable. */
const readable = (text) => text.replace(/<\|clip_time_start\|>\[([\d.]+), ?([\d.]+)\]<\|clip_time_end\|>/gu, "$1–$2 s");

/**
 * Splits a text at the times in it: strings, and `{text, time}` with seconds. Known are `3.2s`, `5 seconds`, `1 min 20 s`,
 * `00:12`, `1:02:03.5` and ranges of them; what is later than `longest` is no time.
 */
export function splitTimes(text, longest = Infinity) {
  const pieces = [];
  let from = 0;
  const push = (piece) => piece && pieces.push(piece);
  const time = (said, seconds) => push(Number.isFinite(seconds) && seconds <= longest ? { text: said, time: seconds } : said);
  for (const match of text.matchAll(TIME)) {
    const [all, hours, minutes, seconds, min, sec, first, unit, to, last] = match;
    push(text.slice(from, match.index));
    from = match.index + all.length;
    if (minutes !== undefined) {
      const plausible = Number(seconds) < 60 && (hours === undefined || Number(minutes) < 60);
      time(all, plausible ? Number(hours ?? 0) * 3600 + Number(minutes) * 60 + Number(seconds) : Infinity);
    } else if (min !== undefined) {
      time(all, Number(min) * 60 + Number(sec));
    } else {
      const head = first === undefined ? "" : first + (unit ?? "");
      if (head) time(head, Number(first));
      push(to);
      time(all.slice(head.length + (to ?? "").length), Number(last));
    }
  }
  push(text.slice(from));
  return pieces;
}

/** Seconds as a player shows them. */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const [h, m, s] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60, (tenths % 600) / 10];
  const two = (n) => String(n).padStart(2, "0");
  const rest = s.toFixed(1).padStart(4, "0");
  return h ? `${h}:${two(m)}:${rest}` : `${m}:${rest}`;
}

const INLINE = /(`+)(.+?)\1|\*\*(\S(?:.*?\S)?)\*\*|__(\S(?:.*?\S)?)__|(?<![\w*])\*(\S(?:[^*]*?\S)?)\*(?![\w*])|(?<!\w)_(\S(?:[^_]*?\S)?)_(?!\w)|!?\[([^\]\n]{0,200})\]\((https?:\/\/[^\s)]+)\)|\\([\\`*_{}[\]()#+\-.!|<>~])/su;

/** Emphasis, code, links and times inside a block. Nesting is bounded. */
function inline(parent, text, longest, depth = 0) {
  while (text) {
    const match = depth < 6 ? INLINE.exec(text) : null;
    const plain = match ? text.slice(0, match.index) : text;
    for (const piece of splitTimes(plain, longest)) {
      parent.append(
        typeof piece === "string" ? piece : el("a", { class: "time", href: `#t=${piece.time}` }, piece.text),
      );
    }
    if (!match) return;
    const [all, , code, bold, bold2, italic, italic2, label, url, escaped] = match;
    const nested = (name, inner) => {
      const element = el(name);
      inline(element, inner, longest, depth + 1);
      parent.append(element);
    };
    if (code !== undefined) parent.append(el("code", {}, code.replace(/^ (.+) $/su, "$1")));
    else if (bold ?? bold2) nested("strong", bold ?? bold2);
    else if (italic ?? italic2) nested("em", italic ?? italic2);
    else if (url) parent.append(el("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, label || url));
    else parent.append(escaped);
    text = text.slice(match.index + all.length);
  }
}

const FENCE = /^\s{0,3}(```+|~~~+)/u;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/u;
const ITEM = /^(\s*)(?:[-*+•]|(\d{1,9})[.)])\s+(.*)$/u;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/u;
const QUOTE = /^\s{0,3}>\s?/u;
const DASHES = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/u;

/** Splits markdown into blocks: `{kind, source, ...}`. */
function blocks(text) {
  const lines = readable(text).replace(/\r\n?/gu, "\n").split("\n");
  const found = [];
  let at = 0;
  const take = (kind, end, more = {}) => {
    found.push({ kind, source: lines.slice(at, end).join("\n"), lines: lines.slice(at, end), ...more });
    at = end;
  };
  const run = (belongs) => {
    let end = at + 1;
    while (end < lines.length && belongs(lines[end], end)) end += 1;
    return end;
  };
  const isTable = (index) => lines[index].includes("|") && DASHES.test(lines[index + 1] ?? "");
  const starts = (line, index) =>
    [FENCE, HEADING, ITEM, QUOTE, RULE].some((pattern) => pattern.test(line)) || isTable(index);
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (!line.trim()) at += 1;
    else if (fence) {
      const closes = (other) => other.trim().startsWith(fence[1]) && !other.trim().slice(fence[1].length).trim();
      const end = run((other) => !closes(other));
      take("code", Math.min(end + 1, lines.length), { body: lines.slice(at + 1, end).join("\n") });
    } else if (heading) take("heading", at + 1, { level: heading[1].length, body: heading[2] });
    else if (RULE.test(line)) take("rule", at + 1);
    else if (ITEM.test(line)) {
      const goesOn = (other = "") => ITEM.test(other) || /^\s+\S/u.test(other);
      take("list", run((other, index) => goesOn(other) || (!other.trim() && goesOn(lines[index + 1]))));
    } else if (QUOTE.test(line)) take("quote", run((other) => QUOTE.test(other)));
    else if (isTable(at)) {
      take("table", run((other) => other.includes("|")));
    } else take("paragraph", run((other, end) => other.trim() && !starts(other, end)));
  }
  return found;
}

function list(lines, longest, depth) {
  const [, indent, number] = ITEM.exec(lines[0]);
  const root = el(number ? "ol" : "ul");
  if (number && number !== "1") root.start = Number(number);
  let at = 0;
  while (at < lines.length) {
    const [, , , first] = ITEM.exec(lines[at]) ?? [, , , lines[at].trim()];
    let end = at + 1;
    const outer = (line) => {
      const item = ITEM.exec(line);
      return item && item[1].length <= indent.length + 1;
    };
    while (end < lines.length && !outer(lines[end])) end += 1;
    const item = el("li");
    inline(item, first, longest);
    const rest = lines.slice(at + 1, end);
    if (rest.some((line) => line.trim())) {
      const margin = Math.min(...rest.filter((line) => line.trim()).map((line) => /^\s*/u.exec(line)[0].length));
      const inner = rest.map((line) => line.slice(margin)).join("\n");
      for (const block of blocks(inner)) item.append(element(block, longest, depth + 1));
    }
    root.append(item);
    at = end;
  }
  return root;
}

function table(lines, longest) {
  const cells = (line) => line.trim().replace(/^\||\|$/gu, "").split(/(?<!\\)\|/u).map((cell) => cell.trim());
  const row = (line, name) => {
    const tr = el("tr");
    for (const cell of cells(line)) {
      const td = el(name);
      inline(td, cell, longest);
      tr.append(td);
    }
    return tr;
  };
  const body = el("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return el("div", { class: "table", tabIndex: 0 }, el("table", {}, el("thead", {}, row(lines[0], "th")), body));
}

function element(block, longest, depth = 0) {
  if (depth > 8) return el("p", {}, block.source);
  switch (block.kind) {
    case "code":
      return el("pre", { tabIndex: 0 }, el("code", {}, block.body));
    case "rule":
      return el("hr");
    case "list":
      return list(block.lines, longest, depth);
    case "table":
      return table(block.lines, longest);
    case "quote": {
      const quote = el("blockquote");
      const inner = block.lines.map((line) => line.replace(QUOTE, "")).join("\n");
      for (const part of blocks(inner)) quote.append(element(part, longest, depth + 1));
      return quote;
    }
    default: {
      // The page has headings of its own above those of an answer.
      const made = el(block.kind === "heading" ? `h${Math.min(block.level + 2, 6)}` : "p");
      inline(made, block.body ?? block.lines.map((line) => line.trim()).join("\n"), longest);
      return made;
    }
  }
}

const sources = new WeakMap();

/** Shows `text` in `parent`; blocks that are as before stay, with selection and focus in them. */
export function show(parent, text, longest = Infinity) {
  const wanted = blocks(text);
  wanted.forEach((block, index) => {
    const source = `${longest} ${block.kind} ${block.source}`;
    const old = parent.children[index];
    if (old && sources.get(old) === source) return;
    const made = element(block, longest);
    sources.set(made, source);
    if (old) old.replaceWith(made);
    else parent.append(made);
  });
  while (parent.children.length > wanted.length) parent.lastElementChild.remove();
}
