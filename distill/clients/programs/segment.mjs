// What is at some pixels of a photograph, as a mask. `node segment.mjs --help` says how it is asked; a program of one's
// own imports `Segmenter` from segmenter.mjs, as this one does.

import { existsSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import { readPixels } from "./pixels_node.mjs";
import { resized } from "./resize.mjs";
import { Segmenter } from "./segmenter.mjs";

const HELP = `node segment.mjs PHOTO [X,Y ...] [options]

node segment.mjs photo.jpg 320,240                          what is there
node segment.mjs photo.jpg 320,240 410,200 --off 90,300     all of that, and not this
node segment.mjs photo.jpg --box 100,80,420,400             what the box is around

  X,Y               points on the object, in pixels of the upright photo
  --off X,Y         a point beside it; may be repeated
  --box X0,Y0,X1,Y1 around it
  --refine          one point after the other, each with the mask before
  --longest PIXELS  of the mask's sides, for a screen; default: the photo's own size
  --encoder FILE    another of the encoders; default: encoder.onnx beside this program
  --out FILE        PNG, 255 on the object and 0 elsewhere; default: mask.png`;

const OPTIONS = {
  off: { type: "string", multiple: true, default: [] },
  box: { type: "string" },
  refine: { type: "boolean", default: false },
  longest: { type: "string" },
  encoder: { type: "string", default: beside("encoder.onnx") },
  out: { type: "string", default: "mask.png" },
  help: { type: "boolean", short: "h", default: false },
};

async function main() {
  const { values: asked, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  if (asked.help) return console.log(HELP);
  const [photo, ...on] = positionals;
  if (!photo) throw new Error("no photo is given; --help says how");
  const points = [...on.map((text) => [...numbers(text, 2), 1]), ...asked.off.map((text) => [...numbers(text, 2), 0])];
  const box = asked.box === undefined ? null : numbers(asked.box, 4);
  if (!points.length && !box) throw new Error("nothing to go by: give a point, X,Y, or --box X0,Y0,X1,Y1");
  const longest = asked.longest === undefined ? null : Number(asked.longest);
  if (longest !== null && !(Number.isInteger(longest) && longest > 0))
    throw new Error(`--longest is a number of pixels, not ${asked.longest}`);
  for (const file of [photo, asked.encoder, beside("decoder.onnx")])
    if (!existsSync(file)) throw new Error(`${file}: no such file`);

  const [ort, sharp] = await Promise.all([installed("onnxruntime-node"), installed("sharp")]);
  const pixels = await readPixels(sharp, photo);
  checkInside([...points, ...(box ? [box.slice(0, 2), box.slice(2)] : [])], pixels);
  const segmenter = await Segmenter.load(ort, asked.encoder, beside("decoder.onnx"));
  const picture = await segmenter.embed(pixels); // once a picture
  const size = longest && resized(picture.width, picture.height, longest).map((side) => Math.max(side, 1));
  let found = null;
  const first = asked.refine ? Math.min(1, points.length) : points.length;
  for (let count = first; count <= points.length; count++)
    found = await segmenter.mask(picture, { points: points.slice(0, count), box, earlier: found, size });

  const raw = { width: found.width, height: found.height, channels: 1 };
  await writeFile(asked.out, await sharp(found.mask, { raw }).toColourspace("b-w").png().toBuffer());
  const area = found.mask.reduce((sum, value) => sum + (value ? 1 : 0), 0);
  console.log(`${asked.out}: ${area} pixels, predicted IoU ${found.predictedIou.toFixed(3)}`);
}

function numbers(text, count) {
  const found = text.split(",").map((number) => (number.trim() ? Number(number) : NaN));
  if (found.length === count && found.every(Number.isFinite)) return found;
  throw new Error(`${text} is not ${count === 2 ? "a point, X,Y" : "a box, X0,Y0,X1,Y1"}, in pixels`);
}

function checkInside(places, { width, height }) {
  for (const [x, y] of places)
    if (x < 0 || y < 0 || x > width || y > height)
      throw new Error(`${x},${y} lies outside of the photo, which has ${width}×${height} pixels`);
}

async function installed(name) {
  try {
    return (await import(name)).default;
  } catch (error) {
    if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
    throw new Error(`${name} is not installed: npm install in ${beside(".")}`);
  }
}

function beside(name) {
  return fileURLToPath(new URL(name, import.meta.url));
}

main().catch((error) => {
  console.error(`segment.mjs: ${error.message.split("\n")[0]}`);
  process.exitCode = 2;
});
