"""What a recipe may say: every key with its type, its default, and the comment that `--help` shows."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import yaml

STAGES = ("precompute", "train", "evaluate", "export", "report")
"""What `stage=all` runs, in order."""

ON_REQUEST = ("inspect", "verify", "predict", "convert", "serve", "publish")
"""Stages that run only when they are named."""

HOLD_BRIEFLY = ("serve",)
"""Stages that hold the run's directory only while they write: several may run at once."""

TEACHER_MASK_LOSSES = ("mask", "mask_bce", "mask_dice")
MASK_LOSSES = (*TEACHER_MASK_LOSSES, "truth")
"""Those for which an image is prompted, and the teacher's decoder is needed."""

LOSSES = ("mse", "l1", "huber", "cosine", *MASK_LOSSES)
"""What `train.loss` weighs; `losses.py` says what each is."""

MASK_TARGETS = ("soft", "binary")
"""What the teacher's masks are to a student: probabilities, or what is more than ½ of them."""

TASKS = ("masks", "prompts", "edges", "instances", "wild", "saliency", "anomaly", "video")
"""What `evaluate.task` names: a module in `evaluate/` each."""

PRESETS = {
    "hdetr": ("single", "times_iou", 300),
    "vitdet": ("best", "detector", None),
    "everything": ("best", "predicted_iou", 100),
}
"""What `evaluate.preset` stands for: `evaluate.masks`, `evaluate.score` and `evaluate.max_dets`."""

BOX_MASKS, BOX_SCORES = ("single", "best"), ("detector", "times_iou")
"""What `evaluate.masks` and `evaluate.score` name."""

TEACHER = "teacher"
"""What stands for the recipe's teacher among the checkpoints that are evaluated."""

BATCH_NORMS = ("local", "sync", "frozen")
"""What batch norms normalise by while a student is trained."""

FORMATS = {
    "onnx": ("encoder.onnx",),
    "onnx_fp16": ("encoder_fp16.onnx",),
    "onnx_int8": ("encoder_int8.onnx",),
    "onnx_decoder": ("decoder.onnx", "decoder_multimask.onnx"),
    "onnx_decoder_batch": ("decoder_batch.onnx",),
    "onnx_trt": ("encoder_trt.onnx", "decoder_trt.onnx"),
    "coreml": ("Encoder.mlpackage", "Decoder.mlpackage"),
    "coreml_8bit": ("Encoder_8bit.mlpackage",),
    "coreml_6bit": ("Encoder_6bit.mlpackage",),
    "coreml_6bit_grouped": ("Encoder_6bit_grouped.mlpackage",),
    "coreml_4bit": ("Encoder_4bit.mlpackage",),
    "coreml_decoder_8bit": ("Decoder_8bit.mlpackage",),
    "cvat": ("cvat",),
    "anylabeling": ("anylabeling",),
    "label_studio": ("label_studio",),
    "web": ("web",),
    "transformers_js": ("transformers_js",),
    "huggingface": ("huggingface",),
}
"""What `export.formats` names, and the files that each makes."""

COMPRESSED = (
    "onnx_int8", "coreml_8bit", "coreml_6bit", "coreml_6bit_grouped", "coreml_4bit", "coreml_decoder_8bit"
)  # fmt: skip
"""Formats that not every student stands; where `all` was asked for, those that fail are left out."""

OLDEST_OPSET, NEWEST_OPSET = 17, 20
"""What `export.opset` may be: LayerNormalization came with the oldest."""

INPUTS = ("sam", "native")
"""Of exported encoders: an image of `image_size`, or of `student.input_size`."""

BACKENDS = ("onnx", "torch")
"""What `serve.backend` names."""

DEFAULT_FORMATS = ("onnx", "onnx_decoder", "coreml")

IMAGES = ("data.images", "evaluate.data")
"""Keys that name images."""

ONE_OR_MORE = (*IMAGES, "checkpoint")
"""Keys whose value is a text, or a list of texts."""

PATHS = (
    *IMAGES, "data.annotations", "run_dir", "checkpoint", "image", "cache.dir", "teacher.checkpoint",
    "evaluate.boxes", "evaluate.tracks", "student.pretrained", "student.start", "serve.token_file",
)  # fmt: skip
"""Keys that name files or folders, in which `~` is the home directory."""

FETCHED = ("checkpoint", "teacher.checkpoint", "student.pretrained", "student.start")
"""Keys that name checkpoints, which may be addresses on the hub."""

AUTO = "auto"
"""Where a key takes it: what suits the machine."""

