// The page: reads the settings, keeps the conversation, drives one answer at a time.

import { Answer, explain, forgetRefusal, showQuestion } from "./answer.js";
import { apiKey, chat, keepApiKey, models } from "./api.js";
import { element } from "./element.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty"];
const $ = (id) => document.getElementById(id);

let conversation = [];
let running = null;

async function loadModels() {
  try {
    const served = await models();
    const chosen = $("model").value;
    $("model").replaceChildren(...served.map((one) => element("option", { value: one.id, textContent: one.id })));
    if (served.some((one) => one.id === chosen)) $("model").value = chosen;
    complain(served.length ? "" : "No model is served yet. Reload the page in a moment.");
  } catch (error) {
    $("model").replaceChildren();
    if (error.status === 401) askForKey(apiKey() ? error : null);
    else complain(explain(error));
  }
  refresh();
}

function askForKey(error) {
  $("key-row").hidden = false;
  openSettings(true);
  complain(error ? explain(error) : "This server needs an API key: enter it in the settings.");
  $("key").focus();
}

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function openSettings(open) {
  $("settings").classList.toggle("open", open);
  $("toggle").setAttribute("aria-expanded", String(open));
}

function refresh() {
  $("model").disabled = !$("model").options.length;
  $("send").disabled = Boolean(running) || !$("text").value.trim() || !$("model").value;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function request() {
  const system = $("system").value.trim();
  const body = {
    model: $("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
  };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = $(name).valueAsNumber;
  return body;
}

async function ask() {
  const text = $("text").value.trim();
  if (running || !text || !$("model").value) return;
  if (!$("fields").reportValidity()) {
    openSettings(true);
    return;
  }
  complain("");
  conversation.push({ role: "user", content: text });
  showQuestion($("messages"), text);
  $("text").value = "";
  const answer = new Answer($("messages"));
  running = { abort: new AbortController(), answer };
  const mine = running;
  refresh();
  try {
    for await (const chunk of chat(request(), mine.abort.signal)) answer.take(chunk);
  } catch (error) {
    if (mine.abort.signal.aborted) answer.stop();
    else {
      answer.fail(error);
      if (error.status === 401) askForKey(error);
    }
  }
  answer.end();
  if (running !== mine) return; // a new conversation has begun
  running = null;
  if (answer.text) conversation.push({ role: "assistant", content: answer.text });
  else conversation.pop();
  refresh();
  $("text").focus();
}

function stop() {
  running?.abort.abort();
}

function startOver() {
  stop();
  running = null;
  conversation = [];
  $("messages").replaceChildren();
  complain("");
  refresh();
  $("text").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("text").addEventListener("input", refresh);
$("fields").addEventListener("submit", (event) => event.preventDefault());
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", startOver);
$("toggle").addEventListener("click", () => openSettings(!$("settings").classList.contains("open")));
$("key").addEventListener("change", () => {
  keepApiKey($("key").value.trim());
  forgetRefusal();
  loadModels();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else openSettings(false);
});

if (apiKey()) {
  $("key").value = apiKey();
  $("key-row").hidden = false;
}
loadModels();
$("text").focus();
