// The chat page. Text of people and models enters the document through text nodes only.
import { ChatError, health, listModels, streamChat } from "./client.js";

const $ = (id) => document.getElementById(id);
const body = document.body;
const scroller = $("scroller");
const log = $("log");
const input = $("input");
const send = $("send");

const DEFAULTS = Object.freeze({ temperature: 0.5, maxTokens: null, system: "" });
const HEALTH_INTERVAL_MS = 2000; // only while the server is not ready
const FINISH_NOTES = {
  length: "reached the maximum length",
  content_filter: "stopped by a content filter",
  tool_calls: "asked for a tool, which this page has not",
};

// ---- What is remembered ------------------------------------------------------------------------------------------

function stored(storage, key) {
  try {
    return storage().getItem(`millrace.${key}`);
  } catch {
    return null; // storage may be forbidden; the page then works without memory
  }
}

function store(storage, key, value) {
  try {
    if (value) storage().setItem(`millrace.${key}`, value);
    else storage().removeItem(`millrace.${key}`);
  } catch {
    // as above
  }
}

const lasting = () => localStorage;
const thisTab = () => sessionStorage;

function loadSettings() {
  const settings = { ...DEFAULTS };
  let saved = null;
  try {
    saved = JSON.parse(stored(lasting, "settings"));
  } catch {
    saved = null; // written by something else
  }
  const { temperature, maxTokens, system } = saved ?? {};
  if (typeof temperature === "number" && temperature >= 0 && temperature <= 2) settings.temperature = temperature;
  if (Number.isInteger(maxTokens) && maxTokens >= 1) settings.maxTokens = maxTokens;
  if (typeof system === "string") settings.system = system;
  return settings;
}

const state = {
  settings: loadSettings(),
  apiKey: stored(thisTab, "key") ?? "",
  models: [],
  model: null, // id of the chosen model
  turns: [], // in order of the conversation
  running: null, // the turn that is being answered
};

// ---- Scrolling: follow the end until the reader scrolls up -------------------------------------------------------

const AT_END_PX = 8;
let following = true;
let lastTop = 0;

const distanceToEnd = () => scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;

function showToEnd() {
  $("to-end").hidden = following || distanceToEnd() < 80;
}

function follow(always = false) {
  if (always) following = true;
  if (following) scroller.scrollTop = scroller.scrollHeight;
  showToEnd();
}

scroller.addEventListener("scroll", () => {
  if (distanceToEnd() < AT_END_PX) following = true;
  else if (scroller.scrollTop < lastTop) following = false;
  lastTop = scroller.scrollTop;
  showToEnd();
}, { passive: true });
new ResizeObserver(() => follow()).observe(scroller);
$("to-end").addEventListener("click", () => {
  follow(true);
  input.focus();
});

// ---- One question and its answer ---------------------------------------------------------------------------------

