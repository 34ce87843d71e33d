// What was asked for: clicks and a box, in pixels of the picture; and how the decoder is asked.

export const NOTHING = Object.freeze({ points: Object.freeze([]), box: null });

const [OFF, ON, TOP_LEFT, BOTTOM_RIGHT, PAD] = [0, 1, 2, 3, -1];

export const isNothing = ({ points, box }) => !points.length && !box;

// With a click more: on the object, or beside it.
export const withPoint = (prompt, x, y, on = true) => ({ ...prompt, points: [...prompt.points, [x, y, on ? ON : OFF]] });

// With a box, of any two corners; a picture has one object at a time, and so one box.
export const withBox = (prompt, [x0, y0, x1, y1]) => ({
  ...prompt,
  box: [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)],
});

// Coordinates and labels as the decoder takes them, in pixels of the picture resized to [width, height]. A prompt
// without a box ends in a point (0, 0) labelled -1, as SAM was trained.
export function toDecoder({ points, box }, picture, [width, height]) {
  const corners = box ? [[box[0], box[1], TOP_LEFT], [box[2], box[3], BOTTOM_RIGHT]] : [];
  const given = [...points, ...corners].map(([x, y, label]) => [
    x * (width / picture.width), y * (height / picture.height), label,
  ]);
  if (!box) given.push([0, 0, PAD]);
  return {
    coords: Float32Array.from(given.flatMap(([x, y]) => [x, y])),
    labels: Float32Array.from(given, ([, , label]) => label),
  };
}

// Which of the four masks SamPredictor is asked for: one click may mean a part or the whole, and of the three masks for
// that the one that the decoder believes in most is taken; anything more is clear, and the first mask is for that.
export function choose({ points, box }, ious) {
  if (points.length + (box ? 2 : 0) > 1) return 0;
  return [1, 2, 3].reduce((best, mask) => (ious[mask] > ious[best] ? mask : best));
}

// Prompts that can be taken back, and brought again.
export class History {
  constructor() {
    this.states = [NOTHING];
    this.at = 0;
  }

  get now() {
    return this.states[this.at];
  }

  get canUndo() {
    return this.at > 0;
  }

  get canRedo() {
    return this.at < this.states.length - 1;
  }

  push(state) {
    this.states = [...this.states.slice(0, this.at + 1), state];
    this.at++;
  }

  // By one step back (-1) or forth (1), as far as there are any.
  move(step) {
    this.at = Math.min(Math.max(this.at + step, 0), this.states.length - 1);
  }
}
