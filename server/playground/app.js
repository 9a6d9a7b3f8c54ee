// The page: a picture, a question, one level or two, and the chat that follows.

import { Refused, ask, get, hasKey, useKey } from "./api.js";
import { Panel } from "./panel.js";
import { curl, python } from "./snippets.js";
import { count, difference, marked, percent, split } from "./words.js";

const SAMPLES = {
  shapes: ["Coloured shapes", "How many objects are there?"],
  sign: ["A sign", "What is written on the sign?"],
  chart: ["A bar chart", "Which bar is the tallest?"],
  grid: ["A board", "What is in row 2, column 3?"],
};
const MAX_TOKENS = 256;
const $ = (id) => document.getElementById(id);

let model = "";
let picture = null; // { url, name, type }
let turns = []; // of this chat: { question, levels, answers, panels }
let running = null; // the AbortController of the question in flight
let language = curl;

// ---- the picture

function readAsDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refused("The picture cannot be read.", 0));
    reader.readAsDataURL(blob);
  });
}

async function take(blob, name) {
  if (!blob.type.startsWith("image/")) throw new Refused("That is not a picture. PNG, JPEG, WebP, GIF and AVIF can be asked about.", 0);
  picture = { url: await readAsDataUrl(blob), name, type: blob.type };
  $("preview").src = picture.url;
  $("preview").alt = `The picture to ask about: ${name}`;
  startOver();
}

async function takeSample(name) {
  const response = await fetch(`playground/samples/${name}.png`);
  if (!response.ok) throw new Refused("The sample cannot be loaded.", 0);
  await take(await response.blob(), `docs/samples/${name}.png`);
  $("question").value = SAMPLES[name][1];
  showCode();
}

function showSamples() {
  for (const [name, [title]] of Object.entries(SAMPLES)) {
    const button = document.createElement("button");
    const image = new Image();
    image.src = `playground/samples/${name}.png`;
    image.alt = `Sample: ${title}`;
    image.className = "small";
    button.type = "button";
    button.append(image);
    button.onclick = guarded(() => takeSample(name));
    $("samples").append(button);
  }
  $("preview").onload = (event) => event.target.classList.toggle("small", event.target.naturalWidth < 200);
}

function watchPictures() {
  const drop = $("drop");
  const first = (files) => [...files].find((file) => file.type.startsWith("image/")) ?? files[0];
  $("file").onchange = guarded(async (event) => {
    if (event.target.files.length) await take(event.target.files[0], event.target.files[0].name);
  });
  document.ondragover = (event) => {
    event.preventDefault();
    drop.classList.add("over");
  };
  document.ondragleave = () => drop.classList.remove("over");
  document.ondrop = guarded(async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const file = first(event.dataTransfer.files);
    if (file) await take(file, file.name);
  });
  document.onpaste = guarded(async (event) => {
    const file = first(event.clipboardData.files);
    if (file) await take(file, file.name || "pasted.png");
  });
}

// ---- the question

// The chat as the answer in column `column` continues it: each column keeps to its own answers.
function messages(question, column, before = turns) {
  const said = before.flatMap((turn) => [
    { role: "user", content: [{ type: "text", text: turn.question }] },
    { role: "assistant", content: turn.answers[column] ?? turn.answers[0] },
  ]);
  said.push({ role: "user", content: [{ type: "text", text: question }] });
  if (picture) said[0].content.unshift({ type: "image_url", image_url: { url: picture.url } });
  return said;
}

function body(level, ...chat) {
  return { model, messages: messages(...chat), max_tokens: MAX_TOKENS, pruning: { level } };
}

async function send(event) {
  event.preventDefault();
  if (running) return;
  const question = $("question").value.trim();
  if (!question) throw new Refused("Ask a question first.", 0);
  const levels = [$("left").value, $("right").value].filter(Boolean);
  const requests = levels.map((level, column) => body(level, question, column));
  requests.forEach((request) => (request.pruning.detail = true));
  showChat();
  $("asked").textContent = question;
  $("verdict").textContent = "";
  const panels = levels.map((level) => new Panel(level, picture?.url));
  $("panels").replaceChildren(...panels.map((panel) => panel.root));
  $("result").hidden = false;
  busy(new AbortController());
  try {
    const replies = [];
    for (const [i, panel] of panels.entries()) {
      panel.start(); // one after the other, so that each level's time is its own
      const reply = await ask(requests[i], running.signal, (text) => (panel.answer.textContent = text));
      panel.show(reply);
      replies.push(reply);
    }
    compare(replies, panels);
    turns.push({ question, levels, answers: replies.map((reply) => reply.answer) });
    $("question").value = "";
    $("question").placeholder = "Ask on about the same picture";
    $("fresh").hidden = false;
  } catch (error) {
    running.abort();
    throw error;
  } finally {
    panels.forEach((panel) => panel.stop());
    busy(null);
    showCode();
  }
}

function busy(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
}

