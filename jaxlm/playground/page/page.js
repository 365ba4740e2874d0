"use strict";
// The page: controls from /api/models, answers from /api/answer as JSON lines. All texts go in as text, never as markup.

const $ = (id) => document.getElementById(id);
const LABELS = {
  temperature: ["temperature", 0.05], top_k: ["top-k", 1], top_p: ["top-p", 0.01], seed: ["seed", 0],
  beams: ["beams", 1], max_new_tokens: ["most tokens", 1],
};
const GONE = "the playground has gone; is it still running?";
let told; // what /api/models said
let running = null; // the AbortController of the request under way

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = (p) => (p >= 0.001 ? (100 * p).toFixed(1) : p > 0 ? (100 * p).toPrecision(1) : "0") + " %";

// What a token looks like in a table: blanks that are seen.
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣"));

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

// ---- controls

function build() {
  if (!$("prompt").value) $("prompt").value = told.prompt; // a reloaded page keeps what was written
  for (const model of told.models) {
    $("model-a").append(make("option", { textContent: model.name, value: model.name }));
    $("model-b").append(make("option", { textContent: model.name, value: model.name }));
  }
  if (told.models.length > 1) $("model-b").value = told.models[1].name;
  for (const name of told.controls.strategy.choices) {
    const input = make("input", { type: "radio", name: "strategy", value: name, onchange: showUsed });
    input.checked = name === told.controls.strategy.default;
    $("strategy").append(make("label", { title: told.controls.strategy.description }, input, " " + name));
  }
  for (const [name, [label, step]] of Object.entries(LABELS)) {
    const control = told.controls[name];
    // The slider goes in steps; any number between can be typed.
    const limits = { min: control.min, max: control.max, step: step < 1 && step > 0 ? "any" : 1 };
    const number = make("input", { type: "number", id: name, required: true, ...limits }); // empty would be zero
    number.value = control.default;
    const row = make("div", { className: "number", id: name + "-row", title: control.description });
    row.append(make("label", { htmlFor: name, textContent: label }));
    if (step) {
      const range = make("input", { type: "range", min: control.min, max: control.max, step, ariaLabel: label });
      range.value = control.default;
      range.oninput = () => { number.value = range.value; };
      number.oninput = () => { range.value = number.value; };
      row.append(range);
    } else row.classList.add("alone");
    row.append(number);
    $("numbers").append(row);
  }
  $("chat").parentElement.hidden = !told.models.some((model) => model.chat);
  showUsed();
}

const strategy = () => document.querySelector("input[name=strategy]:checked").value;

function showUsed() {
  const decided = Object.values(told.used).flat();
  for (const name of decided) {
    const off = !told.used[strategy()].includes(name);
    $(name + "-row").classList.toggle("off", off);
    for (const input of $(name + "-row").querySelectorAll("input")) input.disabled = off;
  }
}

function asked() {
  const settings = { strategy: strategy(), chat: $("chat").checked };
  // What cannot be edited is not sent: it may be empty, which nobody could mend.
  for (const name of Object.keys(LABELS)) if (!$(name).disabled) settings[name] = Number($(name).value);
  const models = [$("model-a").value, $("model-b").value].filter((name) => name);
  return { prompt: $("prompt").value, models, settings };
}

// ---- answers

function newPanes(request) {
  hideCard();
  $("panes").replaceChildren();
  return request.models.map((name) => {
    const pane = $("pane-template").content.cloneNode(true).firstElementChild;
    pane.querySelector("h2").textContent = name;
    pane.querySelector(".text").append(make("span", { className: "prompt", textContent: shownPrompt(request, name) }));
    $("panes").append(pane);
    return pane;
  });
}

const canChat = (name) => told.models.some((model) => model.name === name && model.chat);
const shownPrompt = (request, name) => request.prompt + (request.settings.chat && canChat(name) ? "\n\n" : "");

function show(pane, event) {
  const note = pane.querySelector(".note");
  const lasting = pane.dataset.note || ""; // what stays beside the answer
  if (event.event === "note") {
    note.textContent = lasting ? `${lasting}; ${event.text}` : event.text;
    if (event.lasts) pane.dataset.note = note.textContent;
  } else if (event.event === "token") {
    note.textContent = lasting;
    const part = event.ends ? "⏹" : event.text === "" ? "·" : event.text;
    const token = make("span", { className: "token", textContent: part, tabIndex: -1 });
    if (event.ends || event.text === "") token.classList.add("mark");
    // From nothing for a sure token to a half for one of a hundredth or less.
    token.style.setProperty("--surprise", Math.min(0.5, -Math.log10(Math.max(event.prob, 1e-9)) / 4));
    token.setAttribute("aria-label", `${visible(event.text)}, ${percent(event.prob)}`);
    token.told = event;
    const text = pane.querySelector(".text");
    if (!text.querySelector(".token")) token.tabIndex = 0;
    text.append(token);
  } else {
    pane.querySelector(".text").append(event.rest);
    const rate = event.tokens > 1 ? (event.tokens - 1) / Math.max(event.seconds - event.first_s, 1e-9) : 0;
    note.textContent = event.reason === "error" ? "The settings left nothing to choose." : lasting;
    const speed = `, first after ${event.first_s?.toFixed(2)} s` + (rate ? `, then ${rate.toFixed(0)} a second` : "");
    figures(pane, event.reason, event.tokens, speed, event.perplexity ?? Infinity);
  }
}

