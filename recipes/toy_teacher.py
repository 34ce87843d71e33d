"""Train the toy teacher, the small SAM that comes with the package, on generated scenes.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m recipes.toy_teacher

As SAM was trained (arXiv:2304.02643, appendix A): the first prompt is a random point of a mask, or its box with noise;
corrective clicks follow, each drawn from where the mask is still wrong, with the previous logits as mask prompt; focal
and dice loss stand 20:1, with the squared error of the predicted IoU; of the three masks for an ambiguous prompt only
the best one learns. Unlike there, after the first prompt the single mask learns too, whatever the prompt was; logits
are compared at the decoder's own resolution with the share of each cell that the mask covers; and the first 7,000
steps are taken at half the image size, where they cost half.

The weights in the package came from the command above: seed 20230405, 95 minutes on two cores (torch 2.15, the machine
not quite idle). mIoU with the ground truth on the 200 unseen scenes of `measure`: 0.828 for one point, 0.880 for one
box; a box that is filled whole would score 0.547.
"""

import argparse
import json
import math
import time
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import save
from segment_anything.modeling import Sam
from torch import nn

from distill.evaluate.masks import make_prompts, score_image
from distill.schema import EvaluateRecipe
from distill.train import parameter_groups
from embeddings_cache.embed import Prepared, embedded_rows, prepare
from embeddings_cache.images import Sample, generate_scene, normalize, resize_longest_side, sa1b_annotation
from embeddings_cache.system import progress_bar, whole_file
from embeddings_cache.teacher import TOY_IMAGE_SIZE, WEIGHTS, TeacherEncoder, build_toy_sam, load_toy_state

