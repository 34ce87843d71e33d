// The page: what is pressed becomes a prompt, and a prompt a mask.

import { connect, tool } from "./controls.mjs";
import { Engine } from "./engine.mjs";
import { listen } from "./pointing.mjs";
import { History, NOTHING, isNothing, withBox, withPoint } from "./prompts.mjs";
import { View } from "./view.mjs";

const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];

const view = new View($("picture"), $("mask"), $("marks"));
const engine = new Engine((event, more) => HEARD[event](more));
const asked = new URLSearchParams(location.search);

let facts; // what `model.json` says
let name = "picture"; // of the file, for what is saved
let history = new History();
let everything = null; // how many masks are shown, where all are
let preview = null; // the prompt of a hover, where there is no other
let drawn = null; // a box that is being drawn
let crosshair = null;
let encoded = false; // whether the worker knows the picture that is shown
let early = null; // a picture that came before the model
let opened = 0; // counts pictures, so that what comes late is known to be of an earlier one

// --- what is going on -------------------------------------------------------------------------------------------

const state = () => document.body.dataset.state; // loading, empty, encoding, ready, everything, failed

function enter(next) {
  document.body.dataset.state = next;
  const busy = ["loading", "encoding", "everything"].includes(next);
  $("working").hidden = !busy;
  $("cancel").hidden = next !== "everything";
  $("progress").removeAttribute("value");
  $("stage").ariaBusy = String(busy);
  refresh();
}

function say(text) {
  $("status").textContent = text;
}