function figures(pane, reason, tokens, speed, perplexity) {
  const surprise = Number.isFinite(perplexity) ? perplexity.toPrecision(3) : "∞";
  const told = tokens ? `${tokens} tokens${speed}; perplexity ${surprise}` : "no tokens";
  pane.querySelector(".figures").textContent = `${told}; ended by ${reason}`;
  pane.dataset.ended = reason;
}

// An answer that was cut off says no longer what was under way; one that a person stopped, what there is of it.
function cut(pane, stopped) {
  pane.querySelector(".note").textContent = pane.dataset.note || "";
  if (!stopped) return;
  const surprises = [...pane.querySelectorAll(".token")].map((token) => -Math.log(token.told.prob));
  const mean = surprises.reduce((sum, one) => sum + one, 0) / surprises.length;
  figures(pane, "stopped", surprises.length, "", Math.exp(mean));
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n");
    held = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function generate(submitted) {
  submitted.preventDefault();
  if (running) return;
  const request = asked();
  const panes = newPanes(request);
  running = new AbortController();
  $("go").disabled = true;
  $("stop").disabled = false;
  say("generating");
  try {
    const response = await fetch("/api/answer", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error);
    for await (const line of lines(response.body)) {
      if (line.error) throw new Error(line.error);
      show(panes[line.pane], line);
    }
    say(panes.some((pane) => pane.dataset.ended === "stopped") ? "stopped" : "done");
  } catch (problem) {
    if (problem.name === "AbortError") say("stopped");
    else say(problem instanceof TypeError ? GONE : problem.message, true); // what fetch throws without a server
  } finally {
    for (const pane of panes) if (!pane.dataset.ended) cut(pane, running.signal.aborted);
    running = null;
    $("go").disabled = false;
    $("stop").disabled = true;
  }
}

// ---- the card of a token

function showCard(token) {
  const event = token.told;
  const head = make("p", {}, `${visible(event.text)} · id ${event.token} · rank ${event.rank + 1} · model ` +
    `${percent(event.prob)} · after settings ${percent(event.kept)}`);
  const table = make("table", {}, make("tr", {}, ...["token", "model", "", "after settings"].map(
    (text) => make("th", { textContent: text }))));
  for (const rival of event.rivals) {
    const row = make("tr", {}, ...[visible(rival.text), percent(rival.prob)].map((text) => make("td", { textContent: text })));
    row.append(make("td", {}, make("meter", { value: rival.prob, max: 1 })), make("td", { textContent: percent(rival.kept) }));
    if (rival.token === event.token) row.className = "chosen";
    else if (rival.kept === 0) row.className = "dropped";
    table.append(row);
  }
  const card = $("card");
  card.replaceChildren(head, table);
  card.hidden = false;
  const place = token.getClientRects()[0];
  const left = Math.min(place.left, document.documentElement.clientWidth - card.offsetWidth - 8);
  const below = place.bottom + card.offsetHeight + 8 < window.innerHeight;
  card.style.left = `${Math.max(left, 8) + window.scrollX}px`;
  card.style.top = `${(below ? place.bottom + 6 : place.top - card.offsetHeight - 6) + window.scrollY}px`;
}

function hideCard() { $("card").hidden = true; }

function walk(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const here = document.activeElement;
  if (event.key === "Escape") hideCard();
  if (!step || !here.classList.contains("token")) return;
  const all = [...here.parentElement.querySelectorAll(".token")];
  const next = all[all.indexOf(here) + step];
  if (!next) return;
  event.preventDefault();
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

const onToken = (act) => (event) => { if (event.target.classList?.contains("token")) act(event.target); };

async function start() {
  $("form").onsubmit = generate;
  $("stop").onclick = () => running?.abort();
  $("prompt").onkeydown = (event) => { if (event.key === "Enter" && event.ctrlKey) $("form").requestSubmit(); };
  for (const name of ["mouseover", "focusin"]) $("panes").addEventListener(name, onToken(showCard));
  for (const name of ["mouseout", "focusout"]) $("panes").addEventListener(name, onToken(hideCard));
  document.addEventListener("keydown", walk);
  try {
    told = await (await fetch("/api/models")).json();
  } catch {
    say(GONE, true);
    return;
  }
  build();
  $("go").disabled = false;
  say("ready");
}

start();
