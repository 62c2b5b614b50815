// The page: what is asked, shown and remembered.

import { Failure, body, curl, model, python, sent, stream } from "./api.js";
import { Viewer, dataUrl, forget, keep, kindOf, recall } from "./media.js";
import { el } from "./render.js";
import { TurnView } from "./turn.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer();

// What survives a reload; the bytes of media are in the database.
let turns = [];
let items = [];
let pending = [];
let settings = {};

let modelName = "";
let views = new Map();
let running;

const item = (id) => items.find((one) => one.id === id);
const size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const id = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (n) => n.toString(36).padStart(2, "0")).join("");

// Storage may be forbidden or full; the page then works without it.

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function write(storage, name, value) {
  try {
    storage.setItem(name, JSON.stringify(value));
  } catch {
    // See above.
  }
}

function save() {
  const plain = items.map(({ blob, url, ...rest }) => rest);
  write(sessionStorage, "keye.chat", { turns, items: plain, pending, draft: $("question").value });
}

async function restore() {
  settings = read(localStorage, "keye.settings", {});
  const chat = read(sessionStorage, "keye.chat", {});
  const { draft = "" } = chat;
  ({ turns = [], items = [], pending = [] } = chat);
  await forget([]);
  for (const one of items) {
    one.blob = await recall(one.id);
    if (one.blob) one.url = URL.createObjectURL(one.blob);
  }
  for (const turn of turns) {
    if (!turn.running) continue;
    delete turn.running;
    turn.stopped = true;
  }
  pending = pending.filter((one) => item(one)?.blob);
  $("question").value = draft;
  draw();
}

// Drawing.

function draw() {
  views = new Map();
  $("turns").replaceChildren();
  for (const turn of turns) addView(turn);
  refresh();
  drawPending();
  viewer.update(items);
  scroll(true);
}

function addView(turn) {
  const names = turn.media.map((one) => item(one)?.name ?? "media");
  const view = new TurnView(turn, names, acts, (one) => viewer.update(items, one));
  views.set(turn, view);
  $("turns").append(view.element);
  return view;
}

function refresh() {
  const longest = viewer.longest();
  for (const [turn, view] of views) view.update(turn === running?.turn, turn === turns.at(-1), longest);
  $("hints").hidden = turns.length > 0;
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
}

function drawPending() {
  $("pending").replaceChildren(
    ...pending.map((one) => {
      const { name, blob } = item(one);
      const remove = el("button", { type: "button" }, "×");
      remove.setAttribute("aria-label", `Remove ${name}`);
      remove.addEventListener("click", () => {
        pending = pending.filter((other) => other !== one);
        drop([one]);
        drawPending();
        $("question").focus();
      });
      return el("li", {}, el("span", {}, name), el("small", {}, size(blob.size)), remove);
    }),
  );
  $("pending").hidden = pending.length === 0;
}

