// Segment Anything in Node and in browsers: a picture is embedded once, and each click is then a matter of milliseconds.
//
//   const segmenter = await Segmenter.load(ort, "encoder.onnx", "decoder.onnx");
//   const picture = await segmenter.embed({ data, width, height });
//   const first = await segmenter.mask(picture, { points: [[320, 200, 1]] });
//   const better = await segmenter.mask(picture, { points: [[320, 200, 1], [90, 40, 0]], earlier: first });

import { Resizer, planes, resized } from "./resize.mjs";

const MEAN = [123.675, 116.28, 103.53]; // the colour of padding: 0 inside the encoder
const [OFF, ON, TOP_LEFT, BOTTOM_RIGHT, PAD] = [0, 1, 2, 3, -1];

export class Segmenter {
  // `ort` is onnxruntime-node or onnxruntime-web; `encoder` and `decoder` are what its InferenceSession.create takes:
  // paths, addresses or bytes.
  static async load(ort, encoder, decoder, options = {}) {
    const open = (file) => ort.InferenceSession.create(file, { logSeverityLevel: 3, ...options });
    return new Segmenter(ort, await open(encoder), await open(decoder));
  }

  // Of sessions that are open. Raises an error where they are not an encoder and a decoder for what it makes; whether
  // they are of one model only Python can see (segmenter.py), for ONNX Runtime shows no metadata here.
  constructor(ort, encoder, decoder) {
    if (!encoder.inputMetadata) throw new Error("This needs onnxruntime-node or onnxruntime-web 1.22 or newer.");
    Object.assign(this, { ort, encoder, decoder });
    const [embedding, made] = [shapeOf(decoder.inputMetadata, "image_embeddings"), encoder.outputMetadata[0]?.shape];
    this.side = shapeOf(encoder.inputMetadata, "image").at(-1); // of the encoder's input, in pixels
    this.cells = shapeOf(decoder.inputMetadata, "mask_input").at(-1); // of a low-resolution mask
    this.space = 4 * this.cells; // prompts are in pixels of a picture of this longest side
    shapeOf(decoder.inputMetadata, "orig_im_size");
    if (shapeOf(decoder.outputMetadata, "iou_predictions").at(-1) !== 1)
      throw new Error("The decoder returns several masks; decoder.onnx returns one.");
    if (![1, 2, 3].every((axis) => embedding[axis] === made[axis]))
      throw new Error(`The encoder makes ${made.join("×")}, the decoder takes ${embedding.join("×")}.`);
  }

  // The whole picture, upright: RGB or RGBA bytes, row by row; alpha is dropped, not blended. To be done once; what it
  // returns, { width, height, embedding }, goes into `mask`.
  async embed({ data, width, height }) {
    const bytes = data.length / (width * height);
    if (bytes !== 3 && bytes !== 4)
      throw new Error(`${data.length} bytes are not a picture of ${width} × ${height} pixels in RGB or RGBA.`);
    const inside = this.fit(width, height, this.side);
    const resizer = new Resizer(width, height, ...inside);
    resizer.push(data, bytes);
    const image = planes(resizer.finish(), ...inside, this.side, MEAN);
    const feeds = { image: this.tensor(image, [1, 3, this.side, this.side]) };
    const [embedding] = Object.values(await this.encoder.run(feeds));
    return { width, height, embedding };
  }

