// Chat and live figures over the server's own API. No framework, nothing from elsewhere.
"use strict";

const at = (id) => document.getElementById(id);
const CELLS = 64;
const BUSY_MS = 500, IDLE_MS = 3000;  // between looks at the figures; each counts as a request of the key

let messages = [];      // the conversation, as the API takes it
let running = null;     // the AbortController of the answer that streams

// -- asking --------------------------------------------------------------------------------------------------------

/** The answer of the API, or an Error with the server's own words. */
async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached.");
  }
  if (response.ok) return response;
  let words = `The server answers ${response.status}.`;
  try {
    words = (await response.json()).error.message;
  } catch { /* an answer without words, as of a proxy */ }
  throw new Error(words);
}

/** The events of a stream, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// -- the conversation ----------------------------------------------------------------------------------------------

function show(kind, text) {
  at("empty").hidden = true;
  const message = document.createElement("article");
  message.className = `message ${kind}`;
  const words = document.createElement("p");
  words.textContent = text;
  message.append(words);
  if (kind === "error") message.setAttribute("role", "alert");
  at("log").append(message);
  message.scrollIntoView({ block: "end" });
  return words;
}

function number(id) {
  return at(id).value === "" ? undefined : Number(at(id).value);
}

function body(chat) {
  const system = at("system").value.trim();
  return {
    model: at("model").value,
    messages: system ? [{ role: "system", content: system }, ...chat] : chat,
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

function setRunning(controller) {
  running = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
  if (controller) look();
}

async function send() {
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  if (!at("form").checkValidity()) {
    at("settings").open = true;
    at("form").reportValidity();
    return;
  }
  at("prompt").value = "";
  const chat = messages;  // another one may begin before this answer has ended
  chat.push({ role: "user", content: text });
  const asked = show("user", text).parentElement;
  const answer = { text: "", pieces: 0, begun: performance.now(), first: null, usage: null, reason: null };
  const controller = new AbortController();
  setRunning(controller);
  let words = null;
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body(chat)),
      signal: controller.signal,
    });
    words = show("assistant", "");
    for await (const event of events(response)) take(event, answer, words);
    if (answer.reason === null) throw new Error("The stream broke off.");
  } catch (error) {
    if (error.name === "AbortError") answer.reason = "stopped";
    else if (chat === messages) show("error", error.message);
  }
  if (words && (answer.text || answer.reason !== null)) {
    chat.push({ role: "assistant", content: answer.text });
    count(answer, words);
  } else {  // nothing was said: the question goes back to where it can be sent again
    chat.pop();
    asked.remove();
    if (words) words.parentElement.remove();
    if (chat === messages && !at("prompt").value) at("prompt").value = text;
  }
  setRunning(null);
  at("prompt").focus();
}

function take(event, answer, words) {
  if (event.usage) answer.usage = event.usage;
  for (const choice of event.choices) {
    if (choice.finish_reason) answer.reason = choice.stop_reason || choice.finish_reason;
    if (!choice.delta.content) continue;
    answer.first ??= performance.now();
    answer.pieces += 1;
    answer.text += choice.delta.content;
    const log = at("log");
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    words.append(choice.delta.content);
    if (below) log.scrollTop = log.scrollHeight;  // whoever has scrolled up reads on undisturbed
  }
}

function count(answer, words) {
  const said = document.createElement("small");
  const tokens = answer.usage ? answer.usage.completion_tokens : answer.pieces;
  const parts = [];
  if (answer.usage) {
    const cached = answer.usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${answer.usage.prompt_tokens} tokens in${cached ? ` (${cached} cached)` : ""}`);
  }
  parts.push(`${answer.usage ? "" : "about "}${tokens} out`);
  if (answer.first !== null) {
    parts.push(`first after ${Math.round(answer.first - answer.begun)} ms`);
    const seconds = (performance.now() - answer.first) / 1000;
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (answer.reason !== "stop") parts.push(answer.reason);
  said.textContent = parts.join(" · ");
  words.parentElement.append(said);
  said.scrollIntoView({ block: "end" });
}

// -- live figures --------------------------------------------------------------------------------------------------

let last = null, timer = null;

/** Looks at the figures now, and again later: soon while an answer streams, seldom otherwise. */
async function look() {
  clearTimeout(timer);
  let wait = IDLE_MS;
  if (!document.hidden) {
    try {
      const now = await (await ask("figures")).json();
      const model = now.models.find((each) => each.model === at("model").value);
      if (model) figures(now.time_s, model);
      if (running || (model && model.running + model.waiting)) wait = BUSY_MS;
    } catch { blank(); }
  }
  clearTimeout(timer);
  timer = setTimeout(look, wait);
}

function figures(time, model) {
  if (last && last.model === model.model && time > last.time) {
    at("rate").textContent = ((model.generation_tokens - last.tokens) / (time - last.time)).toFixed(1);
  }
  last = { model: model.model, time, tokens: model.generation_tokens };
  at("running").textContent = model.running;
  at("waiting").textContent = model.waiting;
  const asked = model.prefix_cache_queries;
  at("hits").textContent = asked ? `${Math.round((100 * model.prefix_cache_hits) / asked)} %` : "–";
  at("pages").textContent = `${model.used_pages} / ${model.pages}`;
  const free = model.pages - model.used_pages - model.kept_pages;
  at("strip").setAttribute("aria-label", `KV pages: ${model.used_pages} in use, ${model.kept_pages} kept, ${free} free`);
  // A cell stands for many pages; where there is one of a kind, a cell shows it.
  const used = Math.ceil((model.used_pages / model.pages) * CELLS);
  const kept = Math.min(CELLS - used, Math.ceil((model.kept_pages / model.pages) * CELLS));
  [...at("strip").children].forEach((cell, i) => {
    cell.className = i < used ? "used" : i < used + kept ? "kept" : "";
  });
}

function blank() {
  last = null;
  for (const id of ["rate", "running", "waiting", "hits", "pages"]) at(id).textContent = "–";
}

// -- the page ------------------------------------------------------------------------------------------------------

async function listModels() {
  try {
    const { data } = await (await ask("v1/models")).json();
    at("model").replaceChildren(...data.map((each) => new Option(each.id, each.id)));
    look();
  } catch (error) { show("error", error.message); }
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  for (const message of [...at("log").querySelectorAll(".message")]) message.remove();
  at("empty").hidden = false;
  at("prompt").focus();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
at("model").addEventListener("change", () => { last = null; look(); });
for (let i = 0; i < CELLS; i++) at("strip").append(document.createElement("i"));
listModels();