function duration(ms) {
  return ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function count(number, unit) {
  const digits = number < 10 && !Number.isInteger(number) ? 1 : 0;
  return `${number.toLocaleString("en", { maximumFractionDigits: digits })} ${unit}`;
}

class Turn {
  constructor(prompt) {
    this.prompt = prompt;
    this.element = $("turn").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.parts = {
      text: find(".answer > .text"),
      reasoning: find(".reasoning"),
      reasoningText: find(".reasoning .text"),
      error: find(".error"),
      message: find(".message"),
      enterKey: find(".enter-key"),
      after: find(".after"),
      copy: find(".copy"),
      stats: find(".stats"),
    };
    find(".prompt .text").textContent = prompt;
    find(".again").addEventListener("click", () => answer(this));
    find(".retry").addEventListener("click", () => answer(this));
    this.parts.copy.addEventListener("click", () => this.copy());
    this.parts.enterKey.addEventListener("click", () => openSettings($("api-key")));
    this.begin();
  }

  begin() {
    this.answer = "";
    this.reasoning = "";
    this.frame = 0;
    this.parts.text.textContent = "";
    this.parts.reasoningText.textContent = "";
    this.parts.reasoning.hidden = true;
    this.parts.error.hidden = true;
    this.element.classList.remove("failed");
    this.parts.after.hidden = true;
    this.parts.stats.replaceChildren();
  }

  // Pieces may come faster than the screen is drawn: the document changes at most once a frame.
  append(text, reasoning) {
    this.answer += text;
    this.reasoning += reasoning;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    extend(this.parts.text, this.answer);
    extend(this.parts.reasoningText, this.reasoning);
    this.parts.reasoning.hidden = this.reasoning === "";
    follow();
  }

  fail(error) {
    this.parts.message.textContent = error.message;
    this.parts.enterKey.hidden = error.status !== 401;
    this.parts.error.hidden = false;
    this.element.classList.add("failed");
  }

  finish(notes) {
    this.draw();
    this.parts.stats.replaceChildren(...notes.map((note) => {
      const span = document.createElement("span");
      span.textContent = note;
      return span;
    }));
    this.parts.copy.hidden = this.answer === "";
    this.parts.after.hidden = !this.parts.error.hidden && this.answer === "";
    follow();
  }

  async copy() {
    const done = await copyText(this.answer);
    const use = this.parts.copy.querySelector("use");
    use.setAttribute("href", done ? "#i-done" : "#i-close");
    this.parts.copy.title = done ? "Copied" : "The browser did not allow copying";
    setTimeout(() => {
      use.setAttribute("href", "#i-copy");
      this.parts.copy.title = "Copy";
    }, 1600);
  }
}

// Adds to the text node that is there: the cost of a frame is the new text, and a selection of the old text stays.
function extend(element, text) {
  const node = element.firstChild ?? element.appendChild(document.createTextNode(""));
  if (text.length > node.length) node.appendData(text.slice(node.length));
}

async function copyText(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Browsers offer the clipboard on https and localhost only; a server in the local network has this older way.
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "hidden-text";
  body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

// ---- Asking ------------------------------------------------------------------------------------------------------

// A question without an answer is left out: chat templates want the roles to alternate.
function requestBody(turn) {
  const messages = [];
  const { system, temperature, maxTokens } = state.settings;
  if (system.trim()) messages.push({ role: "system", content: system });
  for (const earlier of state.turns.slice(0, state.turns.indexOf(turn))) {
    if (!earlier.answer) continue;
    messages.push({ role: "user", content: earlier.prompt }, { role: "assistant", content: earlier.answer });
  }
  messages.push({ role: "user", content: turn.prompt });
  return { model: state.model, messages, temperature, ...(maxTokens ? { max_tokens: maxTokens } : {}) };
}

function setRunning(turn) {
  state.running = turn;
  body.classList.toggle("busy", turn !== null);
  log.setAttribute("aria-busy", String(turn !== null)); // read the answer out when it is whole, not token by token
  const label = turn ? "Stop" : "Send";
  send.setAttribute("aria-label", label);
  send.title = label;
  showSendable();
}

function showSendable() {
  const sendable = state.running !== null || input.value.trim() !== "";
  if (!sendable && document.activeElement === send) input.focus(); // a disabled button would lose the focus
  send.disabled = !sendable;
}

function timing({ started, first, last, usage }) {
  const notes = [];
  const tokens = usage?.completion_tokens;
  if (tokens !== undefined) notes.push(count(tokens, tokens === 1 ? "token" : "tokens"));
  // The first token belongs to the time before it. Where all of them came together, only the whole answer has a rate.
  const together = last - first < 5;
  const seconds = (last - (together ? started : first)) / 1000;
  if (tokens > 1) notes.push(count((together ? tokens : tokens - 1) / seconds, "tokens/s"));
  if (first !== null) notes.push(`${duration(first - started)} to first token`);
  return notes;
}

async function answer(turn) {
  if (state.running) return;
  turn.begin();
  turn.controller = new AbortController();
  turn.element.classList.add("streaming");
  setRunning(turn);
  follow(true);
  const { signal } = turn.controller;
  const clock = { started: performance.now(), first: null, last: null, usage: null };
  const notes = [];
  try {
    if (!state.model) await loadModels();
    clock.started = performance.now();
    let reason = null;
    for await (const piece of streamChat(requestBody(turn), state.apiKey, signal)) {
      if (piece.text || piece.reasoning) {
        clock.last = performance.now();
        clock.first ??= clock.last;
        turn.append(piece.text, piece.reasoning);
      }
      reason = piece.finishReason ?? reason;
      clock.usage = piece.usage ?? clock.usage;
    }
    if (reason && reason !== "stop") notes.push(FINISH_NOTES[reason] ?? `finished: ${reason}`);
    else if (!turn.answer) notes.push("the model gave no text");
  } catch (error) {
    if (signal.aborted) {
      notes.push("stopped");
    } else {
      turn.fail(error);
      if (!(error instanceof ChatError)) throw error; // a bug of this page: shown, and in the console too
      if (error.status === 0) watchHealth();
    }
  } finally {
    turn.element.classList.remove("streaming");
    turn.finish([...timing(clock), ...notes]);
    if (state.running === turn) setRunning(null);
  }
}

function ask(prompt) {
  if (state.running) return;
  const turn = new Turn(prompt);
  state.turns.push(turn);
  log.append(turn.element);
  $("empty").hidden = true;
  answer(turn);
}

function stop() {
  state.running?.controller.abort();
}

function newChat() {
  stop();
  setRunning(null);
  state.turns = [];
  log.replaceChildren();
  $("empty").hidden = false;
  follow(true);
  input.focus();
}

// ---- Composer ----------------------------------------------------------------------------------------------------

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  showSendable();
}

function submit() {
  const prompt = input.value.trim();
  if (state.running || prompt === "") return;
  input.value = "";
  fitInput();
  ask(prompt);
}

input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter confirms that character.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.running) stop();
  else submit();
});
$("composer").addEventListener("click", (event) => {
  if (event.target === event.currentTarget) input.focus();
});
for (const example of $("examples").querySelectorAll("button")) {
  example.addEventListener("click", () => {
    if (matchMedia("(pointer: fine)").matches) input.focus(); // on a phone the keyboard would cover the answer
    ask(example.textContent);
  });
}
$("new-chat").addEventListener("click", newChat);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) stop();
});

