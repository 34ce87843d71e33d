// What takes long, beside the page: the page stays quick, and asks one thing after the other.

import { BATCH, grid, sift, suppress } from "./everything.mjs";
import { Enlarger } from "./masks.mjs";
import { loadModel } from "./model.mjs";
import { readPicture, toEncoder, viewSize } from "./picture.mjs";
import { maskPng } from "./png.mjs";
import { encode } from "./rle.mjs";

let model;
let scene; // the picture that is open: its size, embedding and enlarger to the size that it is shown at
let found; // all that is in it, where that was asked for
let cancelled = false;

const tell = (event, more, transfer = []) => postMessage({ event, ...more }, transfer);

// Lets messages in.
const pause = () => new Promise((resume) => setTimeout(resume));

const enlargerTo = (size) => new Enlarger(model.cells, model.facts.image_size, model.inside(scene), size);

const ASKED = {
  async load({ provider }) {
    model = await loadModel((name, done, total) => tell("loading", { name, done, total }), provider);
    return { backend: model.backend, facts: model.facts };
  },

  // Shown as soon as it is decoded; the answer comes when it is encoded too.
  async open({ blob }) {
    const bitmap = await readPicture(blob, model.facts.input_size);
    const { width, height } = bitmap;
    const view = viewSize(bitmap);
    const [resizeWidth, resizeHeight] = view;
    const shown = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "high" });
    scene = found = null;
    tell("picture", { width, height, shown }, [shown]);
    const began = performance.now();
    const small = toEncoder(bitmap, model.facts.input_size);
    bitmap.close();
    const resizedAt = performance.now();
    const embedding = await model.encode(small.rgb, small.width, small.height);
    scene = { width, height, embedding };
    scene.view = enlargerTo(view);
    return { resizeMs: resizedAt - began, encodeMs: performance.now() - resizedAt };
  },

  async decode({ prompt }) {
    const began = performance.now();
    const { logits, predictedIou } = await model.decode(scene.embedding, prompt, scene);
    const decodeMs = performance.now() - began;
    return { mask: scene.view.mask(logits), predictedIou, decodeMs };
  },

  async png({ prompt }) {
    const { logits } = await model.decode(scene.embedding, prompt, scene);
    return new Blob(await maskPng(enlargerTo([scene.width, scene.height]), logits), { type: "image/png" });
  },

  async rle({ prompt }) {
    const { logits, predictedIou } = await model.decode(scene.embedding, prompt, scene);
    return { ...record(enlargerTo([scene.width, scene.height]), logits, predictedIou), ...prompt };
  },

  // A number for each pixel that is shown: 0, or the place of the smallest mask that it belongs to, from 1 on.
  async everything({ side, thresholds }) {
    cancelled = false;
    const [width, height] = [scene.width, scene.height];
    const shrink = Math.min(1, model.facts.image_size / Math.max(width, height)); // stability is measured at this size
    const enlarger = enlargerTo([width, height].map((length) => Math.max(1, Math.round(length * shrink))));
    const points = grid(side, width, height);
    const began = performance.now();
    let kept = [];
    for (let start = 0; start < points.length; start += BATCH) {
      const some = points.slice(start, start + BATCH);
      const { masks, ious } = await model.decodeEach(scene.embedding, some, scene);
      kept.push(...sift(some, masks, ious, enlarger, thresholds));
      tell("progress", { done: start + some.length, total: points.length });
      await pause();
      if (cancelled) return null;
    }
    kept = suppress(kept);
    found = kept;
    const numbers = new Uint16Array(scene.view.width * scene.view.height);
    const largestFirst = kept.map((each, place) => [each, place + 1]).sort(([a], [b]) => b.area - a.area);
    for (const [each, number] of largestFirst) {
      const mask = scene.view.mask(each.logits);
      for (let i = 0; i < mask.length; i++) if (mask[i]) numbers[i] = number;
    }
    return { numbers, count: kept.length, ms: performance.now() - began };
  },

  async allRles() {
    const enlarger = enlargerTo([scene.width, scene.height]);
    return found.map(({ logits, predictedIou, stability, point }) => ({
      ...record(enlarger, logits, predictedIou), stability_score: stability, point_coords: [point],
    }));
  },
};

// A mask as segment-anything's generator describes it, its box as x, y, width, height.
function record(enlarger, logits, predictedIou) {
  const { area, box } = enlarger.survey(logits, 0);
  const bbox = box ? [box[0], box[1], box[2] - box[0], box[3] - box[1]] : [0, 0, 0, 0];
  return { segmentation: encode(enlarger, logits), area, bbox, predicted_iou: predictedIou };
}

let queue = Promise.resolve();
onmessage = ({ data }) => {
  if (data.kind === "cancel") cancelled = true;
  else queue = queue.then(() => answer(data));
};

async function answer({ id, kind, ...asked }) {
  try {
    if (kind !== "load" && !model) throw new Error("The model is not loaded.");
    if (!["load", "open"].includes(kind) && !scene) throw new Error("No picture is open.");
    const result = await ASKED[kind](asked);
    const arrays = Object.values(result ?? {}).filter((value) => ArrayBuffer.isView(value));
    postMessage({ id, result }, arrays.map((array) => array.buffer)); // handed over, not copied
  } catch (error) {
    postMessage({ id, error: error.message });
  }
}
