// A picture as the browser decodes it: upright, with its own numbers, on white where it is transparent.

import { Resizer, resized } from "./resize.mjs";

export const MOST_PIXELS = 100e6;
const [FEWEST, MOST] = [640, 1280]; // of the longest side, in pixels, as it is shown
const TILE = 8192; // wider canvases are refused by some browsers
const AT_ONCE = 1 << 22; // pixels that are read at a time

// Raises an error that people can read where it is no picture, too large or too elongated.
export async function readPicture(blob, side) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("That is not a picture that this browser can read.");
  }
  const { width, height } = bitmap;
  const fault = width * height > MOST_PIXELS ? "is more than 100 megapixels" :
    Math.min(...resized(width, height, side)) < 1 ? "is too elongated" : null;
  if (!fault) return bitmap;
  bitmap.close();
  throw new Error(`A picture of ${width} × ${height} pixels ${fault}.`);
}

// At a size to be shown at: [width, height].
export function viewSize({ width, height }) {
  const longest = Math.max(width, height);
  const scale = longest > MOST ? MOST / longest : Math.ceil(FEWEST / longest);
  return [width, height].map((length) => Math.max(1, Math.round(length * scale)));
}

// RGB bytes at the encoder's size, and that size; the picture is read from top to bottom.
export function toEncoder(bitmap, side) {
  const [width, height] = resized(bitmap.width, bitmap.height, side);
  const resizer = new Resizer(bitmap.width, bitmap.height, width, height);
  const rows = Math.max(1, Math.min(bitmap.height, Math.floor(AT_ONCE / bitmap.width)));
  const canvas = new OffscreenCanvas(Math.min(bitmap.width, TILE), rows);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  context.fillStyle = "white";
  for (let y = 0; y < bitmap.height; y += rows) resizer.push(strip(bitmap, y, Math.min(rows, bitmap.height - y), context));
  return { rgb: resizer.finish(), width, height };
}

// Some rows, RGBA bytes.
function strip(bitmap, y, rows, context) {
  const read = (x, width) => {
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, x, y, width, rows, 0, 0, width, rows);
    return context.getImageData(0, 0, width, rows).data;
  };
  if (bitmap.width <= TILE) return read(0, bitmap.width);
  const found = new Uint8ClampedArray(bitmap.width * rows * 4);
  for (let x = 0; x < bitmap.width; x += TILE) {
    const width = Math.min(TILE, bitmap.width - x);
    const tile = read(x, width);
    for (let row = 0; row < rows; row++)
      found.set(tile.subarray(row * width * 4, (row + 1) * width * 4), (row * bitmap.width + x) * 4);
  }
  return found;
}
