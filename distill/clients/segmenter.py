"""An exported encoder and decoder at work: pictures and clicks in, masks out; ONNX Runtime, NumPy and Pillow alone.

This file is handed out beside `encoder.onnx` and `decoder.onnx`, and imports nothing of the project that made them.
"""

import hashlib
import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError

MEAN = (123.675, 116.28, 103.53)
"""What a picture is padded with: SAM's mean colour, which normalises to 0 inside the encoder."""

MAX_PIXELS = 100_000_000
"""Of a picture; more is refused before it is decoded."""

FINGERPRINT = "fingerprint"
"""Key of the files' metadata: encoder and decoder that belong together have one value."""


class BadPicture(ValueError):
    """What was sent is no picture that can be segmented, and why."""


@dataclass(frozen=True)
class Mask:
    """An answer: boolean (H, W) of the picture, or of the size that was asked for, the decoder's own estimate of its
    IoU, and the low-resolution logits (1, 1, 4h, 4w) that the next call takes as `earlier`."""

    mask: np.ndarray
    predicted_iou: float
    low_res: np.ndarray


class Segmenter:
    """The two files of a folder, opened once; may be used from several threads.

    Args:
        folder: where `encoder.onnx` and `decoder.onnx` lie.
        providers: ONNX Runtime's execution providers; default: CUDA where the installed build has it, and the CPU.
        threads: of one run; default: ONNX Runtime's own choice.
        cache_mb: embeddings that are kept, by the picture's content, the most recently used.
        encoder: another than `encoder.onnx`.
        decoder: another than `decoder.onnx`.

    Raises:
        RuntimeError: they are not an encoder, and the decoder of one mask that belongs to it.
    """

    def __init__(
        self,
        folder: str | Path,
        providers: Sequence[str] | None = None,
        threads: int = 0,
        cache_mb: float = 256,
        encoder: Path | None = None,
        decoder: Path | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        there = onnxruntime.get_available_providers()
        chosen = [name for name in providers or ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
        if "CUDAExecutionProvider" in chosen and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries where pip has put them
        files = (Path(encoder or Path(folder) / "encoder.onnx"), Path(decoder or Path(folder) / "decoder.onnx"))
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(file), options, providers=chosen) for file in files
        )
        self.fingerprint = _of_both(self.encoder, self.decoder, files)
        self.input_size = int(self.encoder.get_inputs()[0].shape[-1])
        self.image_size = int(_shape(self.decoder.get_inputs(), "mask_input")[-1]) * 4
        self.providers = self.encoder.get_providers()
        self._kept: OrderedDict[bytes, tuple[np.ndarray, tuple[int, int]]] = OrderedDict()
        self._room = int(cache_mb * 2**20)
        self._lock = threading.Lock()

    def look(self, encoded: bytes, upright: bool = True) -> tuple[np.ndarray, tuple[int, int]]:
        """The embedding, float32 (1, C, h, w), and (width, height) of an encoded picture, from the cache if there.

        Args:
            encoded: a file's bytes, JPEG, PNG or whatever else Pillow reads.
            upright: turn it as its EXIF orientation says, as browsers do.

        Raises:
            BadPicture: it cannot be read, or is too large.
        """
        key = hashlib.sha256(encoded).digest() + bytes([upright])
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        picture = read_picture(encoded, upright)
        found = self.embed(picture), picture.size
        with self._lock:
            self._kept[key] = found
            while len(self._kept) * found[0].nbytes > self._room and self._kept:
                self._kept.popitem(last=False)
        return found

    def embed(self, picture: Image.Image) -> np.ndarray:
        """The embedding, float32 (1, C, h, w), of an RGB picture; raises `BadPicture` where it is too elongated."""
        side = self.input_size
        pixels = np.empty((1, 3, side, side), np.float32)
        pixels[:] = np.array(MEAN, np.float32)[:, None, None]
        width, height = resized(picture.size, side)
        small = picture.resize((width, height), Image.Resampling.BILINEAR)
        pixels[0, :, :height, :width] = np.asarray(small).transpose(2, 0, 1)
        return self.encoder.run(["image_embeddings"], {self.encoder.get_inputs()[0].name: pixels})[0]

    def segment(
        self,
        embedding: np.ndarray,
        size: tuple[int, int],
        points: Sequence[Sequence[float]] = (),
        labels: Sequence[int] = (),
        box: Sequence[float] | None = None,
        earlier: np.ndarray | None = None,
        shown: tuple[int, int] | None = None,
    ) -> Mask:
        """The mask of one object.

        Args:
            embedding: of the picture, from `look` or `embed`.
            size: width and height of the picture.
            points: x, y of clicks in pixels of the picture.
            labels: 1 for each click on the object, 0 beside it.
            box: x0, y0, x1, y1 in pixels of the picture, two opposite corners.
            earlier: `low_res` of an answer that this one corrects.
            shown: width and height of the mask; default: the picture's. A mask for a screen is made sooner than one of
                12 megapixels.

        Raises:
            ValueError: there is neither a point nor a box, or one that is not made of finite numbers; labels are
                others, or not as many as points; or `shown` has another shape than the picture.
        """
        width, height = shown or size
        if abs(width * size[1] - height * size[0]) > max(size) or min(width, height) < 1:
            raise ValueError(
                f"a mask of {width}×{height} px has another shape than the picture, {size[0]}×{size[1]} px"
            )
        corners: Sequence[float] | np.ndarray = () if box is None else np.sort(np.reshape(box, (2, 2)), axis=0)
        coords = np.array([*corners, *points], np.float64)[None]
        if not coords.size:
            raise ValueError("neither a point nor a box says what to segment")
        if coords.shape[2:] != (2,):
            raise ValueError("a point is x, y")
        if not np.isfinite(coords).all():
            raise ValueError("a point or box is not a number")
        if len(labels) != len(points) or not set(labels) <= {0, 1}:
            raise ValueError(f"each of {len(points)} points has a label, 1 on the object or 0 beside it, not {labels}")
        coords = coords * np.array(resized(size, self.image_size)) / np.array(size)
        kinds = [*([] if box is None else [2, 3]), *labels]
        side = self.image_size // 4
        feeds = {
            "image_embeddings": embedding,
            "point_coords": coords.astype(np.float32),
            "point_labels": np.array([kinds], np.float32).reshape(1, -1),
            "mask_input": np.zeros((1, 1, side, side), np.float32) if earlier is None else earlier,
            "has_mask_input": np.array([earlier is not None], np.float32),
            "orig_im_size": np.array([height, width], np.float32),
        }
        names = [output.name for output in self.decoder.get_outputs()]
        found = dict(zip(names, self.decoder.run(names, feeds), strict=True))
        mask = found["masks"][0, 0] > 0
        if "xtl" in found:  # the object alone, and where it lies: CVAT's way
            whole = np.zeros((height, width), bool)
            left, top = int(found["xtl"][0]), int(found["ytl"][0])
            whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            mask = whole
        return Mask(mask, float(found["iou_predictions"][0, 0]), found["low_res_masks"])

    def warm_up(self) -> None:
        """Run both once, so that the first request is as fast as the others."""
        embedding = self.embed(Image.new("RGB", (64, 48)))
        self.segment(embedding, (64, 48), [(32, 24)], [1])