SHAPES_THE_STUDENT = (
    "seed", "image_size", "student", "teacher.name", "data.images", "data.annotations", "data.sixteen_bit",
    "data.fraction", "data.val_images", "cache.dtype",
    "cache.jpeg_quality", "train.epochs", "train.batch_size", "train.accumulate", "train.lr", "train.lr_end",
    "train.lr_per", "train.weight_decay", "train.warmup_steps", "train.warmup_epochs", "train.warmup_prefix",
    "train.clip_norm", "train.loss", "train.then", "train.huber_delta", "train.ignore_padding",
    "train.mask_prompts", "train.mask_points", "train.mask_rounds", "train.mask_targets", "train.ema",
    "train.batch_norm", "train.mixed_precision", "cache.per_node",
)  # fmt: skip
"""Keys (or sections) that decide what comes out of training; the rest says where, how fast, or what comes after."""


# The comment behind each field is what `--help` says of it.


@dataclass
class StudentRecipe:
    name: str = "repvit_m2_3"  # backbone: docs/students.md has those that are tested; or any of timm's with stages
    input_size: int | None = None  # side at which the backbone works; the encoder reduces images; default: image_size
    neck: str = "sam"  # sam: behind a last stage at stride 16; pyramid: of the last three stages (EfficientViT-SAM)
    neck_depth: int = 4  # fused MBConvs of a pyramid
    neck_expand: int = 1  # and their expansion
    downsample: str = "stride1"  # how neck=sam comes to stride 16: stride1 (RepViT-SAM); fuse (EdgeSAM), cheaper
    pretrained: Any = False  # ImageNet weights to start from: true, timm's; auto, if they can be had; or a file's
    start: str | None = None  # go on from a student, ours or a published one; what a recipe leaves out, it tells
    overrides: dict[str, Any] = field(default_factory=dict)  # backbone numbers to change: widths, depths, ...


@dataclass
class TeacherRecipe:
    name: str = "vit_h"  # vit_h, vit_l, vit_b (also fine-tuned), mobile_sam and other students, student: ours; or toy
    checkpoint: str | None = None  # its weights: file, hf://, transformers' folder; tell teacher.name; toy has some
    batch_size: int | None = None  # images a teacher pass, in each process; default: as many as fit, on a CPU 1
    dtype: str = "auto"  # float32, bfloat16 or float16; auto: bfloat16 on a GPU that has it, float32 elsewhere
    compile: Any = "auto"  # torch.compile the teacher, or not: true, false; auto: on a GPU with 2,000 images ahead


@dataclass
class DataRecipe:
    images: Any = None  # tars, zips, folders, globs, brace patterns, URLs, pipe: commands, one or a list; or scenes:N
    annotations: str | None = None  # COCO's instances.json for all of them; default: what lies beside each image
    fraction: float = 1.0  # share of the images to use: whole tars first, then keys by hash
    val_images: int = 100  # images held out by hash, never trained on
    max_skipped: float = 0.01  # share of bad samples above which precompute stops
    max_pixels: int = 178_956_970  # of a picture; one with more is skipped by its header, before it fills the memory
    workers: int | None = None  # processes that read pictures in precompute; default: on a GPU its cores, else none
    sixteen_bit: str = "upper"  # 16-bit pictures: the upper 8 bits; stretch: darkest to brightest value of each


@dataclass
class CacheRecipe:
    dir: str = "caches/${teacher.name}-${image_size}px"  # where the embeddings go; recipes of one teacher may share it
    dtype: str = "float16"  # how embeddings are stored: float16, or int8, which takes half as much
    images_per_shard: int = 256  # rows a shard, and so what a crash costs at most
    jpeg_quality: Any = 95  # 1-100, or png for lossless; teacher and student see the picture after this
    per_node: bool = False  # each machine has some of the shards on a disk of its own, and trains on those


@dataclass
class PhaseRecipe:
    epochs: int = 1  # passes over the training images
    loss: dict[str, float] | None = None  # this and the keys below: as train has them, where nothing is said
    lr: float | None = None  # a phase that says something of lr or warm-up has a schedule, and moments, of its own
    lr_end: float | None = None
    lr_per: int | None = None
    warmup_steps: int | None = None
    warmup_epochs: float | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None
    mask_prompts: int | None = None
    mask_points: float | None = None
    mask_rounds: int | None = None
    mask_targets: str | None = None


