// What is seen: the picture, the mask above it, and clicks, box and crosshair above that, a canvas each.

const FILL = [64, 132, 255, 115];
const EDGE = [255, 255, 255, 255];
const MARKS = { on: "#16a34a", off: "#e11d48", box: "#ffffff", shade: "rgb(0 0 0 / 60%)" };
const ARM = 9; // of the crosshair, in CSS pixels

export class View {
  constructor(picture, mask, marks) {
    Object.assign(this, { picture, mask, marks, width: 0, height: 0 });
  }

  // A new picture of width × height pixels, as a bitmap of any size.
  show(bitmap, width, height) {
    Object.assign(this, { width, height });
    for (const canvas of [this.picture, this.mask, this.marks]) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
    }
    const context = this.picture.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, bitmap.width, bitmap.height);
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
  }

  // A place of the window in pixels of the picture, within it.
  locate({ clientX, clientY }) {
    const { left, top, width, height } = this.marks.getBoundingClientRect();
    const within = (at, length) => Math.min(Math.max(at, 0), length - 1);
    return [
      within(((clientX - left) / width) * this.width, this.width),
      within(((clientY - top) / height) * this.height, this.height),
    ];
  }

  // Pixels of the picture in a CSS pixel.
  get scale() {
    return this.width / (this.marks.getBoundingClientRect().width || this.width);
  }

  clear() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
  }

  // A byte a pixel, 1 on the object; a preview is fainter.
  paint(mask, isPreview) {
    this.colour(mask, () => (isPreview ? [...FILL.slice(0, 3), 80] : FILL), isPreview ? [255, 255, 255, 170] : EDGE);
  }

  // A number a pixel, a colour each.
  paintAll(numbers, count) {
    const colours = Array.from({ length: count }, (_, place) => [...hue(place * 137.508), 120]);
    this.colour(numbers, (number) => colours[number - 1], EDGE);
  }

  // Each number's colour, and an edge where it borders on another; thicker where there are more pixels than are seen.
  colour(numbers, colourOf, edge) {
    const { width, height } = this.mask;
    const context = this.mask.getContext("2d");
    const image = context.createImageData(width, height);
    const thick = Math.max(1, Math.round(width / (this.mask.clientWidth || width)));
    const differs = (i, x, y) =>
      (x >= thick && numbers[i - thick] !== numbers[i]) || (x + thick < width && numbers[i + thick] !== numbers[i]) ||
      (y >= thick && numbers[i - thick * width] !== numbers[i]) ||
      (y + thick < height && numbers[i + thick * width] !== numbers[i]);
    for (let y = 0, i = 0; y < height; y++)
      for (let x = 0; x < width; x++, i++)
        if (numbers[i]) image.data.set(differs(i, x, y) ? edge : colourOf(numbers[i]), i * 4);
    context.putImageData(image, 0, 0);
  }

  // Clicks and box of a prompt, a box that is being drawn, and the keyboard's crosshair; the last two may be null.
  mark({ points, box }, drawn, crosshair) {
    const context = this.marks.getContext("2d");
    const { width, height } = this.marks;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const pixel = width / (this.marks.getBoundingClientRect().width || width); // a CSS pixel
    const place = ([x, y]) => [((x + 0.5) / this.width) * width, ((y + 0.5) / this.height) * height];
    if (box) outline(context, [...place(box), ...place(box.slice(2))], pixel, []);
    if (drawn) outline(context, [...place(drawn), ...place(drawn.slice(2))], pixel, [6 * pixel, 4 * pixel]);
    for (const [x, y, on] of points) dot(context, place([x, y]), on, pixel);
    if (crosshair) cross(context, place(crosshair), pixel);
  }
}

function twice(context, pixel, colour, draw) {
  for (const [style, line] of [[MARKS.shade, 4], [colour, 2]]) {
    context.strokeStyle = style;
    context.lineWidth = line * pixel;
    context.beginPath();
    draw();
    context.stroke();
  }
}

function outline(context, [x0, y0, x1, y1], pixel, dashes) {
  context.setLineDash(dashes);
  twice(context, pixel, MARKS.box, () => context.rect(x0, y0, x1 - x0, y1 - y0));
  context.setLineDash([]);
}

function dot(context, [x, y], on, pixel) {
  context.beginPath();
  context.arc(x, y, 8 * pixel, 0, 2 * Math.PI);
  context.fillStyle = on ? MARKS.on : MARKS.off;
  context.fill();
  context.strokeStyle = "white";
  context.lineWidth = 2 * pixel;
  context.stroke();
  context.beginPath();
  context.moveTo(x - 4 * pixel, y);
  context.lineTo(x + 4 * pixel, y);
  if (on) {
    context.moveTo(x, y - 4 * pixel);
    context.lineTo(x, y + 4 * pixel);
  }
  context.stroke();
}

function cross(context, [x, y], pixel) {
  const [near, far] = [3 * pixel, ARM * 2 * pixel];
  twice(context, pixel, "white", () => {
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + dx * near, y + dy * near);
      context.lineTo(x + dx * far, y + dy * far);
    }
  });
}

// A colour of the wheel, in degrees.
function hue(angle) {
  return [0, 8, 4].map((turn) => {
    const part = (turn + angle / 30) % 12;
    return Math.round(255 * (0.55 - 0.41 * Math.max(-1, Math.min(part - 3, 9 - part, 1))));
  });
}
