import ort from "onnxruntime-node";

const SIZE = 1024; // prompts are in pixels of an image of this longest side
const INPUT = 1024; // the encoder takes an image of this one
const MEAN = [123.675, 116.28, 103.53];
const encoder = await ort.InferenceSession.create("encoder.onnx");
const decoder = await ort.InferenceSession.create("decoder.onnx");
const tensor = (values, dims) => new ort.Tensor("float32", Float32Array.from(values), dims);

// Width and height to resize an image to.
export function resized(imageWidth, imageHeight, longest = INPUT) {
  const scale = longest / Math.max(imageWidth, imageHeight);
  return [imageWidth, imageHeight].map((side) => Math.floor(side * scale + 0.5));
}

// pixels: the resized image row by row, 3 bytes a pixel (RGB) or 4 (RGBA, as a canvas has them).
export async function embed(pixels, width, height) {
  const bytes = pixels.length / (width * height);
  const image = new Float32Array(3 * INPUT * INPUT);
  for (let channel = 0; channel < 3; channel++) {
    image.fill(MEAN[channel], channel * INPUT * INPUT, (channel + 1) * INPUT * INPUT);
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        image[(channel * INPUT + y) * INPUT + x] = pixels[(y * width + x) * bytes + channel];
  }
  return (await encoder.run({ image: tensor(image, [1, 3, INPUT, INPUT]) })).image_embeddings;
}

// points: [[x, y, label], ...] in pixels of the original image; a box is two points with labels 2 and 3.
export async function segment(image_embeddings, points, imageWidth, imageHeight, earlier) {
  const [width, height] = resized(imageWidth, imageHeight, SIZE);
  const prompt = points.map(([x, y, label]) => [(x * width) / imageWidth, (y * height) / imageHeight, label]);
  if (!points.some(([, , label]) => label === 2)) prompt.push([0, 0, -1]);
  const side = SIZE / 4;
  return decoder.run({
    image_embeddings,
    point_coords: tensor(prompt.flatMap(([x, y]) => [x, y]), [1, prompt.length, 2]),
    point_labels: tensor(prompt.map(([, , label]) => label), [1, prompt.length]),
    mask_input: earlier ?? tensor(new Float32Array(side * side), [1, 1, side, side]),
    has_mask_input: tensor([earlier ? 1 : 0], [1]),
    orig_im_size: tensor([imageHeight, imageWidth], [2]),
  }); // masks (logits: object where > 0), iou_predictions, low_res_masks (give it as `earlier` to the next click)
}