  // The object that is meant, as SamPredictor chooses it.
  //   points   [[x, y, label], ...] in pixels of the picture; label 1 on the object, 0 beside it
  //   box      [x0, y0, x1, y1], any two opposite corners
  //   earlier  the answer before, where a prompt adds to that one's
  //   size     [width, height] that the mask is wanted at, of the picture's shape; without it the picture's own
  // Returns { mask, width, height, predictedIou, lowRes }: 255 on the object and 0 elsewhere, a byte a pixel; and
  // logits of cells × cells, for which the answer is handed on as `earlier`. Raises an error that people can read.
  async mask(picture, { points, box, earlier, size } = {}) {
    const asked = toDecoder({ points, box }, picture, this.fit(picture.width, picture.height, this.space));
    const [width, height] = checkSize(size ?? [picture.width, picture.height], picture);
    const { cells } = this;
    if (earlier && earlier.lowRes?.length !== cells ** 2)
      throw new Error("`earlier` is to be what `mask` returned before.");
    const { masks, iou_predictions, low_res_masks } = await this.decoder.run({
      image_embeddings: picture.embedding,
      point_coords: this.tensor(asked.coords, [1, asked.labels.length, 2]),
      point_labels: this.tensor(asked.labels, [1, asked.labels.length]),
      mask_input: this.tensor(earlier?.lowRes ?? new Float32Array(cells ** 2), [1, 1, cells, cells]),
      has_mask_input: this.tensor(Float32Array.of(earlier ? 1 : 0), [1]),
      orig_im_size: this.tensor(Float32Array.of(height, width), [2]),
    });
    const logits = masks.data;
    const mask = new Uint8Array(width * height);
    for (let i = 0; i < mask.length; i++) if (logits[i] > 0) mask[i] = 255;
    return { mask, width, height, predictedIou: iou_predictions.data[0], lowRes: low_res_masks.data };
  }

  // Width and height of a picture at a longest side.
  fit(width, height, longest) {
    const inside = resized(width, height, longest);
    if (Math.min(...inside) < 1) throw new Error(`A picture of ${width} × ${height} pixels is too elongated.`);
    return inside;
  }

  tensor(values, dims) {
    return new this.ort.Tensor("float32", values, dims);
  }
}

// Coordinates and labels as the decoder takes them, in pixels of the picture resized to [width, height], which scales
// each axis by itself, as segment-anything's `apply_coords` does. Raises an error where nothing can be asked with them.
export function toDecoder({ points, box }, picture, [width, height]) {
  const given = [...checkPoints(points ?? []), ...corners(box)];
  if (!given.length) throw new Error("There is nothing to go by: give a point or a box.");
  if (given.at(-1)[2] !== BOTTOM_RIGHT) given.push([0, 0, PAD]); // as SAM was trained
  return {
    coords: Float32Array.from(given.flatMap(([x, y]) => [x * (width / picture.width), y * (height / picture.height)])),
    labels: Float32Array.from(given, ([, , label]) => label),
  };
}

function checkPoints(points) {
  for (const point of points) {
    const [x, y, label] = Object(point)[Symbol.iterator] ? point : [];
    if (![x, y].every(Number.isFinite)) throw new Error(`A point is [x, y, label] in pixels, not ${show(point)}.`);
    if (label !== ON && label !== OFF)
      throw new Error(`A point's label is 1 on the object or 0 beside it, not ${label}.`);
  }
  return points;
}

function corners(box) {
  if (box === undefined || box === null) return [];
  if (box.length !== 4 || !Array.from(box).every(Number.isFinite))
    throw new Error(`A box is [x0, y0, x1, y1] in pixels, not ${show(box)}.`);
  const [x0, y0, x1, y1] = box;
  if (x0 === x1 && y0 === y1) throw new Error(`The corners of a box are one point, ${x0},${y0}.`);
  return [[Math.min(x0, x1), Math.min(y0, y1), TOP_LEFT], [Math.max(x0, x1), Math.max(y0, y1), BOTTOM_RIGHT]];
}

// The decoder cuts off padding by the shape of the size that it is asked for: within a pixel it is the picture's.
function checkSize([width, height], picture) {
  if (![width, height].every((side) => Number.isInteger(side) && side > 0))
    throw new Error(`A mask cannot be of ${width} × ${height} pixels.`);
  if (Math.abs(width * picture.height - height * picture.width) > Math.max(picture.width, picture.height))
    throw new Error(`A mask of ${width} × ${height} pixels has another shape than the picture.`);
  return [width, height];
}

// The shape of one of a session's inputs or outputs.
function shapeOf(metadata, name) {
  const found = metadata.find((each) => each.name === name);
  if (!found) throw new Error(`The model has no ${name}: it has ${metadata.map((each) => each.name).join(", ")}.`);
  return found.shape;
}

const show = (value) => (Object(value)[Symbol.iterator] ? `[${[...value].map(String).join(", ")}]` : String(value));
