// All that is in a picture: a grid of points through the decoder, and what segment-anything's generator keeps of it
// (arXiv:2304.02643, appendix B; automatic_mask_generator.py). The whole picture is the only crop.

export const BATCH = 32; // points a pass; more of them take memory and let nothing else in between
const SAME = 0.7; // IoU of boxes above which two masks are the same thing

// Points in pixels of a picture, in rows, each in the middle of its cell.
export function grid(side, width, height) {
  const places = Array.from({ length: side }, (_, place) => (place + 0.5) / side);
  return places.flatMap((y) => places.map((x) => [x * width, y * height]));
}

// Those of one pass that are believed in and stable: `{logits, predictedIou, stability, area, box, point}`.
export function sift(points, masks, ious, enlarger, thresholds) {
  const size = enlarger.cells ** 2;
  const kept = [];
  points.forEach((point, number) => {
    for (let mask = 1; mask < 4; mask++) {
      const place = number * 4 + mask;
      if (!(ious[place] > thresholds.predictedIou)) continue;
      const logits = masks.subarray(place * size, (place + 1) * size);
      const seen = enlarger.survey(logits);
      if (!seen.box || !(seen.stability >= thresholds.stability)) continue;
      kept.push({ ...seen, logits: logits.slice(), predictedIou: ious[place], point });
    }
  });
  return kept;
}

// One of those whose boxes are nearly the same, the one that is believed in most (greedy non-maximum suppression).
export function suppress(found) {
  const kept = [];
  for (const each of [...found].sort((a, b) => b.predictedIou - a.predictedIou))
    if (!kept.some((other) => boxIou(each.box, other.box) > SAME)) kept.push(each);
  return kept;
}

function boxIou([ax0, ay0, ax1, ay1], [bx0, by0, bx1, by1]) {
  const across = Math.min(ax1, bx1) - Math.max(ax0, bx0);
  const down = Math.min(ay1, by1) - Math.max(ay0, by0);
  const shared = Math.max(across, 0) * Math.max(down, 0);
  return shared / ((ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared);
}
