"""What encodes pictures and decodes prompts: ONNX Runtime on the files of a run, or PyTorch on its student."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from segment_anything.modeling import Sam

from distill.export.batch import BatchDecoder
from distill.export.encoder import pad_with_mean_colour
from embeddings_cache.images import pad_pixels
from embeddings_cache.teacher import TeacherEncoder
from students import InputError, first_line

PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
"""ONNX Runtime's, the first choice first."""

ENCODER, DECODER = "encoder.onnx", "decoder_batch.onnx"


Earlier = Sequence[np.ndarray | None]


class Engine(Protocol):
    """May be used from several threads.

    Attributes:
        image_size: S, side of the encoder's square input.
        about: what it runs on, in a few words.
        on_cpu: whether more prompts at once only need more memory.
    """

    image_size: int
    about: str
    on_cpu: bool

    def encode(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures RGB uint8 (h, w, 3), max(h, w) = S → an embedding each, float32 (1, C, S/16, S/16)."""

    def decode(
        self, embedding: np.ndarray, coords: np.ndarray, labels: np.ndarray, earlier: Earlier = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """All masks of P prompts, as `BatchDecoder` makes them.

        Args:
            embedding: float32 (1, C, h, w).
            coords: float32 (P, N, 2); labels: float32 (P, N), `PAD` where there is no point.
            earlier: low-resolution logits (4h, 4w) that a prompt corrects, None where it corrects none.

        Returns:
            Logits (P, 4, 4h, 4w), the mask for clear prompts first, and predicted IoUs (P, 4).
        """


class OnnxEngine:
    """`encoder.onnx`, of any number of pictures, and `decoder_batch.onnx` in ONNX Runtime.

    Args:
        folder: where they lie.
        threads: of the encoder on a CPU. The decoder has one a request: several are worked on at once.
        batch_size: pictures that are encoded at once at most.

    Raises:
        InputError: ONNX Runtime does not take them.
    """

    def __init__(self, folder: Path, threads: int, batch_size: int) -> None:
        there = onnxruntime.get_available_providers()
        providers: list[Any] = [name for name in PROVIDERS if name in there]
        if len(providers) > 1 and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries where pip has put them
        try:
            self._encoder = _session(folder / ENCODER, providers, threads, {"image": (batch_size,)})
            prompts = {"point_coords": (64, 66), "point_labels": (64, 66), "mask_input": (64,), "has_mask_input": (64,)}
            self._decoder = _session(folder / DECODER, providers, 1, prompts)
        except Exception as error:  # ONNX Runtime's errors have no common class
            raise InputError(f"ONNX Runtime does not take the files in {folder}: {first_line(error)}") from error
        self.image_size = int(self._encoder.get_inputs()[0].shape[-1])
        self._side = int(self._decoder.get_inputs()[3].shape[-1])
        taken = self._encoder.get_providers()[0].removesuffix("ExecutionProvider")
        self.on_cpu = taken == "CPU"
        self.about = f"ONNX Runtime {onnxruntime.__version__} on {taken}"

    def encode(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine`."""
        images = np.concatenate([pad_with_mean_colour(each, self.image_size) for each in pictures])
        (embeddings,) = self._encoder.run(["image_embeddings"], {"image": images})
        return [each[None].copy() for each in embeddings]

    def decode(
        self, embedding: np.ndarray, coords: np.ndarray, labels: np.ndarray, earlier: Earlier = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        masks, given = earlier_masks(earlier, len(coords), self._side)
        feeds = {
            "image_embeddings": embedding,
            "point_coords": coords,
            "point_labels": labels,
            "mask_input": masks,
            "has_mask_input": given,
        }
        low_res, ious = self._decoder.run(["low_res_masks", "iou_predictions"], feeds)
        return low_res, ious


class TorchEngine:
    """A `Sam` in PyTorch, on a device."""

    def __init__(self, sam: Sam, device: torch.device, batch_size: int) -> None:
        self.device = device
        sam = sam.to(device).eval()
        self.image_size = int(sam.image_encoder.img_size)
        self._decoder = BatchDecoder(sam).to(device).eval()
        self._encoder = TeacherEncoder(sam, device, "float32", batch_size=batch_size)
        self._side = self.image_size // 4
        self.on_cpu = device.type == "cpu"
        self.about = f"PyTorch {torch.__version__} on {device.type.upper()}"

    def encode(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine`."""
        pixels = torch.stack([pad_pixels(each, self.image_size) for each in pictures])
        sizes = torch.tensor([each.shape[:2] for each in pictures])
        return [each[None].copy() for each in self._encoder(pixels, sizes).float().cpu().contiguous().numpy()]

    @torch.no_grad()
    def decode(
        self, embedding: np.ndarray, coords: np.ndarray, labels: np.ndarray, earlier: Earlier = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        masks, given = earlier_masks(earlier, len(coords), self._side)
        taken = [torch.from_numpy(each).to(self.device) for each in (embedding, coords, labels, masks, given)]
        low_res, ious = self._decoder(*taken)
        return low_res.float().cpu().numpy(), ious.float().cpu().numpy()


def earlier_masks(earlier: Earlier, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """What decoders take of earlier masks: float32 (P, 1, side, side), and float32 (P,), 1 where there is one."""
    masks, given = np.zeros((count, 1, side, side), np.float32), np.zeros(count, np.float32)
    for place, mask in enumerate(earlier):
        if mask is not None:
            masks[place], given[place] = mask, 1
    return masks, given


class Outline:
    """What segment-anything asks of a `Sam` whose encoder and decoder are elsewhere: how masks are enlarged."""

    mask_threshold = 0.0
    device = torch.device("cpu")
    postprocess_masks = Sam.postprocess_masks

    def __init__(self, image_size: int) -> None:
        self.image_encoder = SimpleNamespace(img_size=image_size)


def _session(
    file: Path, providers: Sequence[str], threads: int, largest: dict[str, tuple[int, ...]]
) -> onnxruntime.InferenceSession:
    """A session; `largest` says how far TensorRT is to build for, by input: its first dimensions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Threads that wait for work would otherwise spin, on cores that other requests need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # it is kept for every shape that comes along
    chosen: list[Any] = list(providers)
    if PROVIDERS[0] in chosen:
        chosen[chosen.index(PROVIDERS[0])] = (PROVIDERS[0], _profiles(file, largest))
    return onnxruntime.InferenceSession(str(file), options, providers=chosen)


def _profiles(file: Path, largest: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """TensorRT's options: its plans are kept beside the file, and are good for all sizes up to the largest."""
    fixed = {
        each.name: list(each.shape)
        for each in onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).get_inputs()
    }

    def shapes(sizes: dict[str, tuple[int, ...]]) -> str:
        return ",".join(
            f"{name}:{'x'.join(map(str, [*first, *fixed[name][len(first) :]]))}" for name, first in sizes.items()
        )

    least = {name: tuple(1 for _ in sizes) for name, sizes in largest.items()}
    return {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(file.parent / "tensorrt"),
        "trt_profile_min_shapes": shapes(least),
        "trt_profile_opt_shapes": shapes(least),
        "trt_profile_max_shapes": shapes(largest),
    }
