// The page of `pruneport serve`: a photo, the tokens that are kept of it, a question, and answers that stream.
"use strict";

const part = (id) => document.getElementById(id);
const state = {facts: null, photo: null, running: null, looking: 0};

// What was done before is dropped when something new is begun.
function begin() {
  if (state.running) state.running.abort();
  state.running = new AbortController();
  return state.running;
}

function trouble(words) {
  part("trouble").textContent = words;
  part("trouble").hidden = !words;
}

function say(words) {
  part("status").textContent = words;
}

async function told(response) {
  const answer = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error; // something newer was begun meanwhile
    return {error: "the server's answer cannot be read; reload the page"};
  });
  if (!response.ok || answer.error) throw new Error(answer.error);
  return answer;
}

function failed(error) {
  if (error.name === "AbortError") return;
  trouble(error instanceof TypeError ? "The server is not there any more; start it again." : error.message);
  say("");
}

function post(path, body, signal) {
  return fetch(path, {method: "POST", body, signal});
}

// The bundle

async function open() {
  const facts = (state.facts = await told(await fetch("/bundle")));
  document.title = `${facts.name} · pruneport`;
  part("name").textContent = facts.name;
  part("subtitle").textContent = facts.subtitle;
  part("device").textContent = facts.device;
  part("sample").hidden = !facts.sample;
  for (const keep of facts.keeps) part("keep").add(new Option(`${keep} of ${facts.image_tokens} tokens`, keep));
  part("keep-field").hidden = facts.keeps.length < 2;
  part("twin-field").hidden = part("twin-side").hidden = !facts.twin;
  part("no-twin").textContent = facts.why_no_twin;
  part("no-twin").hidden = !facts.why_no_twin || Boolean(facts.why_no_answer);
  part("twin").checked = Boolean(facts.twin);
  const notes = [];
  if (facts.random_seed !== null) {
    notes.push(`Random weights (seed ${facts.random_seed}): size and speed hold; tokens and answers mean nothing.`);
  }
  if (facts.emulated) notes.push("The NPU is only emulated on this machine: the times below say nothing about a phone.");
  part("banner").textContent = notes.join(" ");
  part("banner").hidden = !notes.length;
  if (facts.why_no_answer) {
    part("form").hidden = part("sides").hidden = true;
    say(facts.why_no_answer);
  }
  picked();
  ready();
}

const keep = () => Number(part("keep").value);

function picked() {
  const all = state.facts.image_tokens;
  part("tokens").textContent = keep() === all ? `${all} image tokens` : `${all} → ${keep()} image tokens`;
  part("tokens").hidden = false;
  part("bundle-title").textContent = keep() === all ? "Unpruned" : "Pruned";
  part("bundle-column").textContent = keep() === all ? "unpruned" : "pruned";
}

function ready() {
  part("ask").disabled = !state.photo;
  const empty = state.photo ? "Ask something." : "Choose a photo first.";
  for (const side of ["bundle", "twin"]) part(`${side}-answer`).dataset.empty = empty;
}

// The photo

async function show(file) {
  if (!file || !state.facts) return;
  const limit = state.facts.max_upload_bytes;
  if (file.size > limit) {
    trouble(`${file.name || "The photo"} has ${(file.size / 2 ** 20).toFixed(0)} MiB; at most ${limit / 2 ** 20} MiB are taken. Choose a smaller one.`);
    return;
  }
  const {signal} = begin();
  trouble("");
  busy(true, "Reading the photo…");
  try {
    const photo = await told(await post("/photo", file, signal));
    state.photo = photo.photo;
    const {columns, rows} = state.facts;
    part("picture").setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    part("seen").setAttribute("width", columns);
    part("seen").setAttribute("height", rows);
    part("seen").setAttribute("href", `data:image/jpeg;base64,${photo.jpeg}`);
    overlay([]);
    clear();
    part("zone").hidden = true;
    part("picture").removeAttribute("hidden");
    ready();
    await look(signal);
  } catch (error) {
    failed(error);
  } finally {
    if (!state.running || state.running.signal === signal) busy(false);
  }
}

async function look(signal) {
  busy(true, "Choosing the tokens…");
  const seen = await told(await post("/kept", JSON.stringify({photo: state.photo, keep: keep()}), signal));
  overlay(seen.kept);
  const all = state.facts.image_tokens;
  const share = ((100 * seen.kept.length) / all).toFixed(0);
  part("caption").textContent = `${seen.kept.length} of ${all} tokens kept (${share} %), ready after ${ms(seen.image_ready_ms)}`;
  part("picture").setAttribute("aria-label", `The photo as the model sees it; ${seen.kept.length} of ${all} patches are kept, the others are dimmed`);
  busy(false);
  say(state.facts.why_no_answer || "The photo is ready. Ask something.");
}

function busy(yes, words) {
  part("figure").classList.toggle("busy", yes);
  if (words) say(words);
}

