// The encoder and the decoder at work, on the graphics card where the browser has WebGPU, else on the processor.

import { choose, toDecoder } from "./prompts.mjs";
import { planes, resized } from "./resize.mjs";

const MOST_THREADS = 8;
const here = (name) => new URL(name, import.meta.url).href;

// What `model.json` says, and the model loaded in the first way that works here. `tell(done, total)` hears of bytes,
// `asked` is a way to be taken whatever there is: "webgpu" or "wasm".
export async function loadModel(tell, asked = null) {
  const facts = await (await get("model.json", "no-cache")).json();
  const reasons = [];
  for (const way of await ways(facts, asked)) {
    try {
      return await Model.load(facts, way, tell);
    } catch (error) {
      reasons.push(`${way.provider}: ${error.message}`);
    }
  }
  throw new Error(reasons.join("; ") || `this browser has no ${asked}`);
}

// Ways to run the model, the fastest first. Files of half precision need a card that computes in it.
async function ways({ encoders }, asked) {
  const found = [];
  const adapter = asked === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  if (adapter?.features.has("shader-f16")) found.push({ provider: "webgpu", precision: "float16" });
  if (adapter) found.push({ provider: "webgpu", precision: "float32" });
  if (asked !== "webgpu") found.push({ provider: "wasm", precision: "float32" });
  return found.map((way) => ({ ...way, encoder: encoders[way.precision] }));
}

async function get(name, cache = "default") {
  const answer = await fetch(here(name), { cache });
  if (!answer.ok) throw new Error(`${name.split("?")[0]} is not on the server (${answer.status})`);
  return answer;
}

async function bytesOf(name, tell) {
  const answer = await get(name);
  const total = Number(answer.headers.get("Content-Length")) || 0;
  const blocks = [];
  let done = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    blocks.push(value);
    tell((done += value.length), Math.max(total, done));
  }
  const whole = new Uint8Array(done);
  let at = 0;
  for (const block of blocks) {
    whole.set(block, at);
    at += block.length;
  }
  return whole;
}

export class Model {
  static async load(facts, { provider, precision, encoder }, tell) {
    const ort = await import(`./ort.${provider}.bundle.min.mjs`);
    const threads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, MOST_THREADS) : 1;
    if (provider === "wasm") ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    const open = async (name) => {
      // By the model's fingerprint, so that no cache can put one model's encoder beside another's decoder.
      const file = await bytesOf(`${name}?v=${facts.fingerprint}`, (done, total) => tell(name, done, total));
      return ort.InferenceSession.create(file, { executionProviders: [provider], logSeverityLevel: 3 });
    };
    const model = new Model(ort, facts, await open(encoder), await open(facts.decoder));
    const on = threads === 1 ? "1 thread" : `${threads} threads`;
    model.backend = provider === "wasm" ? `WASM, ${on}` : `WebGPU, ${precision}`;
    if (provider === "webgpu") await model.prove();
    return model;
  }

  constructor(ort, facts, encoder, decoder) {
    Object.assign(this, { ort, facts, encoder, decoder });
    this.cells = facts.image_size / 4;
  }

  tensor(values, dims) {
    return new this.ort.Tensor("float32", values, dims);
  }

  // Compiles what a card runs, and refuses one that cannot compute: what overflows gives numbers that are none.
  async prove() {
    const { image_size: size, input_size: side } = this.facts;
    const embedding = await this.encode(new Uint8Array(side * side * 3).fill(99), side, side);
    const { ious } = await this.run(embedding, Float32Array.of(size / 2, size / 2, 0, 0), Float32Array.of(1, -1), 1);
    if (![...embedding.data, ...ious].every(Number.isFinite)) throw new Error("it does not compute what it should");
  }

  // Width and height of a picture at the size that prompts are in.
  inside({ width, height }) {
    return resized(width, height, this.facts.image_size);
  }

  // Embedding of a resized picture, RGB bytes.
  async encode(rgb, width, height) {
    const side = this.facts.input_size;
    const image = this.tensor(planes(rgb, width, height, side, this.facts.mean), [1, 3, side, side]);
    return (await this.encoder.run({ image })).image_embeddings;
  }

  // Four masks and predicted IoUs for each of `count` prompts of equally many points.
  async run(embedding, coords, labels, count) {
    const { cells } = this;
    const points = labels.length / count;
    const made = await this.decoder.run({
      image_embeddings: embedding,
      point_coords: this.tensor(coords, [count, points, 2]),
      point_labels: this.tensor(labels, [count, points]),
      mask_input: this.tensor(new Float32Array(count * cells * cells), [count, 1, cells, cells]),
      has_mask_input: this.tensor(new Float32Array(count), [count]),
    });
    return { masks: made.low_res_masks.data, ious: made.iou_predictions.data };
  }

  // The mask of one object, as SamPredictor chooses it: logits (cells, cells), and its predicted IoU.
  async decode(embedding, prompt, picture) {
    const { coords, labels } = toDecoder(prompt, picture, this.inside(picture));
    const { masks, ious } = await this.run(embedding, coords, labels, 1);
    const best = choose(prompt, ious);
    const size = this.cells ** 2;
    return { logits: masks.slice(best * size, (best + 1) * size), predictedIou: ious[best] };
  }

  // Masks of many clicks, each an object's: `(points, 4, cells, cells)` logits and predicted IoUs.
  decodeEach(embedding, points, picture) {
    const asked = points.map(([x, y]) => toDecoder({ points: [[x, y, 1]], box: null }, picture, this.inside(picture)));
    const together = (name) => Float32Array.from(asked.flatMap((each) => [...each[name]]));
    return this.run(embedding, together("coords"), together("labels"), points.length);
  }
}