@dataclass
class TrainRecipe:
    epochs: int = 8  # passes over the training images; 0 leaves the student untrained, to compare with
    batch_size: int = 8  # images an optimizer step, over all processes and accumulation steps
    accumulate: int = 1  # forward passes an optimizer step: more of them need less memory
    lr: float = 1e-3  # peak learning rate (AdamW)
    lr_end: float = 0.0  # and the last one
    lr_per: int | None = None  # batch size that lr and lr_end are stated for; another's are scaled linearly
    weight_decay: float = 0.05  # of AdamW; not for norms and biases
    warmup_steps: int = 500  # steps of linear warm-up (a tenth of the schedule at most), then cosine to lr_end
    warmup_epochs: float = 0.0  # or this many epochs of it (half of the schedule at most); what is said last counts
    warmup_prefix: bool = True  # the cosine begins after the warm-up; false: it runs from the start (timm's default)
    clip_norm: float = 1.0  # gradients are clipped to this norm
    loss: dict[str, float] = field(default_factory=lambda: {"mse": 1.0})  # weights; docs/training.md has the losses
    then: list[PhaseRecipe] = field(default_factory=list)  # phases after it: '[{epochs: 2, lr: 1e-4, loss: {mask: 1}}]'
    huber_delta: float = 0.1  # of the loss huber: above this distance it is linear
    ignore_padding: bool = False  # embedding losses leave out the cells of an embedding that only cover padding
    mask_prompts: int = 8  # for losses of masks: prompts an image, drawn from its annotation
    mask_points: float = 0.5  # share of these that are points, the rest are boxes
    mask_rounds: int = 1  # points that are added where the student is wrong, one a round
    mask_targets: str = "soft"  # the teacher's masks: soft, its probabilities; binary, more than ½ or not
    ema: float = 0.0  # average the weights exponentially with this decay (0.999, say), and use those; 0: no
    batch_norm: str = "local"  # statistics of each process's batch; sync: of the whole batch (GPUs); frozen: none
    mixed_precision: str = "auto"  # no, bf16, fp16; auto: bf16 on a GPU that has it, else no, and as the run began
    channels_last: bool = True  # memory format of the convolutions; on a CPU 1.35 to 1.4 times as fast
    compile: bool = False  # torch.compile the student: a minute or more at the start, faster from then on
    workers: int | None = None  # processes that read the cache, for each training process; default: 4, on a CPU none
    checkpoint_every: int = 1000  # optimizer steps between checkpoints
    checkpoint_minutes: float = 30.0  # and minutes, whichever comes first; 0: only the steps count
    keep_checkpoints: int = 2  # the last so many; the one with the best masks is kept besides
    stop_above: float = 20.0  # stop where the loss is so many times that of the steps before; 0: only where it is NaN
    watch_images: int = 8  # held-out images whose masks are compared with the teacher's every epoch
    log_every: int = 10  # optimizer steps between lines of metrics.jsonl
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # also wandb, mlflow, ... (Accelerate's); []


@dataclass
class EvaluateRecipe:
    task: str = "masks"  # what to measure
    data: Any = None  # other images to evaluate on, tars or folders; default: the held-out images of the cache
    masks_per_image: int = 64  # prompts an image at most, the first of its annotation
    grid: int = 8  # images without annotations are prompted with grid x grid points
    clicks: int = 1  # masks: after so many clicks, up to 5, each of which corrects the mask before
    limit: int | None = None  # tasks other than masks: the first so many images alone, for a first look
    boxes: str | None = None  # instances, wild, anomaly: a detector's boxes, a results file (wild: a folder of them)
    preset: str = "hdetr"  # instances: whose protocol, hdetr (RepViT-SAM's), vitdet (EfficientViT-SAM's) or everything
    masks: str | None = None  # instead of the preset's: single, a mask a box, or best, of three by predicted IoU
    score: str | None = None  # likewise: detector, its own, or times_iou, by the predicted IoU
    refine: bool = False  # instances: once more with the mask and its box (SAM's appendix D.4)
    max_dets: int | None = None  # likewise: boxes an image that are segmented
    tracks: str | None = None  # video: a folder of point tracks, SEQUENCE.npz; default: tracks/ of the data, if any
    rounds: int = 12  # video: refinements of a mask
    thresholds: int = 99  # edges: at so many the map is compared with people's boundaries


@dataclass
class ExportRecipe:
    formats: list[str] = field(default_factory=lambda: list(DEFAULT_FORMATS))  # files to make; docs/export.md; or all
    name: str | None = None  # before Encoder and Decoder in the names of Core ML packages; default: the student's
    license: str | None = None  # under which the files are handed out, as apache-2.0; their metadata and cards say it
    opset: int = 17  # of ONNX files, 17 to 20; what older runtimes know
    input: str = "sam"  # what encoders take: sam, image_size px; native, student.input_size px, for who resizes once
    images: int = 2  # held-out images that every file is compared with PyTorch on
    gate_images: int = 24  # held-out images, ten prompts each, that files of 8 bits and fewer are compared on
    calibration_images: int = 8  # training images that give onnx_int8 the ranges of its activations
    dynamic_batch: bool = False  # ONNX encoders take any number of images at once, and not just one