function overlay(kept) {
  const {rows, columns, overview} = state.facts;
  const chosen = new Set(kept);
  const before = overview ? overview[0] * overview[1] : 0;
  const cells = (wanted) => {
    let path = "";
    for (let at = 0; at < rows * columns; at++) {
      if (chosen.has(before + at) === wanted) path += `M${at % columns} ${Math.floor(at / columns)}h1v1h-1z`;
    }
    return path;
  };
  // Tokens of the view of the whole photo are larger than those of its tiles.
  const larger = () => {
    const [height, width] = [rows / overview[0], columns / overview[1]];
    const shape = (at) => `M${(at % overview[1]) * width} ${Math.floor(at / overview[1]) * height}h${width}v${height}h-${width}z`;
    return kept.filter((at) => at < before).map(shape).join("");
  };
  part("show-field").hidden = !kept.length;
  const whole = !kept.length || kept.length === before + rows * columns;
  part("dropped").setAttribute("d", whole ? "" : cells(false));
  part("kept").setAttribute("d", whole ? "" : cells(true) + (overview ? larger() : ""));
}

// Question and answers

function clear() {
  for (const side of ["bundle", "twin"]) {
    part(`${side}-answer`).textContent = "";
    part(`${side}-answer`).classList.remove("error");
    part(`${side}-answer`).setAttribute("aria-busy", "false");
  }
  part("numbers").hidden = true;
}

async function ask() {
  const {signal} = begin();
  const both = part("twin").checked && Boolean(state.facts.twin);
  clear();
  trouble("");
  asking(true);
  part("twin-side").hidden = !both;
  for (const side of ["bundle", "twin"]) part(`${side}-answer`).dataset.empty = side === "twin" ? "Comes second." : "";
  const numbers = {};
  try {
    const question = {photo: state.photo, keep: keep(), question: part("question").value, twin: both};
    const response = await post("/answer", JSON.stringify(question), signal);
    if (!response.ok) await told(response);
    let good = true;
    for await (const event of events(response)) good = happened(event, numbers) && good;
    say(good ? "Done." : "");
  } catch (error) {
    failed(error);
    if (error.name === "AbortError" && state.running?.signal === signal) say("Stopped.");
  } finally {
    if (state.running?.signal === signal) {
      for (const side of ["bundle", "twin"]) part(`${side}-answer`).setAttribute("aria-busy", "false");
      asking(false);
      ready();
    }
  }
}

function asking(yes) {
  const had = document.activeElement;
  part("stop").hidden = !yes;
  part("ask").hidden = yes;
  // The focus stays where it was to be seen.
  if (had === part("ask") && yes) part("stop").focus();
  if (had === part("stop") && !yes) part("ask").focus();
}

// Lines of JSON, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function happened(event, numbers) {
  if (event.waiting) {
    say("Another question is being answered; this one is next.");
    return true;
  }
  const place = part(`${event.side}-answer`);
  if (event.begins) {
    place.setAttribute("aria-busy", "true");
    say(event.side === "twin" ? "The unpruned twin answers…" : "Answering…");
  }
  if (event.piece) place.append(event.piece);
  if (event.end || event.error) place.setAttribute("aria-busy", "false");
  if (event.end && !place.textContent) place.textContent = "(an empty answer)";
  if (event.error) {
    place.textContent = event.error;
    place.classList.add("error");
    return false;
  }
  if (event.numbers) {
    numbers[event.side] = event.numbers;
    table(numbers);
  }
  return true;
}

// Numbers

const ms = (value) => (value >= 1e4 ? `${(value / 1e3).toFixed(2)} s` : value >= 100 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`);
const bytes = (value) => (value >= 1e9 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(value < 1e8 ? 1 : 0)} MB`);
const MEASURED = [
  ["image ready", "image_ready_ms", ms],
  ["TTFT", "ttft_ms", ms],
  ["tokens/s", "tokens_per_s", (value) => value.toFixed(1)],
  ["KV cache", "kv_cache_bytes", bytes],
  ["peak memory", "peak_rss_bytes", bytes],
];

function table(numbers) {
  const {bundle, twin} = numbers;
  const rows = MEASURED.map(([name, field, words]) => {
    const row = document.createElement("tr");
    const head = row.appendChild(document.createElement("th"));
    head.scope = "row";
    head.textContent = name;
    const cell = (text) => {
      const made = row.insertCell();
      made.className = "n";
      made.textContent = text;
    };
    const value = (side) => (side[field] === null ? "–" : words(side[field]));
    cell(value(bundle));
    if (twin) {
      cell(value(twin));
      cell(bundle[field] && twin[field] ? (bundle[field] / twin[field]).toFixed(3) : "–");
    }
    return row;
  });
  part("rows").replaceChildren(...rows);
  for (const head of document.querySelectorAll("th.twin")) head.hidden = !twin;
  part("numbers").hidden = false;
}

// What the reader does

for (const id of ["choose", "camera"]) {
  part(id).addEventListener("change", (event) => {
    show(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
}
part("sample").addEventListener("click", async () => {
  try {
    const response = await fetch("/sample.png");
    if (!response.ok) await told(response);
    await show(await response.blob());
  } catch (error) {
    failed(error);
  }
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  show(file);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    part("figure").classList.toggle("over", name === "dragover");
    if (name === "drop") show(event.dataTransfer.files[0]);
  });
}
part("show").addEventListener("change", () => part("figure").classList.toggle("plain", !part("show").checked));
part("keep").addEventListener("change", async () => {
  picked();
  if (!state.photo) return;
  const {signal} = begin();
  clear();
  asking(false);
  ready();
  try {
    await look(signal);
  } catch (error) {
    failed(error);
    if (state.running.signal === signal) busy(false);
  }
});
part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (state.photo) ask();
});
part("stop").addEventListener("click", () => state.running?.abort());
part("question").addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});

open().catch(failed);
