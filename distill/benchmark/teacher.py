"""The teacher's encoder against segment-anything's own: time, memory, and how far the embeddings are apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, Sam
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.benchmark.machine import cost_alone, gpu_peak, machine, matrix_product_rate, pick_device
from distill.benchmark.pipeline import WHOLE, pipeline_row
from distill.benchmark.timing import Measured, interleave, timed
from distill.checks import nearest
from embeddings_cache.images import to_encoder_input
from embeddings_cache.system import bar
from embeddings_cache.teacher import TEACHER_DTYPES, TeacherEncoder, fuse_attention, known_teachers, load_toy_teacher
from students import VITS, InputError, architecture_of, load_checkpoint

BASELINE = "segment-anything, float32"
DRAWN = (*VITS, "toy")
"""Teachers that are measured without weights of their own."""


@dataclass
class TeacherBenchmark:
    name: str = "vit_b"  # vit_h, vit_l, vit_b or toy, with random weights (and positions that are not zero)
    checkpoint: str | None = None  # or any teacher's weights, which say what it is
    image_size: int = 1024  # side of the square input in pixels
    batch_size: int = 1  # images a pass
    dtypes: str = "float32,bfloat16"  # of our encoder, after commas: float32, bfloat16, float16
    compile: bool = False  # also measure torch.compile
    rounds: int = 5  # passes of each, in turn
    pipeline: int | None = None  # batches that go from JPEG to shard in a round, 0: none; default: 2, on a GPU 64
    memory: bool = True  # also measure peak memory, on a CPU in processes of their own
    device: str = "auto"  # cpu, cuda; auto: cuda where there is one
    out: str = "benchmark.json"  # where the numbers go


def benchmark_teacher(settings: TeacherBenchmark) -> dict[str, Any]:
    """Measure, and return what goes to `benchmark.json`.

    Raises:
        InputError: a setting that makes no sense.
    """
    dtypes = settings.dtypes.split(",")
    if settings.checkpoint is not None:
        settings.name = architecture_of(Path(settings.checkpoint))
        settings.image_size = load_sam(settings).image_encoder.img_size
    for key, values, known in (
        ("name", [settings.name], DRAWN if settings.checkpoint is None else known_teachers()),
        ("dtypes", dtypes, TEACHER_DTYPES),
    ):
        if unknown := [value for value in values if value not in known]:
            raise InputError(f"{key}={unknown[0]} is not known{nearest(unknown[0], known)}")
    device = pick_device(settings.device)
    variants = [(dtype, compiled) for compiled in (False, True)[: 1 + settings.compile] for dtype in dtypes]
    passes = {BASELINE: partial(baseline_pass, settings, device)}
    passes |= {_label(*variant): partial(our_pass, settings, device, *variant) for variant in variants}
    ready = {name: prepare() for name, prepare in passes.items()}
    expected = ready[BASELINE]()
    errors = {name: _error(encode(), expected) for name, encode in ready.items()}
    times = interleave({name: timed(encode, device) for name, encode in ready.items()}, settings.rounds, BASELINE)
    memory = _memory(passes, ready, device) if settings.memory else {}
    rows = [
        {
            "name": settings.name,
            "backend": name,
            **times[name].as_json(),
            "images_per_s": round(settings.batch_size / times[name].median, 3),
            "speed_up": times[name].speed_up,
            **errors[name],
            **({"peak_memory_bytes": memory[name]} if memory else {}),
        }
        for name in passes
    ]
    content: dict[str, Any] = {"settings": vars(settings), "machine": machine(device), "baseline": BASELINE}
    content["rows"] = rows
    if settings.pipeline != 0:
        count = settings.pipeline or (64 if device.type == "cuda" else 2)
        fastest = min(variants, key=lambda variant: times[_label(*variant)].median)
        encoder = our_encoder(settings, device, *fastest)
        row = pipeline_row(encoder, count * settings.batch_size, settings.rounds)
        rows.append({"name": settings.name, "backend": f"{_label(*fastest)}, {WHOLE}", **row})
    if device.type == "cuda":
        content |= _share_of_peak(settings, times, device)
    return content


def baseline_pass(settings: TeacherBenchmark, device: torch.device) -> Callable[[], torch.Tensor]:
    """segment-anything's own encoder, ready to encode a batch."""
    encoder = load_sam(settings).image_encoder.to(device)
    inputs = to_encoder_input(*_batch(settings, device))
    return torch.no_grad()(lambda: encoder(inputs))


def our_pass(
    settings: TeacherBenchmark, device: torch.device, dtype: str, compiled: bool
) -> Callable[[], torch.Tensor]:
    """Ours, ready to encode the same batch."""
    return partial(our_encoder(settings, device, dtype, compiled), *_batch(settings, device))


def our_encoder(settings: TeacherBenchmark, device: torch.device, dtype: str, compiled: bool) -> TeacherEncoder:
    """The encoder that precompute would use."""
    sam = load_sam(settings)
    if isinstance(sam.image_encoder, ImageEncoderViT):
        fuse_attention(sam.image_encoder)
    return TeacherEncoder(sam, device, dtype, compiled, settings.batch_size)


def _label(dtype: str, compiled: bool) -> str:
    return f"ours, {dtype}{', compiled' if compiled else ''}"


def load_sam(settings: TeacherBenchmark) -> Sam:
    """The teacher as its authors compute it."""
    if settings.checkpoint is not None:
        return load_checkpoint(Path(settings.checkpoint)).requires_grad_(False)
    torch.manual_seed(0)
    sam = load_toy_teacher(settings.image_size) if settings.name == "toy" else sam_model_registry[settings.name]()
    for name, parameter in sam.image_encoder.named_parameters():
        if "pos" in name and settings.name != "toy":  # zero until a checkpoint fills them
            nn.init.trunc_normal_(parameter, std=0.02 if "rel" not in name else 0.2)
    return sam.eval().requires_grad_(False)


def _batch(settings: TeacherBenchmark, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random pictures of 3:2 in a square input, as photographs are."""
    side = settings.image_size
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(settings.batch_size, 3, side // 32, side // 32, generator=generator)
    pixels = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255).byte()
    return pixels.to(device), torch.tensor([[side * 2 // 3, side]] * settings.batch_size)


def _error(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    difference = found.float() - expected.float()
    return {
        "max_difference": difference.abs().max().item(),
        "relative_error": (difference.norm() / expected.norm()).item(),
    }


def _memory(
    passes: Mapping[str, Callable[[], Callable[[], torch.Tensor]]],
    ready: Mapping[str, Callable[[], torch.Tensor]],
    device: torch.device,
) -> dict[str, int]:
    if device.type != "cuda":
        return {
            name: cost_alone(prepare).peak_bytes for name, prepare in bar(passes.items(), desc="memory", leave=False)
        }
    return {name: gpu_peak(encode, device) for name, encode in ready.items()}


def _share_of_peak(settings: TeacherBenchmark, times: dict[str, Measured], device: torch.device) -> dict[str, Any]:
    """How near the fastest pass is to the rate of one large matrix product on this very GPU."""
    rate = matrix_product_rate(device)
    sam = load_sam(settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        side = settings.image_size
        sam.image_encoder.to(device)(torch.zeros(1, 3, side, side, device=device))
    fastest = min((name for name in times if name != BASELINE), key=lambda name: times[name].median)
    achieved = counter.get_total_flops() * settings.batch_size / times[fastest].median
    return {
        "flops_per_image": counter.get_total_flops(),
        "matrix_product_flops_per_s": rate,
        "share_of_matrix_product": round(achieved / rate, 4),
        "fastest": fastest,
    }
