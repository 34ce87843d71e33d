// A picture's own numbers in Node, by the package sharp: upright, without its colour profile, its alpha dropped and not
// blended; of 16 bits the upper 8; grey as three equal channels. So has the model seen its pictures.

import { readFile } from "node:fs/promises";

// A file → { width, height, data }: RGB bytes, row by row. Raises an error that people can read where it is no picture.
export async function readPixels(sharp, path) {
  const encoded = await readFile(path);
  try {
    const { space, depth } = await sharp(encoded).metadata();
    if (!["uchar", "ushort"].includes(depth)) throw new Error(`it has numbers of ${depth}, not of 8 or 16 bits`);
    const image = sharp(encoded, { ignoreIcc: true, failOn: "error" }).autoOrient();
    return await (space === "cmyk" ? fromCmyk(image) : take(image.toColourspace("srgb").removeAlpha()));
  } catch (error) {
    throw new Error(`${path} is not a picture that can be read: ${error.message.split("\n")[0]}`);
  }
}

async function take(image) {
  const { data, info } = await image.raw().toBuffer({ resolveWithObject: true });
  return { width: info.width, height: info.height, data };
}

// Ink to light without a profile, as Pillow has it: (255 − K) · (255 − C) ÷ 255.
async function fromCmyk(image) {
  const { width, height, data: ink } = await take(image.pipelineColourspace("cmyk").toColourspace("cmyk"));
  const data = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < ink.length; from += 4) {
    const left = 255 - ink[from + 3];
    for (let channel = 0; channel < 3; channel++) data[to++] = left - Math.round((ink[from + channel] * left) / 255);
  }
  return { width, height, data };
}
