// Pillow's BILINEAR, by which the model was trained: a triangle filter that widens where the picture shrinks, in two
// passes of fixed-point arithmetic with 8 bits between them. A canvas resizes otherwise, and the masks show it.

const BITS = 22; // 32 less 8 of a level, less 2 so that a sum cannot overflow
const HALF = 1 << (BITS - 1);

// Width and height for a longest side, as segment-anything rounds them.
export function resized(width, height, longest) {
  const scale = longest / Math.max(width, height);
  return [width, height].map((side) => Math.floor(side * scale + 0.5));
}

// For each pixel of a resized axis: the first one it is made of, how many, and their weights (`taps` each).
function weigh(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  const taps = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(to);
  const count = new Int32Array(to);
  const weights = new Int32Array(to * taps);
  for (let place = 0; place < to; place++) {
    const center = (place + 0.5) * scale;
    const low = Math.max(Math.trunc(center - support + 0.5), 0);
    const high = Math.min(Math.trunc(center + support + 0.5), from);
    const shares = [];
    for (let pixel = low; pixel < high; pixel++)
      shares.push(Math.max(1 - Math.abs((pixel - center + 0.5) * (1 / support)), 0));
    const sum = shares.reduce((a, b) => a + b, 0);
    shares.forEach((share, tap) => {
      weights[place * taps + tap] = Math.trunc((share / sum) * (1 << BITS) + 0.5);
    });
    first[place] = low;
    count[place] = high - low;
  }
  return { first, count, weights, taps };
}

// A picture that arrives from top to bottom, so that it need not be in memory whole.
export class Resizer {
  constructor(width, height, toWidth, toHeight) {
    Object.assign(this, { width, height, toWidth, toHeight, row: 0 });
    this.across = weigh(width, toWidth);
    this.narrow = new Uint8ClampedArray(height * toWidth * 3); // all rows, already of the new width
  }

  // The next rows: RGBA bytes, or RGB where a pixel has three.
  push(pixels, bytes = 4) {
    const { width, toWidth, narrow } = this;
    const { first, count, weights, taps } = this.across;
    const rows = pixels.length / (bytes * width);
    let to = this.row * toWidth * 3;
    for (let y = 0; y < rows; y++)
      for (let x = 0; x < toWidth; x++) {
        let red = HALF, green = HALF, blue = HALF;
        let from = (y * width + first[x]) * bytes;
        for (let tap = x * taps, end = tap + count[x]; tap < end; tap++, from += bytes) {
          const weight = weights[tap];
          red += pixels[from] * weight;
          green += pixels[from + 1] * weight;
          blue += pixels[from + 2] * weight;
        }
        narrow[to++] = red >> BITS;
        narrow[to++] = green >> BITS;
        narrow[to++] = blue >> BITS;
      }
    this.row += rows;
  }

  // RGB bytes, row by row, once all rows have come.
  finish() {
    if (this.row !== this.height) throw new Error(`${this.row} rows of ${this.height}`);
    const { toWidth, toHeight, narrow } = this;
    const { first, count, weights, taps } = weigh(this.height, toHeight);
    const values = toWidth * 3;
    const found = new Uint8ClampedArray(toHeight * values);
    const sums = new Int32Array(values);
    for (let y = 0; y < toHeight; y++) {
      sums.fill(HALF);
      for (let tap = 0; tap < count[y]; tap++) {
        const weight = weights[y * taps + tap];
        const from = (first[y] + tap) * values;
        for (let i = 0; i < values; i++) sums[i] += narrow[from + i] * weight;
      }
      for (let i = 0; i < values; i++) found[y * values + i] = sums[i] >> BITS;
    }
    return found;
  }
}

// Encoder input: RGB bytes at the top left of side × side, the rest the mean colour, which is 0 inside the encoder.
// One plane a channel, float32.
export function planes(rgb, width, height, side, mean) {
  const found = new Float32Array(3 * side * side);
  for (let channel = 0; channel < 3; channel++) {
    const plane = found.subarray(channel * side * side, (channel + 1) * side * side).fill(mean[channel]);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) plane[y * side + x] = rgb[(y * width + x) * 3 + channel];
  }
  return found;
}
