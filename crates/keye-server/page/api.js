// The conversation as a request, the stream that answers it, and the same request for other clients.

import { mime } from "./media.js";

/** What went wrong, in words for people. `status` is 0 when the server was not reached. */
export class Failure extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** `/v1/models`' one model. */
export async function model(key) {
  const response = await send("/v1/models", { headers: headers(key) });
  return (await response.json()).data[0].id;
}

const headers = (key) => (key ? { authorization: `Bearer ${key}` } : {});

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const large = (options.body?.length ?? 0) > 60e6;
    throw new Failure(
      large
        ? "The connection broke while the media were being sent. They may be larger than this server takes (--max-body)."
        : "The server cannot be reached. Is it still running?",
    );
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw failure(response.status, error, response.headers.get("retry-after"));
}

/** The server's own words, and what to do where there is something to do. */
function failure(status, error, retryAfter) {
  const said = sentence(error?.message ?? `The server answered with status ${status}`);
  const text =
    {
      401: "The server asks for an API key.",
      413: "That is larger than this server takes. A shorter clip or a smaller file fits, or a larger --max-body.",
      429: `The server is busy. Try again in ${retryAfter ?? "some"} seconds.`,
    }[status] ?? said;
  return new Failure(text, status, error?.code ?? null);
}

function sentence(text) {
  const upper = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/u.test(upper) ? upper : `${upper}.`;
}

/**
 * Turns that a request has: a turn without an answer lends its media to the next, unless they are what was wrong.
 * Gives `{turn, media}` for each, the last being the one that is asked.
 */
export function sent(turns) {
  const kept = [];
  let media = [];
  turns.forEach((turn, index) => {
    media = [...media, ...turn.media];
    if (turn.answer || index === turns.length - 1) kept.push({ turn, media });
    if (turn.answer || turn.mediaFault) media = [];
  });
  return kept;
}

/** The body of a request; `url` gives the address of a medium. */
export function body(modelName, turns, settings, url) {
  const { system, thinking, fps, max_frames, ...sampling } = settings;
  const options = Object.fromEntries(Object.entries({ fps, max_frames }).filter(([, value]) => value !== undefined));
  const part = (item) => {
    const type = `${item.kind}_url`;
    const wanted = item.kind === "video" && Object.keys(options).length > 0 ? { preprocess_kwargs: options } : {};
    return { type, [type]: { url: url(item), ...wanted } };
  };
  const messages = system ? [{ role: "system", content: system }] : [];
  const kept = sent(turns);
  kept.forEach(({ turn, media }, index) => {
    const text = { type: "text", text: turn.question };
    messages.push({ role: "user", content: media.length > 0 ? [...media.map(part), text] : turn.question });
    if (index < kept.length - 1) messages.push({ role: "assistant", content: turn.answer });
  });
  const template = thinking ? { chat_template_kwargs: { enable_thinking: thinking === "on" } } : {};
  return { model: modelName, messages, ...sampling, ...template };
}

/** Sends it and yields the chunks of the answer as they come. */
export async function* stream(request, key, signal) {
  const wanted = { ...request, stream: true, stream_options: { include_usage: true, include_progress: true } };
  const response = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify(wanted),
    signal,
  });
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The connection to the server broke before the answer was complete.");
    }
    if (read.done) break;
    const events = (rest + read.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw failure(0, chunk.error);
      yield chunk;
    }
  }
  throw new Failure("The answer ended before it was complete.");
}

// The same request for a shell and for Python. Media are read from files of the same names; a key stays out of it.

const HOLE = /"\uE000(\d+)\uE000"/gu;

function withHoles(modelName, turns, settings) {
  const media = [];
  const request = body(modelName, turns, settings, (item) => `\uE000${media.push(item) - 1}\uE000`);
  return [request, media];
}

const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

export function curl(modelName, turns, settings, key) {
  const [request, media] = withHoles(modelName, turns, settings);
  const json = JSON.stringify(request, null, 2).replace(/[\\$`]/gu, "\\$&");
  const filled = json.replace(HOLE, (_, index) => {
    const item = media[index];
    return `"data:${mime(item)};base64,$(base64 < ${quoted(item.name)} | tr -d '\\n')"`;
  });
  const authorization = key ? ' \\\n  -H "authorization: Bearer $KEYE_API_KEY"' : "";
  return `curl ${location.origin}/v1/chat/completions \\\n  -H 'content-type: application/json'${authorization} --data-binary @- <<JSON\n${filled}\nJSON\n`;
}

function pythonValue(value, indent, media) {
  const inner = `${indent}    `;
  const lines = (open, items, close) =>
    items.length > 0 ? `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}` : open + close;
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return lines("[", value.map((item) => pythonValue(item, inner, media)), "]");
  if (typeof value === "object") {
    const pairs = Object.entries(value);
    return lines("{", pairs.map(([name, item]) => `${JSON.stringify(name)}: ${pythonValue(item, inner, media)}`), "}");
  }
  return JSON.stringify(value).replace(HOLE, (_, index) => {
    const item = media[index];
    return `data_url(${JSON.stringify(mime(item))}, ${JSON.stringify(item.name)})`;
  });
}

export function python(modelName, turns, settings, key) {
  const [{ chat_template_kwargs: template, ...request }, media] = withHoles(modelName, turns, settings);
  const named = template ? { ...request, extra_body: { chat_template_kwargs: template } } : request;
  const fields = Object.entries(named).map(([name, value]) => `    ${name}=${pythonValue(value, "    ", media)},\n`);
  const secret = key ? 'os.environ["KEYE_API_KEY"]' : '"none"';
  const reading = `\n\ndef data_url(kind, path):
    with open(path, "rb") as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"

`;
  return `${media.length > 0 ? "import base64\n" : ""}${key ? "import os\n" : ""}
from openai import OpenAI
${media.length > 0 ? reading : ""}
client = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key=${secret})
answer = client.chat.completions.create(
${fields.join("")})
print(answer.choices[0].message.content)
`.trimStart();
}
