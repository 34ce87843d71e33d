// COCO's run-length encoding: runs of 0 and 1 in turn, column by column, as pycocotools reads it.

// Lengths of the runs, the first of zeros, of columns that come one after the other.
export class Runs {
  constructor() {
    this.counts = [];
    this.value = 0;
    this.length = 0;
  }

  // The next column: on the object where a value is above 0.
  push(column) {
    for (let i = 0; i < column.length; i++) {
      const value = column[i] > 0 ? 1 : 0;
      if (value !== this.value) {
        this.counts.push(this.length);
        this.value = value;
        this.length = 0;
      }
      this.length++;
    }
  }

  // So many pixels that are not on the object.
  skip(pixels) {
    if (!pixels) return;
    if (this.value) {
      this.counts.push(this.length);
      this.value = this.length = 0;
    }
    this.length += pixels;
  }

  finish() {
    this.counts.push(this.length);
    this.length = 0;
    return this.counts;
  }
}

// COCO's text for counts: each less the one before the last, in groups of five bits, the lowest first.
export function compress(counts) {
  let text = "";
  counts.forEach((count, place) => {
    let left = place > 2 ? count - counts[place - 2] : count;
    for (let more = true; more; ) {
      let group = left & 31;
      left >>= 5;
      more = group & 16 ? left !== -1 : left !== 0;
      if (more) group |= 32;
      text += String.fromCharCode(group + 48);
    }
  });
  return text;
}

// A mask of logits at the size of the picture, as COCO writes it.
export function encode(enlarger, logits) {
  const { width, height } = enlarger;
  const [x0, , x1] = enlarger.region(logits, 0) ?? [width, 0, width];
  const runs = new Runs();
  const column = new Float64Array(height);
  runs.skip(x0 * height);
  for (let x = x0; x < x1; x++) runs.push(enlarger.column(logits, x, column));
  runs.skip((width - x1) * height);
  return { size: [height, width], counts: compress(runs.finish()) };
}
