// Clips and pictures: kept in the browser's database over a reload, shown in the viewer, cut into a filmstrip.

import { clock, el } from "./render.js";

const VIDEO_NAMES = /\.(mp4|m4v|mov|mkv|webm|avi|flv|ts|mpe?g|wmv|3gp|ogv)$/iu;
const IMAGE_NAMES = /\.(png|jpe?g|webp|gif|bmp|tiff?)$/iu;

/** `video`, `image`, or undefined for what is neither. */
export function kindOf(file) {
  if (file.type.startsWith("video/") || VIDEO_NAMES.test(file.name)) return "video";
  if (file.type.startsWith("image/") || IMAGE_NAMES.test(file.name)) return "image";
  return undefined;
}

/** The bytes as a data URL, with a type even where the browser knows none. */
export function dataUrl(item) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onerror = () => reject(new Error(`${item.name} can no longer be read; choose it again.`));
    reader.onload = () => resolve(`data:${mime(item)};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    reader.readAsDataURL(item.blob);
  });
}

/** The type that the data URL has. */
export function mime(item) {
  return item.blob?.type || (item.kind === "video" ? "video/mp4" : "image/png");
}

// The database. Where there is none (private windows), a reload loses the files and nothing else.

const DAY = 24 * 3600 * 1000;
let opened;

function store(mode) {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("keye", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("media", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened.then((database) => database.transaction("media", mode).objectStore("media"));
}

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Runs work on the database; undefined when there is none or it is full. */
const tried = async (mode, work) => {
  try {
    return await work(await store(mode));
  } catch {
    return undefined;
  }
};

export const keep = ({ id, blob }) => tried("readwrite", (media) => done(media.put({ id, blob, at: Date.now() })));

export const recall = (id) => tried("readonly", async (media) => (await done(media.get(id)))?.blob);

/** Forgets these, and what tabs that are long gone have left. */
export const forget = (ids) =>
  tried("readwrite", async (media) => {
    ids.forEach((id) => media.delete(id));
    for (const { id, at } of await done(media.getAll())) if (Date.now() - at > DAY) media.delete(id);
  });

// The viewer: one clip or picture at a time, with its filmstrip.

const HEIGHT = { slow: 64, fast: 40 };
const $ = (id) => document.getElementById(id);

export class Viewer {
  constructor() {
    this.items = [];
    this.shown = undefined;
    this.player = undefined;
    this.cutter = undefined;
    const strip = $("strip");
    strip.addEventListener("keydown", (event) => this.#move(event));
    strip.addEventListener("click", (event) => {
      const frame = event.target.closest("button");
      if (frame) this.seek(Number(frame.dataset.time));
    });
  }

  /** Shows these items; keeps the one shown when it is still among them, unless `select` names another. */
  update(items, select) {
    this.items = items;
    $("choose").hidden = items.length > 0;
    $("viewer").hidden = items.length === 0;
    const tabs = $("tabs");
    tabs.hidden = items.length < 2;
    tabs.replaceChildren(...items.map((item) => this.#tab(item)));
    const wanted = items.find((item) => item.id === select) ?? items.find((item) => item === this.shown) ?? items.at(-1);
    if (wanted !== this.shown) this.show(wanted);
    else this.#mark();
  }

  #tab(item) {
    const button = el("button", { type: "button" }, item.name);
    button.dataset.id = item.id;
    button.addEventListener("click", () => this.show(item));
    return button;
  }

  #mark() {
    for (const tab of $("tabs").children) tab.setAttribute("aria-pressed", String(tab.dataset.id === this.shown?.id));
  }

  show(item) {
    this.cutter?.close();
    this.cutter = undefined;
    this.player?.removeAttribute("src");
    this.player?.load();
    this.player = undefined;
    this.shown = item;
    this.#mark();
    const screen = $("screen");
    screen.replaceChildren();
    if (!item) return;
    if (!item.blob) {
      screen.append(el("p", { class: "gone" }, `${item.name} did not survive the reload. Add it again to see it.`));
    } else if (item.kind === "video") {
      const video = el("video", { controls: true, playsInline: true, preload: "metadata", src: item.url });
      video.setAttribute("aria-label", item.name);
      video.addEventListener("loadedmetadata", () => (item.duration = video.duration));
      video.addEventListener("timeupdate", () => this.#current(video.currentTime));
      video.addEventListener("error", () => {
        if (this.player !== video) return;
        const text = `This browser cannot play ${item.name}. The model can still look at it.`;
        screen.replaceChildren(el("p", { class: "gone" }, text));
      });
      this.player = video;
      screen.append(video);
    } else {
      screen.append(el("img", { src: item.url, alt: item.name }));
    }
    this.frames();
  }

  /** Moves the player; picks the last clip when a picture is shown. */
  seek(time) {
    if (!this.player) {
      const clip = this.items.findLast((item) => item.kind === "video" && item.blob);
      if (clip) this.show(clip);
    }
    this.#current(time);
    if (!this.player) return;
    const player = this.player;
    const go = () => (player.currentTime = time);
    player.pause();
    if (player.readyState > 0) go();
    else player.addEventListener("loadedmetadata", go, { once: true });
  }

  /** Longest time that an answer can mean. */
  longest() {
    const clips = this.items.filter((item) => item.kind === "video");
    return clips.length === 0 ? -1 : Math.max(...clips.map((item) => (item.duration ?? Infinity) + 0.5));
  }

  /** Draws the filmstrip of what is shown, once it is known what the model saw. */
  frames() {
    const [strip, item] = [$("strip"), this.shown];
    const frames = item?.frames ?? [];
    this.cutter?.close();
    this.cutter = undefined;
    $("strip-head").hidden = frames.length === 0;
    strip.hidden = frames.length === 0 || item.kind === "image";
    strip.replaceChildren();
    if (frames.length === 0) return;
    const slow = frames.filter((frame) => frame.kind === "slow").length;
    const tokens = `${item.tokens.toLocaleString("en")} tokens`;
    const { width, height } = frames[0];
    const legend = $("legend");
    if (item.kind === "image") {
      legend.replaceChildren(`${width} × ${height} pixels, ${tokens}`);
      return;
    }
    const mark = (kind) => el("i", { class: `mark ${kind}` });
    const parts =
      slow === frames.length
        ? [`${slow} frames`]
        : [mark("slow"), `${slow} slow, in full detail`, mark("fast"), `${frames.length - slow} fast, small`];
    legend.replaceChildren(...parts, ` · ${tokens}`);
    this.cutter = item.blob ? new Cutter(item.url) : undefined;
    strip.append(...frames.map((frame, index) => this.#frame(frame, index)));
    this.#current(this.player?.currentTime ?? 0);
  }

  #frame({ time, kind, width, height }, index) {
    const ratio = width / height;
    const canvas = el("canvas", { width: Math.round(HEIGHT[kind] * ratio * 1.5), height: HEIGHT[kind] * 1.5 });
    const label = time === null ? String(index + 1) : clock(time);
    const button = el("button", { type: "button", class: kind, tabIndex: index ? -1 : 0 }, canvas, el("span", {}, label));
    button.setAttribute("aria-label", `${label}, ${kind} frame, ${width} by ${height} pixels`);
    button.title = `${label} · ${kind} · ${width} × ${height}`;
    if (time !== null) {
      button.dataset.time = time;
      this.cutter?.want(canvas, time);
    }
    return button;
  }

  /** Marks the frame that is being shown: the last one that is not later. */
  #current(time) {
    const frames = [...$("strip").children];
    const at = frames.findLastIndex((frame) => Number(frame.dataset.time) <= time + 0.05);
    frames.forEach((frame, index) => {
      if (index === at) frame.setAttribute("aria-current", "true");
      else frame.removeAttribute("aria-current");
    });
    const strip = $("strip");
    const frame = frames[at];
    if (!frame || strip.matches(":hover, :focus-within")) return;
    strip.scrollLeft = frame.offsetLeft - strip.offsetLeft - (strip.clientWidth - frame.clientWidth) / 2;
  }

  #move(event) {
    const frames = [...$("strip").children];
    const at = frames.indexOf(document.activeElement);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: frames.length - 1 }[event.key];
    if (at < 0 || to === undefined || !frames[to]) return;
    event.preventDefault();
    frames[at].tabIndex = -1;
    frames[to].tabIndex = 0;
    frames[to].focus();
  }
}

/** Draws frames of a clip into canvases as they come into view, one after the other, from a player of its own. */
class Cutter {
  constructor(url) {
    this.video = el("video", { muted: true, preload: "auto", src: url });
    this.queue = [];
    this.times = new WeakMap();
    this.busy = false;
    this.observer = new IntersectionObserver(
      (entries) => {
        for (const { isIntersecting, target } of entries) {
          if (!isIntersecting) continue;
          this.observer.unobserve(target);
          this.queue.push(target);
        }
        this.#next();
      },
      { rootMargin: "0px 300px" },
    );
    this.video.addEventListener("loadeddata", () => this.#next());
    this.video.addEventListener("seeked", () => this.#draw());
  }

  want(canvas, time) {
    this.times.set(canvas, time);
    this.observer.observe(canvas);
  }

  close() {
    this.observer.disconnect();
    this.queue = [];
    this.video.removeAttribute("src");
    this.video.load();
  }

  #next() {
    if (this.busy || this.queue.length === 0 || this.video.readyState < 2) return;
    this.busy = true;
    // A little later than the frame begins, so that rounding does not show the one before.
    const time = this.times.get(this.queue[0]) + 0.01;
    const last = this.video.duration - 0.02;
    this.video.currentTime = Number.isFinite(last) ? Math.min(time, Math.max(last, 0)) : time;
  }

  #draw() {
    const canvas = this.queue.shift();
    this.busy = false;
    if (canvas) {
      canvas.getContext("2d").drawImage(this.video, 0, 0, canvas.width, canvas.height);
      canvas.dataset.drawn = "true";
    }
    this.#next();
  }
}