@dataclass
class PredictRecipe:
    points_per_side: int = 32  # without prompts: a grid of this many points squared, as in segment-anything
    pred_iou_thresh: float = 0.88  # masks with a lower predicted IoU are dropped
    stability_score_thresh: float = 0.95  # masks that change more than this with the threshold are dropped


@dataclass
class VerifyRecipe:
    recompute: int = 16  # rows that the teacher embeds again, to compare with the cache; 0: none, and no weights needed
    drop: bool = False  # put damaged shards aside, so that precompute makes their rows, and only those, again


@dataclass
class ServeRecipe:
    backend: str = "onnx"  # onnx: ONNX Runtime, on TensorRT, CUDA or the CPU, as the installed build can; or torch
    cache_mb: int = 512  # embeddings that are kept, the most recently used ones; one of 1024 px has 4 MB
    batch_size: int | None = None  # pictures encoded together at most; default: 4, on a CPU 1, where more only wait
    batch_ms: float = 3.0  # how long a picture waits for others
    threads: int | None = None  # of the encoder; default: all cores
    decoders: int | None = None  # requests for masks that are worked on at once, a thread each; default: all cores
    queue: int = 64  # requests of a kind, at work or waiting; one more is answered 503
    body_mb: float = 32  # of a request
    max_pixels: int = 50_000_000  # of a picture, by its header; a mask of so many takes 200 MB while it is made
    prompts: int = 64  # of a request
    seconds: float = 30.0  # until a request is answered, its own upload included
    everything_seconds: float = 300.0  # the same of /v1/everything
    stop_seconds: float = 10.0  # which requests at work have to end when the server is told to
    page: bool = True  # the page of export.formats=[web] at /, if the run has one
    hosts: list[str] = field(default_factory=list)  # names by which requests may call the server, besides localhost
    token_file: str | None = None  # holds the bearer token; default: $SAM_DISTILL_TOKEN; none: for this machine alone


@dataclass
class PublishRecipe:
    private: bool = True  # a repository that is new is seen by its owner alone, until that is changed on its page


@dataclass
class Recipe:
    name: str = ""  # the recipe's name; from its file
    stage: str = "all"  # all, or one of the stages above
    seed: int = 0  # of weights and of the order of images
    image_size: int = 1024  # side of the square input in pixels
    run_dir: str = "runs/${name}"  # where results go
    checkpoint: Any = None  # student for the stages after train, default: the run's own; to evaluate also several
    image: str | None = None  # photograph to segment, for stage=predict
    point: str | None = None  # x,y in its pixels, on the object; more of them follow after commas
    box: str | None = None  # x0,y0,x1,y1 around the object; with neither point nor box everything is segmented
    repo: str | None = None  # OWNER/NAME on the Hugging Face hub, for stage=publish
    dry_run: bool = False  # stage=publish says what it would send, and sends nothing
    host: str = "127.0.0.1"  # address that stage=serve listens at; another machine's need a token (serve.token_file)
    port: int = 8000  # and port; 0: any that is free
    student: StudentRecipe = field(default_factory=StudentRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    cache: CacheRecipe = field(default_factory=CacheRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    evaluate: EvaluateRecipe = field(default_factory=EvaluateRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)
    predict: PredictRecipe = field(default_factory=PredictRecipe)
    verify: VerifyRecipe = field(default_factory=VerifyRecipe)
    serve: ServeRecipe = field(default_factory=ServeRecipe)
    publish: PublishRecipe = field(default_factory=PublishRecipe)


def numbers(text: str) -> list[float]:
    """`"12,30.5"` → `[12.0, 30.5]`; raises `ValueError` where it is something else."""
    return [float(part) for part in text.split(",")]


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Key, default and comment of everything that a recipe may set, in order."""
    yield from _describe(Recipe, "")


def _describe(schema: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    comments = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(schema), re.MULTILINE))
    defaults = schema()
    for entry in fields(schema):
        default = getattr(defaults, entry.name)
        if is_dataclass(default):
            yield from _describe(type(default), f"{prefix}{entry.name}.")
        else:
            shown = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()
            yield f"{prefix}{entry.name}", shown, comments.get(entry.name, "")


def kinds(schema: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """The type of every key."""
    found: dict[str, Any] = {}
    for entry in fields(schema):
        kind = entry.type
        if isinstance(kind, type) and is_dataclass(kind):
            found |= kinds(kind, f"{prefix}{entry.name}.")
        else:
            found[f"{prefix}{entry.name}"] = kind
    return found
