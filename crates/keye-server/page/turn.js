// One question and its answer on the page.

import { el, show } from "./render.js";

const button = (text, act, label) => {
  const made = el("button", { type: "button" }, text);
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", () => act(made));
  return made;
};

/** `acts` has `copy`, `curl`, `python`, `retry`, `edit`, each taking the turn. */
export class TurnView {
  constructor(turn, names, acts, pick) {
    this.turn = turn;
    const chips = turn.media.map((id, index) => button(names[index], () => pick(id), `Show ${names[index]}`));
    this.step = el("span");
    this.bar = el("progress", { max: 1 });
    this.progress = el("div", { class: "progress", hidden: true }, this.step, this.bar);
    this.summary = el("summary");
    this.thought = el("div", { class: "prose" });
    this.thinking = el("details", { class: "thinking", hidden: true }, this.summary, this.thought);
    this.body = el("div", { class: "prose" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.warning = el("p", { class: "error", role: "status", hidden: true });
    this.figures = el("span", { class: "figures" });
    this.last = el("span", {}, button("Retry", () => acts.retry(turn), "Retry the question"), button("Edit", () => acts.edit(turn), "Edit the question"));
    this.copies = el(
      "span",
      {},
      button("Copy", (b) => acts.copy(turn, b), "Copy the answer"),
      button("curl", (b) => acts.curl(turn, b), "Copy the request as curl"),
      button("Python", (b) => acts.python(turn, b), "Copy the request as Python"),
    );
    this.foot = el("div", { class: "foot", hidden: true }, this.figures, this.copies, this.last);
    this.reply = el("div", { class: "answer" }, this.progress, this.thinking, this.body, this.warning, this.error, this.foot);
    this.element = el(
      "article",
      { class: "turn" },
      el("div", { class: "asked" }, ...(chips.length > 0 ? [el("div", { class: "chips" }, ...chips)] : []), el("p", {}, turn.question)),
      this.reply,
    );
  }

  /** What is being done before tokens come; `done` is a part of 1, or undefined. */
  report(text, done) {
    this.step.textContent = text;
    this.progress.hidden = !text;
    if (done === undefined) this.bar.removeAttribute("value");
    else this.bar.value = done;
  }

  update(running, isLast, longest) {
    const { turn } = this;
    this.reply.setAttribute("aria-busy", String(running));
    this.reply.classList.toggle("running", running);
    this.thinking.hidden = !turn.reasoning;
    if (turn.reasoning) {
      const open = running && !turn.answer;
      const time = turn.thought ? ` for ${(turn.thought / 1000).toFixed(1)} s` : "";
      this.summary.textContent = open ? "Thinking …" : `Thought${time}`;
      show(this.thought, turn.reasoning, longest);
    }
    show(this.body, turn.answer, longest);
    this.warning.hidden = !turn.warning;
    this.warning.textContent = turn.warning ?? "";
    this.error.hidden = !turn.error;
    this.error.textContent = turn.error ?? "";
    this.foot.hidden = running;
    this.last.hidden = !isLast;
    this.figures.textContent = figures(turn);
    if (!running) this.report("");
  }
}

function figures({ answer, usage, seconds, finish, stopped }) {
  const count = (n, what) => `${n.toLocaleString("en")} ${what}`;
  const parts = [];
  if (stopped) parts.push("stopped");
  if (finish && !answer) parts.push("no text");
  if (finish === "length") parts.push("cut off at the most tokens allowed");
  if (usage) {
    const { media_tokens: media, cached_tokens: cached } = usage.prompt_tokens_details ?? {};
    const more = [media && count(media, "media"), cached && count(cached, "cached")].filter(Boolean).join(", ");
    parts.push(`${count(usage.prompt_tokens, "tokens in")}${more ? ` (${more})` : ""}`, count(usage.completion_tokens, "out"));
  }
  if (seconds) parts.push(`${seconds.toFixed(1)} s`);
  return parts.join(" · ");
}