SEED = 20230405  # the day SAM was published; scenes of the quickstart have seed 0
SCENES = 12_000
PHASES = ((TOY_IMAGE_SIZE // 2, 7_000), (TOY_IMAGE_SIZE, 8_500))
"""Image size and optimizer steps."""
BATCH = 8
"""Scenes a step, over all processes."""
MASKS = 6
CLICKS = 2
BY_BOX = 0.6
"""Share of the scenes whose first prompts are boxes."""
CORRECTED = 0.25
"""Share of the scenes that get corrective clicks, on half as many masks."""
LEARNING_RATE = 1e-3
WARMUP = 200
SAVE_EVERY = 1000
MIN_AREA = 25
MEASURED_SCENES = 200

Scene = tuple[np.ndarray, np.ndarray]
"""RGB uint8 (H, W, 3), and the number of the shape that each pixel shows, uint8 (H, W), 0 for the ground."""


def main() -> None:
    """Make scenes, train on them, write the weights and say what they are worth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(str(files("embeddings_cache.teacher") / WEIGHTS))
    parser.add_argument("--out", type=Path, default=default, help="where the weights go (default: %(default)s)")
    parser.add_argument("--short", type=int, default=1, metavar="N", help="make all N times shorter, to try it out")
    options = parser.parse_args()
    if options.short > 1 and options.out == default:
        parser.error("--short is for trying it out: say --out too, so that the package keeps its weights")
    accelerator, started = Accelerator(), time.perf_counter()
    sam = train(accelerator, options.out, options.short)
    if accelerator.is_main_process:
        load_toy_state(sam, save_weights(sam, options.out))
        scores = measure(sam, range(MEASURED_SCENES // options.short))
        minutes = (time.perf_counter() - started) / 60
        print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB after {minutes:.0f} min, mIoU {scores}")
    accelerator.wait_for_everyone()


def train(accelerator: Accelerator, out: Path, shorter: int) -> Sam:
    """The trained toy at its final image size; every process returns the same weights. Now and then they are saved."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    scenes = [draw_scene(number) for number in range(rank, SCENES // shorter, ranks)]
    set_seed(SEED)
    sam = build_toy_sam(PHASES[0][0])
    set_seed(SEED + rank)
    rng = np.random.default_rng([SEED, rank])
    total, done = sum(steps for _, steps in PHASES) // shorter, 0
    progress = progress_bar(accelerator, "toy teacher", "steps", total=total)
    for size, steps in PHASES:
        smaller, sam = sam, build_toy_sam(size)
        load_toy_state(sam, smaller.state_dict())
        sam.to(accelerator.device).train()
        optimizer = torch.optim.AdamW(parameter_groups(sam, weight_decay=0.05), betas=(0.9, 0.99), fused=True)
        losses: list[float] = []
        for step in range(steps // shorter):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * done / total)) / 2
            chosen = [scenes[number] for number in rng.integers(len(scenes), size=BATCH // ranks)]
            losses.append(backward(sam, [augment(scene, size, rng) for scene in chosen], rng))
            average_gradients(sam, accelerator)
            nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            progress.update()
            progress.set_postfix(size=size, loss=f"{fmean(losses[-500:]):.4f}", refresh=False)
            if done % SAVE_EVERY == 0 and accelerator.is_main_process:
                save_weights(sam, out.with_suffix(".partial.safetensors"))
                accelerator.print(f"step {done}: mIoU {measure(sam, range(20))} at {size} px")
                sam.train()
    progress.close()
    return sam


def save_weights(sam: Sam, path: Path) -> dict[str, torch.Tensor]:
    """Write the weights in half precision, and return what was written."""
    state = {name: tensor.cpu().contiguous() for name, tensor in sam.state_dict().items()}
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(halves))
    return halves


def draw_scene(number: int) -> Scene:
    """A training scene at the toy's full size."""
    image, masks = generate_scene(np.random.default_rng([SEED, number]), TOY_IMAGE_SIZE * 5 // 4)
    labels = np.zeros(image.shape[:2], dtype=np.uint8)
    for index, mask in enumerate(masks, start=1):
        labels[mask] = index
    small = resize_longest_side(image, TOY_IMAGE_SIZE)
    size = (small.shape[1], small.shape[0])
    return small, np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def augment(scene: Scene, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Turned, mirrored and recoloured: encoder input float32 (3, S, S), and some masks, boolean (N, S, S)."""
    image, labels = scene
    turns, mirrored = int(rng.integers(4)), rng.integers(2)
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if mirrored:
        image, labels = image[:, ::-1], labels[:, ::-1]
    pixels = normalize(torch.from_numpy(image[..., rng.permutation(3)].copy()).permute(2, 0, 1))
    if scale := TOY_IMAGE_SIZE // size - 1:
        pixels = F.avg_pool2d(pixels, scale + 1, ceil_mode=True)
        labels = labels[:: scale + 1, :: scale + 1]
    shown = [number for number in range(1, labels.max() + 1) if (labels == number).sum() >= MIN_AREA]
    picked = rng.permutation(shown)[:MASKS].astype(int)
    masks = torch.from_numpy(labels.copy())[None] == torch.from_numpy(picked)[:, None, None]
    padding = (0, size - labels.shape[1], 0, size - labels.shape[0])
    return F.pad(pixels, padding), F.pad(masks, padding)


def backward(sam: Sam, batch: list[tuple[torch.Tensor, torch.Tensor]], rng: np.random.Generator) -> float:
    """Leave the gradients of a batch in the parameters, and return its mean loss over masks.

    segment-anything's decoder takes one image at a time; gradients gather in the embeddings and go through the
    encoder once.
    """
    with torch.autocast(sam.device.type, torch.bfloat16):
        embeddings = sam.image_encoder(torch.stack([pixels for pixels, _ in batch]).to(sam.device))
    leaves = embeddings.detach().float().requires_grad_()
    losses = []
    for number, (_, masks) in enumerate(batch):
        by_box, clicks = rng.random() < BY_BOX, CLICKS if rng.random() < CORRECTED else 0
        masks = masks[: MASKS // 2] if clicks else masks
        if len(masks):
            loss = prompted_loss(sam, leaves[number : number + 1], masks.to(sam.device), by_box, clicks)
            (loss.sum() / (len(batch) * MASKS)).backward()
            losses += loss.tolist()
    embeddings.backward(leaves.grad.to(embeddings.dtype))
    return fmean(losses)


def prompted_loss(sam: Sam, embedding: torch.Tensor, masks: torch.Tensor, by_box: bool, clicks: int) -> torch.Tensor:
    """Losses of N masks (N, S, S) after a box or a point each, and again after each corrective click; flat."""
    count, size = len(masks), masks.shape[-1]
    covered = F.avg_pool2d(masks[:, None].float(), 4)
    points = torch.empty(count, 0, 2, device=masks.device)
    labels = torch.empty(count, 0, device=masks.device)
    boxes = noisy_boxes(masks) if by_box else None
    previous: torch.Tensor | None = None
    wrong, losses = masks, []
    for turn in range(1 + clicks):
        if turn or not by_box:
            clicked = random_points(torch.where(wrong.any((1, 2), keepdim=True), wrong, masks))
            inside = masks[torch.arange(count), clicked[:, 1], clicked[:, 0]].float()
            points = torch.cat([points, clicked[:, None]], 1)
            labels = torch.cat([labels, inside[:, None]], 1)
        sparse, dense = sam.prompt_encoder(
            points=(points, labels) if points.shape[1] else None, boxes=boxes, masks=previous
        )
        logits, predicted_iou = sam.mask_decoder.predict_masks(  # the single mask, and the three for a single point
            image_embeddings=embedding,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        losses.append(mask_loss(logits[:, :1], predicted_iou[:, :1], covered))
        if not turn:
            losses.append(mask_loss(logits[:, 1:], predicted_iou[:, 1:], covered))
        ambiguous = not turn and not by_box
        best = predicted_iou[:, 1:].argmax(1) + 1 if ambiguous else torch.zeros(count, dtype=torch.long)
        previous = logits[torch.arange(count), best][:, None].detach()
        wrong = (F.interpolate(previous, (size, size), mode="bilinear")[:, 0] > 0) ^ masks
    return torch.cat(losses)


def mask_loss(logits: torch.Tensor, predicted_iou: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """20 × focal + dice of the best of K masks, and the mean squared error of their predicted IoUs; (N,).

    Args:
        logits: (N, K, h, w).
        predicted_iou: (N, K).
        covered: share of each cell that lies in the mask, (N, 1, h, w). Focal loss: arXiv:1708.02002, equation 5,
            alpha 0.25, gamma 2; dice loss: arXiv:1606.04797, section 3.
    """
    covered = covered.expand_as(logits)
    probability = logits.sigmoid()
    right = probability * covered + (1 - probability) * (1 - covered)
    alpha = 0.25 * covered + 0.75 * (1 - covered)
    entropy = F.binary_cross_entropy_with_logits(logits, covered, reduction="none")
    focal = (alpha * (1 - right) ** 2 * entropy).mean((2, 3))
    overlap, sizes = (probability * covered).sum((2, 3)), (probability + covered).sum((2, 3))
    dice = 1 - (2 * overlap + 1) / (sizes + 1)
    with torch.no_grad():
        ours, truth = logits > 0, covered > 0.5
        iou = (ours & truth).sum((2, 3)) / (ours | truth).sum((2, 3)).clamp(min=1)
    return (20 * focal + dice).min(1).values + ((predicted_iou - iou) ** 2).mean(1)


def random_points(masks: torch.Tensor) -> torch.Tensor:
    """A uniformly drawn pixel of each mask (N, S, S), as (x, y), (N, 2); the prompt encoder adds the half pixel."""
    index = torch.multinomial(masks.flatten(1).float(), 1)[:, 0]
    return torch.stack([index % masks.shape[-1], index // masks.shape[-1]], 1)


def noisy_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes (N, 4) of masks (N, S, S), each side moved by normal noise: 5 % of the box's side, 2 px at most."""
    extents = []
    for axis in (1, 2):
        hit = masks.any(axis).float()
        extents.append((hit.argmax(1), hit.shape[1] - hit.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = extents
    boxes = torch.stack([x0, y0, x1, y1], 1).float()
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    return boxes + torch.randn_like(boxes) * (0.05 * sides).clamp(max=2)


def average_gradients(sam: Sam, accelerator: Accelerator) -> None:
    """Mean of the gradients over all processes; what no prompt of this process has touched counts as 0."""
    parameters = list(sam.parameters())
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    parts = accelerator.reduce(flat, reduction="mean").split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def measure(sam: Sam, numbers: range) -> dict[str, float]:
    """mIoU with the ground truth by prompt, on scenes of seed 0, measured as stage evaluate does."""
    size = sam.eval().image_encoder.img_size
    scenes = ((n, *generate_scene(np.random.default_rng([0, n]), size * 5 // 4)) for n in numbers)
    samples = (
        Sample(f"sa_{n}", Image.fromarray(image), json.dumps(sa1b_annotation(n, image, masks)))
        for n, image, masks in scenes
    )
    prepared = (image for sample in samples if isinstance(image := prepare(sample, size, 95), Prepared))
    ious: dict[str, list[float]] = {}
    encoder = TeacherEncoder(sam, sam.device, batch_size=8)
    for row in embedded_rows(encoder, prepared):
        embedding = torch.from_numpy(row.embedding)[None].float()
        for score in score_image(row, sam, embedding, embedding, make_prompts(row, EvaluateRecipe())):
            assert score.teacher_truth is not None
            ious.setdefault(score.prompt, []).append(score.teacher_truth)
    return {prompt: round(fmean(values), 3) for prompt, values in ious.items()}


if __name__ == "__main__":
    main()
