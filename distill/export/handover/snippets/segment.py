import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

SIZE = 1024  # prompts are in pixels of an image of this longest side
INPUT = 1024  # the encoder takes an image of this one
MEAN = (123.675, 116.28, 103.53)
encoder = onnxruntime.InferenceSession("encoder.onnx")
decoder = onnxruntime.InferenceSession("decoder.onnx")

image = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
x, y = float(sys.argv[2]), float(sys.argv[3])


def resized(longest: int) -> tuple[int, ...]:
    scale = longest / max(image.size)
    return tuple(int(side * scale + 0.5) for side in image.size)


width, height = resized(INPUT)
pixels = np.empty((1, 3, INPUT, INPUT), np.float32)
pixels[:] = np.array(MEAN, np.float32)[:, None, None]
pixels[0, :, :height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
(embedding,) = encoder.run(["image_embeddings"], {"image": pixels})

width, height = resized(SIZE)
side = SIZE // 4
logits, iou = decoder.run(
    ["masks", "iou_predictions"],
    {
        "image_embeddings": embedding,
        "point_coords": np.array([[[x * width / image.width, y * height / image.height], [0, 0]]], np.float32),
        "point_labels": np.array([[1, -1]], np.float32),
        "mask_input": np.zeros((1, 1, side, side), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array([image.height, image.width], np.float32),
    },
)
mask = logits[0, 0] > 0
print(f"predicted IoU {iou[0, 0]:.3f}, {mask.sum()} pixels")
Image.fromarray(mask).save("mask.png")