function complain(text) {
  $("fault").textContent = text;
  $("fault").hidden = !text;
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

function refresh() {
  const ready = state() === "ready";
  const mask = !isNothing(history.now);
  const able = {
    open: !["loading", "failed"].includes(state()), example: !["loading", "failed"].includes(state()),
    undo: ready && (history.canUndo || everything !== null), redo: ready && history.canRedo,
    clear: ready && (mask || everything !== null), everything: ready, png: ready && mask && everything === null,
    rle: ready && (mask || everything !== null),
  };
  for (const button of all("[data-do]")) button.disabled = !able[button.dataset.do];
  view.mark(everything === null ? history.now : NOTHING, drawn, crosshair);
}

const HEARD = {
  loading({ name: file, done, total }) {
    say(`Loading ${file}: ${(done / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
    $("progress").value = done / total;
  },

  picture({ width, height, shown }) {
    $("drop").hidden = true;
    $("frame").hidden = false;
    $("frame").style.setProperty("--ratio", shown.width / shown.height);
    view.show(shown, width, height);
    $("marks").dispatchEvent(new Event("newpicture"));
    $("size").textContent = `${width} × ${height}`;
    history = new History();
    everything = preview = drawn = crosshair = null;
    encoded = false;
    for (const each of ["encoded", "decoded", "iou", "share"]) $(each).textContent = "–";
    say("Encoding the picture …");
    enter("encoding");
  },

  progress({ done, total }) {
    $("progress").value = done / total;
    say(`Everything: ${done} of ${total} points`);
  },
};

// --- from prompts to masks ---------------------------------------------------------------------------------------

let wanted = null;
let asking = false;

// Asks for the mask of the newest prompt; those that were overtaken meanwhile are left out.
async function decode() {
  const prompt = isNothing(history.now) ? preview : history.now;
  wanted = { prompt, isPreview: isNothing(history.now), picture: opened };
  if (asking) return;
  asking = true;
  $("marks").ariaBusy = "true";
  while (wanted) {
    const now = wanted;
    wanted = null;
    if (!now.prompt) {
      view.clear();
      continue;
    }
    try {
      const found = await engine.ask("decode", { prompt: now.prompt });
      if (now.picture === opened && everything === null && !(wanted && !wanted.prompt)) showMask(found, now.isPreview);
    } catch (error) {
      complain(error.message);
    }
  }
  asking = false;
  $("marks").ariaBusy = "false";
}

function showMask({ mask, predictedIou, decodeMs }, isPreview) {
  view.paint(mask, isPreview);
  const share = mask.reduce((sum, value) => sum + value, 0) / mask.length;
  $("decoded").textContent = seconds(decodeMs);
  $("iou").textContent = predictedIou.toFixed(3);
  $("share").textContent = `${(100 * share).toFixed(1)} %`;
  if (!isPreview) say(`Mask of ${(100 * share).toFixed(1)} % of the picture, predicted IoU ${predictedIou.toFixed(2)}.`);
}

// After the prompt has changed.
function update() {
  everything = preview = null;
  if (isNothing(history.now)) {
    for (const each of ["iou", "share"]) $(each).textContent = "–";
    say("Click on an object, or drag a box around it.");
  }
  refresh();
  decode();
}

function change(prompt) {
  if (state() !== "ready") return;
  history.push(prompt);
  update();
}

const ACTS = {
  add: (x, y) => change(withPoint(history.now, x, y, true)),
  remove: (x, y) => change(withPoint(history.now, x, y, false)),
  box: (corners) => change(withBox(history.now, corners)),
  hover(x, y) {
    if (state() !== "ready" || everything !== null || !isNothing(history.now)) return;
    preview = withPoint(NOTHING, x, y);
    decode();
  },
  leave() {
    if (!preview) return;
    preview = null;
    decode();
  },
  draw(box) {
    drawn = box;
    refresh();
  },
  cross(at) {
    crosshair = at;
    refresh();
  },
};

// --- what buttons and keys do ------------------------------------------------------------------------------------

async function open(blob, from = "picture") {
  if (!blob) return;
  if (!facts) {
    early = [blob, from];
    return;
  }
  complain("");
  const picture = ++opened;
  engine.cancel();
  name = from.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}_-]+/gu, "_") || "picture";
  try {
    const { resizeMs, encodeMs } = await engine.ask("open", { blob });
    encoded = true;
    if (picture !== opened) return; // another was opened meanwhile
    $("encoded").textContent = seconds(encodeMs);
    $("encoded").title = `and resized in ${seconds(resizeMs)} before`;
    enter("ready");
    update();
  } catch (error) {
    complain(error.message);
    enter(encoded ? "ready" : "empty");
    say(encoded ? "The picture before is still here." : "Choose, drop or paste a picture.");
  }
}

async function example() {
  const answer = await fetch("example.png").catch(() => null);
  if (answer?.ok) open(await answer.blob(), "example.png");
  else complain("The example is not on the server.");
}

async function findEverything() {
  history = new History();
  everything = preview = null;
  view.clear();
  enter("everything");
  say("Everything …");
  const picture = opened;
  const { pred_iou_thresh: predictedIou, stability_score_thresh: stability } = facts.everything;
  try {
    const found = await engine.ask("everything", {
      side: Number($("grid").value), thresholds: { predictedIou, stability },
    });
    if (picture !== opened) return;
    enter("ready");
    if (!found) return say("Everything: stopped.");
    everything = found.count;
    view.paintAll(found.numbers, found.count);
    for (const each of ["decoded", "iou", "share"]) $(each).textContent = "–";
    $("decoded").textContent = seconds(found.ms);
    say(`${found.count} masks in ${seconds(found.ms)}.`);
  } catch (error) {
    complain(error.message);
    enter("ready");
  }
  refresh();
}

function save(blob, file) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = file;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say(`Saved ${file}.`);
}

const inJson = (value) => new Blob([`${JSON.stringify(value, null, 1)}\n`], { type: "application/json" });

const DO = {
  open: () => $("file").click(),
  example,
  undo() {
    if (everything === null) history.move(-1);
    update();
  },
  redo() {
    history.move(1);
    update();
  },
  clear: () => (everything === null ? change(NOTHING) : update()),
  everything: findEverything,
  async png() {
    say("Saving …");
    save(await engine.ask("png", { prompt: history.now }), `${name}_mask.png`);
  },
  async rle() {
    say("Saving …");
    const found = everything === null ? await engine.ask("rle", { prompt: history.now }) : await engine.ask("allRles");
    save(inJson(found), `${name}_${everything === null ? "mask" : "masks"}.json`);
  },
};

function run(action) {
  if (all(`[data-do="${action}"]`).every((button) => button.disabled)) return;
  Promise.resolve(DO[action]()).catch((error) => complain(error.message));
}

async function start() {
  $("unserved").remove();
  enter("loading");
  listen($("marks"), view, ACTS, tool, () => state() === "ready");
  connect({ run, open, complain, refresh, stop: () => engine.cancel() });
  try {
    const loaded = await engine.ask("load", { provider: asked.get("backend") });
    facts = loaded.facts;
    $("backend").textContent = loaded.backend;
    $("grid").value = String([8, 16, 32].find((side) => side >= facts.everything.points_per_side) ?? 32);
    enter("empty");
    say("Choose, drop or paste a picture.");
    if (early) open(...early);
  } catch (error) {
    complain(`The model cannot be loaded. ${error.message}`);
    enter("failed");
    say("There is no model.");
  }
}

start();
