"""The teacher's encoder at work: at a precision, on a device, in batches that fit."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam

from embeddings_cache.images import to_encoder_input
from embeddings_cache.teacher.vit import encode_image
from students import InputError, StudentEncoder, first_line

TEACHER_DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST_BATCH = 16
"""Images; a ViT at 1024 px fills a GPU with fewer."""
OF_FREE_MEMORY = 0.8
COMPILATION_PAYS = 2000
"""Images: on an H200 compiling ViT-H took 23 s, and saved 11 ms an image from then on."""
AT_PRECISION = ("blocks", "backbone", "fuse")
"""Parts of a ViT or of a student that are nearly all of the work; the rest, norms above all, stays in float32."""


class TeacherEncoder:
    """uint8 pixels → float32 embeddings, by a teacher's image encoder.

    Args:
        sam: the teacher; its image encoder is moved to the device and most of it converted to the precision.
        device: where to work.
        dtype: of that part, one of `TEACHER_DTYPES`; see `resolve_dtype`.
        compiled: whether to use `torch.compile`: the first batch takes minutes, the rest is faster.
        batch_size: images a pass; None finds what fits. It is halved whenever memory does not suffice.
    """

    def __init__(
        self,
        sam: Sam,
        device: torch.device,
        dtype: str = "float32",
        compiled: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.device = device
        self.dtype: torch.dtype = getattr(torch, resolve_dtype(dtype, device))
        encoder = sam.image_encoder.to(device)
        self.encoder, self._encode_image = encoder, encode_image
        if isinstance(encoder, StudentEncoder):
            self.encoder, self._encode_image = encoder.fused(), encode_with_student
        for name, part in self.encoder.named_children():
            if name in AT_PRECISION:
                part.to(self.dtype)
        self.batch_size = batch_size or self._find_batch_size()
        self.compiled = compiled
        self._eager = self._encode_image
        if compiled:
            self._encode_image = torch.compile(self._encode_image, dynamic=False)

    @property
    def image_size(self) -> int:
        """Side S of the square input in pixels."""
        return self.encoder.img_size

    def compile_or_not(self) -> str:
        """Compile now; where that fails, for want of a compiler for instance, go on without.

        Returns:
            What came of it, in a line.
        """
        side, began = self.image_size, time.perf_counter()
        pixels = torch.zeros(self.batch_size, 3, side, side, dtype=torch.uint8)
        try:
            self(pixels, torch.tensor([[side, side]] * self.batch_size)).cpu()
        except InputError:
            raise
        except Exception as error:  # of many kinds, from the compiler, the system or the driver
            self.compiled, self._encode_image = False, self._eager
            return f"the encoder could not be compiled, and does without: {first_line(error)}"
        return f"the encoder was compiled in {time.perf_counter() - began:.0f} s"

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, input_size: torch.Tensor) -> torch.Tensor:
        """Embeddings of a batch, which is divided further where memory does not suffice for it.

        Args:
            pixels: uint8 (B, 3, S, S), padded; input_size: int (B, 2), see `to_encoder_input`.

        Returns:
            float32 (B, C, S/16, S/16) on the device.

        Raises:
            InputError: not even one image fits into memory.
        """
        parts: list[torch.Tensor] = []
        done = 0
        while done < len(pixels):
            part = slice(done, done + self.batch_size)
            try:
                parts.append(self._encode(pixels[part], input_size[part]))
            except torch.OutOfMemoryError as error:
                if self.batch_size == 1:
                    raise InputError(f"one image of {self.image_size} px does not fit into {self.device}") from error
            else:
                done += len(parts[-1])
                continue
            # Only here has the failed pass let go of its tensors.
            self.batch_size = (min(self.batch_size, len(pixels) - done) + 1) // 2
            torch.cuda.empty_cache()
        return torch.cat(parts)

    def begin(self, pixels: torch.Tensor, input_size: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start on a batch, as the call takes it; a GPU works on it while this returns.

        Returns:
            A function, for any thread, that waits for the embeddings: float16 (B, C, S/16, S/16) in
            the CPU's memory. It raises `InputError` where the precision has overflowed.
        """
        on_gpu = self.device.type == "cuda"
        made = self(pixels, input_size).half()
        finite = made.isfinite().all().to("cpu", non_blocking=on_gpu)
        embeddings = made.to("cpu", non_blocking=on_gpu)
        copied = torch.cuda.current_stream(self.device).record_event() if on_gpu else None

        def fetch() -> torch.Tensor:
            if copied is not None:
                copied.synchronize()
            if not finite:
                raise InputError(
                    f"{self.dtype} overflows in the teacher: take teacher.dtype=bfloat16, which has float32's range"
                )
            return embeddings

        return fetch

    def _encode(self, pixels: torch.Tensor, input_size: torch.Tensor) -> torch.Tensor:
        count = len(pixels)
        inputs = to_encoder_input(pixels.to(self.device, non_blocking=True), input_size)
        if self.compiled:  # one compilation for one size: the last batch may have fewer images
            inputs = F.pad(inputs, (0, 0, 0, 0, 0, 0, 0, max(0, self.batch_size - count)))
        return self._encode_image(self.encoder, inputs, self.dtype)[:count]

    def _find_batch_size(self) -> int:
        """On a GPU the largest power of two that fits by one image's need; elsewhere 1, which is as fast as any."""
        if self.device.type != "cuda":
            return 1
        side = self.image_size
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.no_grad():
            self._encode_image(self.encoder, torch.zeros(1, 3, side, side, device=self.device), self.dtype)
        need = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        fitting = max(1, min(LARGEST_BATCH, int(OF_FREE_MEMORY * free / need)))
        return 1 << (fitting.bit_length() - 1)


def encode_with_student(encoder: StudentEncoder, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`encode_image` for a teacher that is a student's encoder: its neck stays in float32."""
    return encoder.neck(*(stage.float() for stage in encoder.features(pixels.to(dtype))))


def resolve_dtype(name: str, device: torch.device) -> str:
    """What `auto` means: bfloat16 on a GPU that has it, float32 elsewhere."""
    if name == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return name


def resolve_compile(setting: bool | str, device: torch.device, images: int | None) -> bool:
    """What `auto` means: on a GPU, where so many images lie ahead (None: unknown) that it pays."""
    if setting == "auto":
        return device.type == "cuda" and (images is None or images >= COMPILATION_PAYS)
    return bool(setting)