// ---- Settings ----------------------------------------------------------------------------------------------------

function showSettings() {
  const { temperature, maxTokens, system } = state.settings;
  $("temperature").value = String(temperature);
  $("temperature-value").textContent = temperature.toFixed(2);
  $("max-tokens").value = maxTokens ?? "";
  $("system").value = system;
  $("api-key").value = state.apiKey;
}

function keepSettings() {
  const length = $("max-tokens").valueAsNumber;
  state.settings = {
    temperature: $("temperature").valueAsNumber,
    maxTokens: Number.isInteger(length) && length >= 1 ? length : null,
    system: $("system").value,
  };
  $("temperature-value").textContent = state.settings.temperature.toFixed(2);
  store(lasting, "settings", JSON.stringify(state.settings));
}

function keepKey() {
  state.apiKey = $("api-key").value.trim();
  store(thisTab, "key", state.apiKey);
}

function openSettings(focus = $("temperature")) {
  showSettings();
  $("settings").showModal();
  focus.focus();
}

for (const id of ["temperature", "max-tokens", "system"]) $(id).addEventListener("input", keepSettings);
$("api-key").addEventListener("input", keepKey);
$("open-settings").addEventListener("click", () => openSettings());
$("reset-settings").addEventListener("click", () => {
  state.settings = { ...DEFAULTS };
  store(lasting, "settings", null);
  showSettings();
});
$("close-settings").addEventListener("click", () => $("settings").close());
$("settings-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("settings").close();
});
$("settings").addEventListener("click", (event) => {
  if (event.target === event.currentTarget) $("settings").close(); // the backdrop
});
$("settings").addEventListener("close", () => {
  if (!state.model) loadModels().catch(showModelError); // a key may have been entered
});

// ---- Theme -------------------------------------------------------------------------------------------------------

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const systemTheme = () => (systemDark.matches ? "dark" : "light");
const theme = () => document.documentElement.dataset.theme ?? systemTheme();

function showTheme() {
  $("theme").setAttribute("aria-pressed", String(theme() === "dark"));
  const { backgroundColor } = getComputedStyle(body);
  for (const meta of document.querySelectorAll('meta[name="theme-color"]')) meta.content = backgroundColor; // a phone's bars
}

$("theme").addEventListener("click", () => {
  const chosen = theme() === "dark" ? "light" : "dark";
  // Choosing what the system has means following the system again.
  if (chosen === systemTheme()) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  store(lasting, "theme", document.documentElement.dataset.theme ?? null);
  showTheme();
});
systemDark.addEventListener("change", showTheme);
showTheme();

// ---- Model and server --------------------------------------------------------------------------------------------

function showModel() {
  const choice = $("model-choice");
  const several = state.models.length > 1;
  choice.replaceChildren(...state.models.map(({ id }) => new Option(id, id)));
  choice.value = state.model;
  choice.hidden = !several;
  $("model-name").hidden = several;
  $("model-name").textContent = state.model;
  $("about").textContent = `Answers are written by ${state.model} on this server, and can be wrong.`;
  const limit = state.models.find(({ id }) => id === state.model)?.max_model_len;
  if (limit) $("max-tokens").placeholder = `As long as the context of ${count(limit, "tokens")} allows`;
}

function showModelError(error) {
  $("model-name").textContent = error.status === 401 ? "API key needed" : "No model";
  $("model-name").title = error.message;
}

async function loadModels() {
  state.models = await listModels(state.apiKey);
  const remembered = stored(lasting, "model");
  state.model = state.models.some(({ id }) => id === remembered) ? remembered : state.models[0].id;
  showModel();
}

$("model-choice").addEventListener("change", (event) => {
  state.model = event.target.value;
  store(lasting, "model", state.model);
  showModel();
});

const HEALTH_TEXT = { ready: "The server is ready", starting: "The server is starting", offline: "The server cannot be reached" };
let watching = false;

async function watchHealth() {
  if (watching) return;
  watching = true;
  for (;;) {
    const now = document.hidden ? null : await health();
    if (now) {
      $("dot").dataset.state = now;
      $("dot").title = HEALTH_TEXT[now];
      if ($("health").textContent !== HEALTH_TEXT[now]) $("health").textContent = HEALTH_TEXT[now];
      if (!state.model && now !== "ready") $("model-name").textContent = now === "starting" ? "Starting…" : "Offline";
    }
    if (now === "ready") break;
    await new Promise((resolve) => setTimeout(resolve, HEALTH_INTERVAL_MS));
  }
  watching = false;
  if (!state.model) await loadModels().catch(showModelError);
}

watchHealth();
fitInput();
