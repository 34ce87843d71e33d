"""Train: a student learns the cached embeddings. The loop is `train`; it reads from top to bottom."""

import signal
import time
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.evaluate.watch import MaskWatch, load_decoder
from distill.losses import Objective, embedding_errors
from distill.recipe import Recipe, to_yaml
from distill.run import bind_cache, checkpoints_of, open_cache, trained_student
from distill.schema import TrainRecipe
from distill.student import begin_student
from distill.training.batches import Batch, CachedImages, TimedBatches, TrainingOrder, check_limits, make_loader
from distill.training.checkpoints import Checkpoints
from distill.training.metrics import Metrics, Pace
from distill.training.monitor import Monitor, Step, UnsoundLoss
from distill.training.plan import Plan, wants_masks
from distill.training.prompts import has_masks
from distill.training.rows import divide_rows
from embeddings_cache.shards import EmbeddingsCache, read_info
from embeddings_cache.system import Stopped, progress_bar, stop_on_request, whole_file
from students import InputError, StudentEncoder, save_student

ADVICE = "with another run_dir a lower train.lr, or mixed_precision=no, may help"


def train(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Train the recipe's student, or go on from the latest checkpoint; writes `student.safetensors` at the end.

    Returns:
        False where the student was there already.

    Raises:
        InputError: no finished cache, one of another recipe or teacher, fewer images than a batch takes, or a loss that
            is no number any more.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
    """
    settings = recipe.train
    info = read_info(Path(recipe.cache.dir))
    if info is not None and accelerator.is_main_process:
        bind_cache(recipe, info.identity)
    finished = gather_object([trained_student(recipe).exists()])
    if any(finished) and not all(finished):
        raise InputError(f"not all processes find {trained_student(recipe)}: machines must share run_dir")
    if all(finished):
        accelerator.print(f"train: {trained_student(recipe)} is there already")
        return False
    cache = open_cache(recipe, partly=recipe.cache.per_node)
    rows = divide_rows(recipe, cache, accelerator)
    plan = Plan.of(recipe, rows.an_epoch, accelerator.num_processes)
    images = CachedImages(cache, recipe)
    check_limits(images, plan.micro_batch, len(rows.held_out), recipe, accelerator.device)
    prefer_determinism(accelerator)
    decoder = load_decoder(recipe, cache, accelerator)
    refuse_unlabelled(recipe, cache, rows.of_group)
    objective = Objective(recipe.image_size, decoder)
    watch = MaskWatch(recipe, cache, rows.watched, decoder, accelerator)

    set_seed(recipe.seed)
    student, optimizer, average = prepare(recipe, cache.info.identity.embedding_shape[0], accelerator)
    metadata = {"recipe": to_yaml(recipe), "teacher_sha256": cache.info.identity.teacher_sha256}
    checkpoints = Checkpoints(checkpoints_of(recipe), accelerator, settings.keep_checkpoints, metadata)
    step = checkpoints.restore(plain(student, accelerator), average)
    metrics = Metrics(recipe, accelerator, step)
    monitor = Monitor(accelerator, settings.stop_above, settings.log_every, settings.checkpoint_minutes)
    order = TrainingOrder(rows.of_group, plan, recipe.seed, rows.group, step)
    loader = make_loader(images, order, recipe, accelerator.device)
    batches = TimedBatches(loader, accelerator.device)
    for line in plan.describe():
        accelerator.print(f"train: {line}")

    def note_scores(epoch: int, pace: dict[str, float]) -> None:
        """What the student is worth, in numbers; at the end of an epoch kept if none was better.

        The line comes last: where it is missing, whoever goes on from this step does all of it again.
        """
        judged = judged_student(student, average, accelerator)
        scores = {**validate(judged, cache, rows.held_out, recipe, accelerator), **watch(judged)}
        if step and "val_miou" in scores:
            checkpoints.save_if_best(step, judged, scores["val_miou"])
        metrics.write(step, epoch, {**scores, **pace})

    with (
        stop_on_request() as request,
        progress_bar(accelerator, "train", "steps", total=plan.steps, initial=step) as progress,
        closing(iter(batches)) as stream,
    ):
        if step % plan.steps_per_epoch == 0 and not metrics.scored:
            note_scores(max(0, step // plan.steps_per_epoch - 1), pace={})
        to_training(student, settings.batch_norm)
        paces = Pace(batches, settings.batch_size, step), Pace(batches, settings.batch_size, step)
        line_pace, epoch_pace = paces
        micro_steps: list[dict[str, torch.Tensor]] = []
        keys: list[str] = []
        for batch in stream:
            epoch = step // plan.steps_per_epoch
            phase = plan.phase(step)
            if step == phase.first and phase.begins_anew:
                optimizer.state.clear()  # moments of other losses say nothing of these
            losses, norm = learn(
                batch, student, optimizer, objective, phase.settings, plan.lr(step), recipe, accelerator
            )
            micro_steps, keys = [*micro_steps, losses], keys + batch.keys
            if not accelerator.sync_gradients:
                continue
            step += 1
            if average is not None:
                average.update(plain(student, accelerator), step)
            progress.update()
            due = monitor.add(Step(step, mean_losses(micro_steps), norm, keys), phase.settings)
            micro_steps, keys = [], []
            epoch_ends, last = step % plan.steps_per_epoch == 0, step == plan.steps
            to_log = step % settings.log_every == 0 or last or plan.phase(step) is not phase
            to_save = step % settings.checkpoint_every == 0
            if not (due or epoch_ends or to_log or to_save):
                continue
            try:
                look = monitor.look(request)
            except UnsoundLoss as error:
                raise InputError(f"{error}. {checkpoints.kept()}; {ADVICE}") from error
            pause = time.perf_counter()
            if to_log:
                means = {**monitor.means(), "lr": plan.lr(step - 1), **line_pace.lap(step)}
                metrics.write(step, epoch, means)
                progress.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            if (to_save or look.save or look.stop) and not last:
                checkpoints.save(step, judged_student(student, average, accelerator))
                monitor.saved_now()
            if look.stop and not last:
                raise Stopped(request.signal_number or signal.SIGTERM)
            if epoch_ends:
                note_scores(epoch, epoch_pace.lap(step))
            to_training(student, settings.batch_norm)  # whoever was judged was so in eval mode
            for pace in paces:
                pace.leave_out(time.perf_counter() - pause)

    judged = judged_student(student, average, accelerator)
    if accelerator.is_main_process:
        with whole_file(trained_student(recipe)) as temporary:
            save_student(temporary, judged, {**metadata, "steps": str(step)})
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    request.raise_if_made()
    return True


def prepare(
    recipe: Recipe, channels: int, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer, ModelEmaV3 | None]:
    """The student and its optimizer as Accelerate wraps them, and the running average of its weights, if any."""
    settings = recipe.train
    student: nn.Module = begin_student(recipe, channels)
    if settings.channels_last:
        student = student.to(memory_format=torch.channels_last)
    average = ModelEmaV3(student, settings.ema, use_warmup=True).to(accelerator.device) if settings.ema else None
    if settings.batch_norm == "sync" and accelerator.num_processes > 1:
        student = convert_sync_batchnorm(student)  # timm's keeps the activations that its norms bring
    if settings.compile:
        student.compile()
    optimizer = make_optimizer(student, settings, accelerator.device)
    student, optimizer = accelerator.prepare(student, optimizer)
    # From here on processes draw different numbers: dropout is not the same in all of them.
    set_seed(recipe.seed, device_specific=True)
    return student, optimizer, average


def learn(
    batch: Batch,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    settings: TrainRecipe,
    lr: float,
    recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """One forward and backward pass; if it is the last of a step, the optimizer's step too.

    Args:
        settings: of the phase; lr: of the step.

    Returns:
        The losses by name and their weighted sum `loss`, and the norm of the gradient before it was clipped; scalars on
        the device. The norm is 0 where the step goes on.
    """
    with accelerator.accumulate(student):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = settings.weight_decay
        inputs = batch.encoder_input(recipe.image_size)
        if recipe.train.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        embedding = student(inputs).float()
        with accelerator.autocast():  # for the mask decoder
            losses = objective(settings, embedding, batch.teacher.float(), batch.input_size, batch.prompts)
        loss = torch.stack([settings.loss[name] * value for name, value in losses.items()]).sum()
        accelerator.backward(loss)
        norm = torch.zeros_like(loss)
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(student.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in (*losses.items(), ("loss", loss))}, norm.detach()


def plain(student: nn.Module, accelerator: Accelerator) -> StudentEncoder:
    """The student without what Accelerate has put around it, a launcher's torch.compile included: its names differ."""
    return cast(StudentEncoder, accelerator.unwrap_model(student, keep_torch_compile=False))


def refuse_unlabelled(recipe: Recipe, cache: EmbeddingsCache, rows: list[int]) -> None:
    """Raise `InputError` where the loss `truth` has nothing to learn from: none of the rows has masks."""
    if wants_masks(recipe, ("truth",)) and not any(has_masks(cache[row]) for row in rows):
        raise InputError(
            f"the loss truth learns from annotated masks, and of {len(rows)} training images in {recipe.cache.dir} "
            "none has any"
        )


def to_training(student: nn.Module, batch_norm: str) -> None:
    """Training mode; with `frozen` batch norms, these keep on using and never change their running statistics."""
    student.train()
    if batch_norm == "frozen":
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def judged_student(student: nn.Module, average: ModelEmaV3 | None, accelerator: Accelerator) -> StudentEncoder:
    """The student to evaluate and to hand out, in eval mode: the average of its weights where there is one.

    All processes call this: batch norms' running statistics become the main process's.
    """
    judged = average.module if average is not None else plain(student, accelerator)
    if accelerator.num_processes > 1:
        for buffer in judged.buffers():
            broadcast(buffer)
    judged.train()  # TinyViT forgets the attention biases that it looked up at the last validation
    return cast(StudentEncoder, judged.eval())


@torch.no_grad()
def validate(
    judged: nn.Module, cache: EmbeddingsCache, rows: list[int], recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """Embedding MSE and cosine on the held-out images, of which this process takes `rows`; averaged over images."""
    size = max(1, recipe.train.batch_size // (accelerator.num_processes * recipe.train.accumulate))
    draws = [[(0, row) for row in rows[start : start + size]] for start in range(0, len(rows), size)]
    images = CachedImages(cache, recipe, with_prompts=False)
    errors: list[list[float]] = []
    loader = make_loader(images, draws, recipe, accelerator.device)
    with closing(iter(TimedBatches(loader, accelerator.device))) as batches:
        for batch in batches:
            with accelerator.autocast():
                embedding = judged(batch.encoder_input(recipe.image_size)).float()
            errors += torch.stack(embedding_errors(embedding, batch.teacher.float()), dim=1).tolist()
    mse, cosine = (fmean(values) for values in zip(*gather_object(errors), strict=True))
    return {"val_mse": mse, "val_cosine": cosine}


def mean_losses(passes: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Means over the forward passes of a step."""
    return {name: torch.stack([losses[name] for losses in passes]).mean() for name in passes[0]}


def prefer_determinism(accelerator: Accelerator) -> None:
    """On a CPU, use algorithms that give the same bits every time; TinyViT's attention biases need it."""
    torch.use_deterministic_algorithms(accelerator.device.type == "cpu", warn_only=True)
    # This one costs time, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def make_optimizer(student: nn.Module, settings: TrainRecipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW, of which on a GPU one kernel takes the step of all weights, also after a checkpoint of one without it."""
    groups = parameter_groups(student, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True if device.type == "cuda" else None)
    optimizer.register_load_state_dict_pre_hook(_with_own_kernel)
    return optimizer


def _with_own_kernel(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: weights, which decay, and biases and norms, the parameters of at most one dimension."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