function compare(replies, panels) {
  const saved = (reply) => percent(Math.max(0, 1 - reply.pruning.flops_ratio));
  if (replies.length === 1) {
    const [{ pruning }] = replies;
    $("verdict").textContent = `${pruning.level}: ${count(pruning.visual_tokens, "visual token")} of ${pruning.visual_tokens_total}, ${saved(replies[0])} of the FLOPs saved`;
    return;
  }
  const words = replies.map((reply) => split(reply.answer));
  const changed = difference(...words);
  const differing = changed.map((marks) => marks.filter(Boolean).length);
  const [least] = [...replies].sort((a, b) => a.pruning.flops_ratio - b.pruning.flops_ratio);
  if (Math.max(...differing) === 0) {
    $("verdict").textContent = `Same answer. ${least.pruning.level} kept ${least.pruning.visual_tokens} of ${count(least.pruning.visual_tokens_total, "visual token")} and saved ${saved(least)} of the FLOPs.`;
    return;
  }
  $("verdict").textContent = `The answers differ in ${count(Math.max(...differing), "word")}, marked below.`;
  panels.forEach((panel, i) => panel.answer.replaceChildren(...marked(words[i], changed[i])));
}

function showChat() {
  $("chat").replaceChildren(...turns.map((turn) => {
    const item = document.createElement("li");
    const lines = [turn.question, ...turn.answers.map((answer, i) => `${turn.levels[i]}: ${answer}`)];
    item.append(...lines.map((line) => {
      const p = document.createElement("p");
      p.textContent = line;
      return p;
    }));
    return item;
  }));
}

function startOver() {
  running?.abort();
  turns = [];
  $("result").hidden = $("fresh").hidden = true;
  $("question").placeholder = "";
  showCode();
}

// ---- the code

function showCode() {
  const base = new URL("./", location.href).href;
  const file = picture?.name ?? "picture.png";
  const level = $("right").value || $("left").value;
  const column = $("right").value ? 1 : 0;
  $("code-title").textContent = `The request at ${level} in code`;
  const typed = $("question").value;
  const last = turns.at(-1); // shown until the next question is typed
  const chat = typed || !last ? [typed, column] : [last.question, column, turns.slice(0, -1)];
  $("snippet").textContent = language(body(level, ...chat), file, picture?.type ?? "image/png", base, hasKey());
}

function watchCode() {
  const choose = (chosen) => {
    language = chosen;
    $("curl").setAttribute("aria-pressed", chosen === curl);
    $("python").setAttribute("aria-pressed", chosen === python);
    showCode();
  };
  $("curl").onclick = () => choose(curl);
  $("python").onclick = () => choose(python);
  $("copy").onclick = guarded(async () => {
    try {
      await navigator.clipboard.writeText($("snippet").textContent);
      $("copied").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren($("snippet")); // without https the clipboard is closed to pages
      $("copied").textContent = "Selected: copy it with Ctrl+C";
    }
    setTimeout(() => ($("copied").textContent = ""), 4000);
  });
  for (const id of ["question", "left", "right"]) $(id).addEventListener("input", showCode);
}

// ---- the levels

async function loadLevels() {
  const [{ data: levels, default: standard }, { data: models }] = await Promise.all([get("v1/pruning/levels"), get("v1/models")]);
  model = models[0].id;
  $("served").textContent = `serves ${model}. Ask about a picture, and choose how much of the model runs.`;
  const options = (select, chosen, first = []) => {
    const option = ([value, text]) => new Option(text, value, value === chosen, value === chosen);
    select.replaceChildren(...[...first, ...levels.map(({ name }) => [name, name])].map(option));
  };
  options($("left"), standard);
  const other = ["strong", "auto", "off"].find((name) => name !== standard && levels.some((level) => level.name === name));
  options($("right"), other, [["", "nothing"]]);
  showLevels(levels);
  showCode();
}

function showLevels(levels) {
  const known = (value, tell) => (value === undefined || value === null ? "–" : tell(value));
  const columns = {
    "Accuracy (95 % interval)": ({ card }) => known(card?.interval, ([low, high]) =>
      `${percent(card.accuracy, 1)} (${(100 * low).toFixed(1)}–${(100 * high).toFixed(1)})`),
    "Same answer as off": ({ card }) => known(card?.agreement, (value) => percent(value, 1)),
    "FLOPs": ({ card }) => known(card?.flops_ratio, (value) => percent(value)),
    "Visual tokens": ({ card }) => known(card?.visual_tokens, String),
    "KV cache": ({ card }) => known(card?.kv_bytes, (value) => `${(value / 1000).toFixed(0)} kB`),
    "First token": ({ card }) => known(card?.first_token_seconds, (value) => `${(1000 * value).toFixed(1)} ms`),
    "What runs": (level) => level.description,
  };
  const table = $("levels");
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  const header = (row, text, scope) => {
    const cell = document.createElement("th");
    cell.scope = scope;
    cell.textContent = text;
    row.append(cell);
  };
  for (const name of ["Level", ...Object.keys(columns)]) header(head, name, "col");
  const rows = table.createTBody();
  for (const level of levels) {
    const row = rows.insertRow();
    header(row, level.name, "row");
    for (const tell of Object.values(columns)) row.insertCell().textContent = tell(level);
  }
}

// ---- what goes wrong

function guarded(act) {
  return async (event) => {
    $("problem").textContent = "";
    try {
      await act(event);
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 401) $("key").hidden = false;
      $("problem").textContent = error.status === 401 ? `${error.message} Enter a key below.` : error.message;
      if (!(error instanceof Refused)) console.error(error);
    }
  };
}

$("ask").onsubmit = guarded(send);
$("stop").onclick = () => running?.abort();
$("fresh").onclick = guarded(() => {
  startOver();
  $("question").focus();
});
$("key").onsubmit = guarded(async (event) => {
  event.preventDefault();
  useKey($("api-key").value);
  await loadLevels();
  $("key").hidden = true;
});
watchPictures();
watchCode();
showSamples();
guarded(loadLevels)();
guarded(() => takeSample("shapes"))();
