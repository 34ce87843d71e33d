// From the decoder's logits to the picture's pixels: SamPredictor enlarges them to the model's size, cuts off what was
// padding, and resizes what is left to the picture, bilinear both times. Both are linear in each axis, so a pixel is
// a weighted sum of three logits across and three down, and no mask has to be in memory to be drawn or saved.

// torch's bilinear source of a pixel (align_corners=False): two neighbours, and the weight of the second.
function source(place, from, to) {
  const at = Math.max(((place + 0.5) * from) / to - 0.5, 0);
  const low = Math.min(Math.floor(at), from - 1);
  return [low, Math.min(low + 1, from - 1), at - low];
}

// For each pixel of an axis of the picture: the first of three logits, and their weights.
function compose(cells, side, inside, pixels) {
  const first = new Int32Array(pixels);
  const weights = new Float64Array(pixels * 3);
  for (let pixel = 0; pixel < pixels; pixel++) {
    const [low, high, share] = source(pixel, inside, pixels);
    const start = Math.min(source(low, cells, side)[0], cells - 3);
    first[pixel] = start;
    for (const [place, part] of [[low, 1 - share], [high, share]]) {
      const [near, far, weight] = source(place, cells, side);
      weights[pixel * 3 + near - start] += part * (1 - weight);
      weights[pixel * 3 + far - start] += part * weight;
    }
  }
  return { first, weights };
}

// Logits (cells, cells) of an image of side × side, of which inside = [width, height] is no padding, at the size of a
// picture [width, height].
export class Enlarger {
  constructor(cells, side, inside, [width, height]) {
    Object.assign(this, { cells, width, height });
    this.across = compose(cells, side, inside[0], width);
    this.down = compose(cells, side, inside[1], height);
    this.line = new Float64Array(cells);
  }

  // The logits of row y from pixel x0 to x1 (not included), put into an array from 0 on.
  row(logits, y, into, x0 = 0, x1 = this.width) {
    const { cells, line } = this;
    const from = this.down.first[y] * cells;
    const [a, b, c] = this.down.weights.subarray(y * 3, y * 3 + 3);
    for (let i = 0; i < cells; i++)
      line[i] = a * logits[from + i] + b * logits[from + cells + i] + c * logits[from + 2 * cells + i];
    return spread(line, this.across, into, x0, x1);
  }

  // The logits of column x.
  column(logits, x, into) {
    const { cells, line } = this;
    const from = this.across.first[x];
    const [a, b, c] = this.across.weights.subarray(x * 3, x * 3 + 3);
    for (let i = 0, at = from; i < cells; i++, at += cells)
      line[i] = a * logits[at] + b * logits[at + 1] + c * logits[at + 2];
    return spread(line, this.down, into, 0, this.height);
  }

  // Where logits may be above a level: [x0, y0, x1, y1], the last two not included; null where nowhere.
  // A weighted mean is never above all that it is made of.
  region(logits, level) {
    const { cells } = this;
    let left = cells, right = -1, top = cells, bottom = -1;
    for (let y = 0; y < cells; y++)
      for (let x = 0; x < cells; x++)
        if (logits[y * cells + x] > level) {
          left = Math.min(left, x);
          right = Math.max(right, x);
          top = Math.min(top, y);
          bottom = y;
        }
    if (bottom < 0) return null;
    const [x0, x1] = reach(this.across.first, left, right);
    const [y0, y1] = reach(this.down.first, top, bottom);
    return x0 < x1 && y0 < y1 ? [x0, y0, x1, y1] : null;
  }

  // Everything about a mask that takes no memory: area, box (first and last column and row), and the stability score,
  // by how much the mask changes when its threshold moves by 1 (segment-anything, calculate_stability_score).
  survey(logits, offset = 1) {
    const region = this.region(logits, -offset);
    let area = 0, inner = 0, outer = 0;
    let left = this.width, right = -1, top = this.height, bottom = -1;
    if (region) {
      const [x0, y0, x1, y1] = region;
      const line = new Float64Array(x1 - x0);
      for (let y = y0; y < y1; y++) {
        this.row(logits, y, line, x0, x1);
        for (let i = 0; i < line.length; i++) {
          const value = line[i];
          if (value <= -offset) continue;
          outer++;
          if (value > offset) inner++;
          if (value <= 0) continue;
          area++;
          if (x0 + i < left) left = x0 + i;
          if (x0 + i > right) right = x0 + i;
          if (y < top) top = y;
          bottom = y;
        }
      }
    }
    return { area, stability: inner / outer, box: area ? [left, top, right, bottom] : null };
  }

  // The mask, a byte a pixel: 1 on the object.
  mask(logits) {
    const found = new Uint8Array(this.width * this.height);
    const region = this.region(logits, 0);
    if (!region) return found;
    const [x0, y0, x1, y1] = region;
    const line = new Float64Array(x1 - x0);
    for (let y = y0; y < y1; y++) {
      this.row(logits, y, line, x0, x1);
      for (let i = 0; i < line.length; i++) if (line[i] > 0) found[y * this.width + x0 + i] = 1;
    }
    return found;
  }
}

function spread(line, { first, weights }, into, from, to) {
  for (let pixel = from, i = 0, w = from * 3; pixel < to; pixel++, i++, w += 3) {
    const at = first[pixel];
    into[i] = weights[w] * line[at] + weights[w + 1] * line[at + 1] + weights[w + 2] * line[at + 2];
  }
  return into;
}

// First pixel that heeds one of some cells, and the first behind it that heeds none.
function reach(first, low, high) {
  let start = 0, end = first.length;
  while (start < end && first[start] + 2 < low) start++;
  while (end > start && first[end - 1] > high) end--;
  return [start, end];
}