/** Keeps the newest in sight, unless the reader has scrolled up. */
function scroll(force) {
  for (const box of [$("turns"), document.scrollingElement]) {
    if (force || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
  }
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// Media.

function add(files) {
  const refused = [];
  for (const file of files) {
    const kind = kindOf(file);
    if (!kind || file.size === 0) {
      refused.push(`${file.name || "That"} is ${kind ? "empty" : "neither a clip nor a picture"}.`);
      continue;
    }
    const name = file.name || (kind === "video" ? "clip.mp4" : "picture.png");
    const one = { id: id(), name, kind, blob: file, url: URL.createObjectURL(file) };
    items.push(one);
    pending.push(one.id);
    keep(one);
  }
  notice(refused.join(" "));
  drawPending();
  viewer.update(items, pending.at(-1));
  save();
  $("question").focus();
}

/** Forgets media that no turn has any more. */
function drop(ids) {
  const gone = ids.filter((one) => !pending.includes(one) && !turns.some((turn) => turn.media.includes(one)));
  for (const one of items) if (gone.includes(one.id) && one.url) URL.revokeObjectURL(one.url);
  items = items.filter((one) => !gone.includes(one.id));
  forget(gone);
  viewer.update(items);
  save();
}

// Asking.

function ask() {
  const question = $("question").value.trim();
  if (running) return;
  if (!question) {
    notice("What do you want to know? Write a question first.");
    return;
  }
  notice("");
  const turn = { question, media: pending, answer: "", reasoning: "" };
  pending = [];
  turns.push(turn);
  $("question").value = "";
  grow();
  addView(turn);
  drawPending();
  answer(turn);
}

async function answer(turn) {
  const view = views.get(turn);
  const abort = new AbortController();
  Object.assign(turn, { answer: "", reasoning: "", running: true });
  for (const name of ["usage", "seconds", "finish", "stopped", "error", "warning", "thought", "mediaFault"]) delete turn[name];
  running = { turn, abort };
  refresh();
  scroll(true);
  const asked = upTo(turn);
  const media = sent(asked).flatMap((one) => one.media);
  const began = performance.now();
  let saved = began;
  let dirty = false;
  const paint = () => {
    dirty = false;
    if (running?.turn === turn) refresh();
    scroll(false);
  };
  try {
    view.report(media.length > 0 ? `Sending ${media.map((one) => one.name).join(", ")}` : "Sending");
    const urls = new Map();
    for (const one of media) {
      if (!one.blob) throw new Failure(`${one.name} did not survive the reload. Start a new chat and add it again.`);
      urls.set(one, await dataUrl(one));
    }
    const request = body(modelName, asked, settings, (one) => urls.get(one));
    urls.clear();
    let stage = "";
    for await (const chunk of stream(request, read(sessionStorage, "keye.key", ""), abort.signal)) {
      if (chunk.keye) {
        report(view, chunk.keye, media, stage !== chunk.keye.stage);
        stage = chunk.keye.stage;
      }
      if (chunk.usage) turn.usage = chunk.usage;
      if (chunk.warnings) {
        turn.warning = chunk.warnings.map((told) => `${media[told.media]?.name ?? "media"}: ${told.message}`).join("; ");
      }
      const [choice] = chunk.choices;
      if (!choice) continue;
      const { content, reasoning_content: reasoning } = choice.delta;
      if (reasoning) turn.reasoning += reasoning;
      if (content && !turn.answer && turn.reasoning) turn.thought = performance.now() - began;
      if (content) turn.answer += content;
      if (content || reasoning) view.report("");
      if (choice.finish_reason) turn.finish = choice.finish_reason;
      if (!dirty) requestAnimationFrame(paint);
      dirty = true;
      if (performance.now() - saved > 1000) {
        saved = performance.now();
        save();
      }
    }
    $("status").textContent = "The answer is complete.";
  } catch (error) {
    if (error.name === "AbortError") {
      turn.stopped = true;
      $("status").textContent = "Stopped.";
    } else {
      turn.error = error instanceof Failure ? error.message : `Something is wrong with this page: ${error.message}`;
      turn.mediaFault = Boolean(error.code?.startsWith("media_"));
      // The server knows the bytes by no name.
      if (turn.mediaFault && media.length === 1) turn.error = turn.error.replace(/^data:/iu, `${media[0].name}:`);
      if (error.status === 401) askForKey();
    }
  }
  turn.seconds = (performance.now() - began) / 1000;
  delete turn.running;
  running = undefined;
  refresh();
  scroll(false);
  save();
}

/** Tells of the work before the first token; the frames that the model sees go to the viewer. */
function report(view, told, media, isNew) {
  const one = media[told.media];
  const name = one?.name ?? "the media";
  if (told.stage === "ready" && one) {
    one.frames = told.frames;
    one.tokens = told.tokens;
    if (viewer.shown === one) viewer.frames();
  }
  const part = told.total ? told.done / told.total : undefined;
  const [text, done] = {
    queued: () => ["Waiting for its turn"],
    fetching: () => [`Reading ${name}`, part],
    decoding: () => [`Decoding ${name}${told.total ? `, frame ${told.done} of ${told.total}` : ""}`, part],
    ready: () => [told.estimate > 5 ? `Looking at ${name}, about ${Math.round(told.estimate)} s` : `Looking at ${name}`],
    vision: () => [`Looking at ${name}, ${Math.round(told.done * 100)} %`, told.done],
    prefill: () => [`Reading the prompt, token ${told.done} of ${told.total}`, part],
  }[told.stage]?.() ?? ["Working"];
  view.report(text, done);
  if (isNew) $("status").textContent = text;
}

function stop() {
  running?.abort.abort();
  $("question").focus();
}

const acts = {
  copy: (turn, button) => copy(turn.answer, button),
  curl: (turn, button) => copy(curl(modelName, upTo(turn), settings, read(sessionStorage, "keye.key", "")), button),
  python: (turn, button) => copy(python(modelName, upTo(turn), settings, read(sessionStorage, "keye.key", "")), button),
  retry: (turn) => running || answer(turn),
  edit: (turn) => {
    if (running) return;
    turns = turns.filter((one) => one !== turn);
    pending = [...turn.media.filter((one) => item(one)?.blob), ...pending];
    $("question").value = turn.question;
    draw();
    grow();
    save();
    $("question").focus();
  },
};

/** The turns as they were sent for this one, with media that are still known. */
function upTo(turn) {
  const known = turns.slice(0, turns.indexOf(turn) + 1);
  return known.map((one) => ({ ...one, media: one.media.map(item).filter(Boolean) }));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages on plain http have this older way only.
    const area = el("textarea", { value: text, class: "hidden" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  $("status").textContent = "Copied.";
  setTimeout(() => (button.textContent = before), 1200);
}

function clear() {
  if (turns.length > 0 && !confirm("Forget this chat and its media?")) return;
  running?.abort.abort();
  const gone = items.map((one) => one.id);
  turns = [];
  pending = [];
  $("question").value = "";
  notice("");
  drop(gone);
  draw();
  grow();
  $("question").focus();
}

// Settings, key, theme.

function bindSettings() {
  const form = $("settings").querySelector("form");
  const fill = () => {
    for (const field of form.elements) if (field.name) field.value = settings[field.name] ?? "";
  };
  form.addEventListener("input", ({ target }) => {
    if (!target.validity.valid) return;
    const value = target.type === "number" && target.value ? Number(target.value) : target.value;
    if (value === "") delete settings[target.name];
    else settings[target.name] = value;
    write(localStorage, "keye.settings", settings);
  });
  $("defaults").addEventListener("click", () => {
    settings = {};
    write(localStorage, "keye.settings", settings);
    fill();
  });
  $("open-settings").addEventListener("click", () => {
    fill();
    $("settings").showModal();
  });
}

function askForKey() {
  if (read(sessionStorage, "keye.key", "")) $("key-note").textContent = "The key that was given is not one that it knows.";
  if (!$("key").open) $("key").showModal();
}

async function greet() {
  try {
    modelName = await model(read(sessionStorage, "keye.key", ""));
    // A model may be named by its folder; the last parts tell enough.
    const short = modelName.split("/").slice(-2).join("/");
    $("model").textContent = short;
    $("model").title = modelName;
    document.title = `${short} · Keye`;
  } catch (error) {
    if (error.status === 401) askForKey();
    else notice(error.message);
  }
}

const THEMES = ["auto", "light", "dark"];

function theme(next) {
  const chosen = THEMES.includes(next) ? next : "auto";
  document.documentElement.dataset.theme = chosen;
  $("theme").textContent = `Theme: ${chosen}`;
  return chosen;
}

function bindTheme() {
  let chosen = theme(read(localStorage, "keye.theme", "auto"));
  $("theme").addEventListener("click", () => {
    chosen = theme(THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length]);
    write(localStorage, "keye.theme", chosen);
  });
}

// Events.

function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, 220)}px`;
}

function bindFiles() {
  const choose = () => $("file").click();
  $("choose").addEventListener("click", choose);
  $("add").addEventListener("click", choose);
  $("file").addEventListener("change", () => {
    add($("file").files);
    $("file").value = "";
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const over = (change) => (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth += change;
    $("drop").hidden = depth <= 0;
  };
  addEventListener("dragenter", over(1));
  addEventListener("dragleave", over(-1));
  addEventListener("dragover", over(0));
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    add(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length === 0) return;
    event.preventDefault();
    add(event.clipboardData.files);
  });
}

function bind() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  $("question").addEventListener("input", grow);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", clear);
  $("turns").addEventListener("click", (event) => {
    const link = event.target.closest("a.time");
    if (!link) return;
    event.preventDefault();
    viewer.seek(Number(link.hash.slice(3)));
  });
  for (const hint of document.querySelectorAll(".hint")) {
    hint.addEventListener("click", () => {
      $("question").value = hint.textContent;
      grow();
      $("question").focus();
    });
  }
  $("key").addEventListener("close", () => {
    const value = $("key-value").value.trim();
    if (!value) return;
    write(sessionStorage, "keye.key", value);
    $("key-value").value = "";
    greet();
    const last = turns.at(-1);
    if (last?.error && !last.answer) answer(last);
  });
  addEventListener("pagehide", save);
  // Lengths of clips decide which times of an answer are links.
  $("screen").addEventListener("loadedmetadata", refresh, true);
  bindFiles();
  bindSettings();
  bindTheme();
}

bind();
await restore();
grow();
greet();
if (matchMedia("(hover: hover)").matches) $("question").focus();