def read_picture(encoded: bytes, upright: bool = True) -> Image.Image:
    """An RGB picture.

    Raises:
        BadPicture: it is none, is cut short, or has more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            picture = Image.open(io.BytesIO(encoded))
        if picture.format == "EPS":
            raise BadPicture("PostScript is a program, which Pillow would have run")
        if picture.width * picture.height > MAX_PIXELS:
            raise BadPicture(f"{picture.width}×{picture.height} px are more than {MAX_PIXELS:,}")
        picture.load()
        if upright:
            ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)
    except BadPicture:
        raise
    except UnidentifiedImageError as error:
        raise BadPicture("not a picture of a kind that can be read") from error
    except Exception as error:  # Pillow's decoders raise of many kinds for what is no picture
        raise BadPicture(f"not a picture that can be read: {error}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB; of 16 bits the upper eight."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture)
        levels = levels if levels.dtype == np.uint16 else levels.clip(0, 2**16 - 1).astype(np.uint16)
        picture = Image.fromarray((levels >> 8).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def resized(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Width and height of a picture that is resized to a longest side, as SAM does it.

    Raises:
        BadPicture: the short side would have no pixel at all.
    """
    scale = longest / max(size)
    width, height = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
    if min(width, height) < 1:
        raise BadPicture(f"{size[0]}×{size[1]} px are too elongated for a longest side of {longest} px")
    return width, height


def _of_both(
    encoder: onnxruntime.InferenceSession, decoder: onnxruntime.InferenceSession, files: tuple[Path, Path]
) -> str:
    """The fingerprint that an encoder and its decoder have in common.

    Raises:
        RuntimeError: they are not an encoder, and the decoder of one mask that belongs to it.
    """
    if [each.name for each in encoder.get_inputs()] != ["image"]:
        raise RuntimeError(f"{files[0]} is no encoder that takes an image of 0–255")
    if _shape(decoder.get_outputs(), "iou_predictions")[-1] == 4:
        raise RuntimeError(f"{files[1]} makes all masks of a prompt, and not the one")
    ours, theirs = (each.get_modelmeta().custom_metadata_map.get(FINGERPRINT) for each in (encoder, decoder))
    if ours is None or ours != theirs:
        raise RuntimeError(f"{files[0]} is of {ours}, {files[1].name} of {theirs}: not one model")
    return str(ours)


def _shape(tensors: Sequence[onnxruntime.NodeArg], name: str) -> list[int | str]:
    """Of one of a session's inputs or outputs."""
    for tensor in tensors:
        if tensor.name == name:
            return tensor.shape
    raise RuntimeError(f"this is no decoder: it has no {name}, but {', '.join(tensor.name for tensor in tensors)}")
