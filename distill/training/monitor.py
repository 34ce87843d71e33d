"""Looking at a run's losses now and then, on all processes at once: are they sound, has somebody asked to stop?"""

import math
import time
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from distill.schema import TrainRecipe
from embeddings_cache.system import StopRequest
from students import InputError

SECONDS_BETWEEN = 1.0
"""About so often losses are fetched from the device and signals heeded; each time a GPU has to be waited for."""

USUAL_AFTER, USUAL_OVER = 10, 100
"""Steps after which it is known what loss is usual, and over which."""

MOST_LEFT_OUT = 20
"""Steps one after the other that fp16 may leave out."""

KEYS_SHOWN = 8


class UnsoundLoss(InputError):
    """Going on would spoil the weights."""


@dataclass(frozen=True)
class Step:
    """What an optimizer step left on the device: losses by name, their weighted sum `loss` among them, scalars all; the
    norm of its gradient; and the keys of this process's images."""

    number: int
    losses: dict[str, torch.Tensor]
    gradient_norm: torch.Tensor
    keys: list[str]


@dataclass(frozen=True)
class Look:
    """What all processes agree on: whether one was asked to stop, and whether a checkpoint is overdue."""

    stop: bool
    save: bool


class Monitor:
    """Collects steps, and judges them from time to time.

    Args:
        stop_above: a loss so many times the usual stops the run; 0: only one that is not finite does.
        most_steps: that are made without a look.
        checkpoint_minutes: after which a checkpoint is overdue; 0: never.
    """

    def __init__(self, accelerator: Accelerator, stop_above: float, most_steps: int, checkpoint_minutes: float) -> None:
        self.accelerator, self.stop_above, self.most_steps = accelerator, stop_above, most_steps
        self.checkpoint_seconds = 60 * checkpoint_minutes or math.inf
        self.interval, self.looked, self.saved = 1, time.perf_counter(), time.perf_counter()
        self.settings: TrainRecipe | None = None
        self.usual: deque[float] = deque(maxlen=USUAL_OVER)
        self.pending: list[Step] = []
        self.judged: list[dict[str, float]] = []
        self.infinite = 0

    def add(self, step: Step, settings: TrainRecipe) -> bool:
        """Take note of a step of the phase with these settings; returns whether it is time to look, which is the same
        on all processes."""
        if settings != self.settings:
            self.settings = settings
            self.usual.clear()
        self.pending.append(step)
        return len(self.pending) >= self.interval

    def look(self, request: StopRequest) -> Look:
        """Judge all steps since the last time.

        Raises:
            UnsoundLoss: a loss or a gradient is not finite, or a loss is far above the usual.
        """
        names = list(self.pending[0].losses)
        own = torch.stack([torch.stack([step.losses[name] for name in names]) for step in self.pending]).float()
        now = time.perf_counter()
        wishes = (request.signal_number is not None, now - self.saved > self.checkpoint_seconds)
        asked = own.new_tensor([*wishes, (now - self.looked) / len(self.pending)])
        stop, save, seconds = self.accelerator.reduce(asked, reduction="mean").tolist()
        means = self.accelerator.reduce(own, reduction="mean").tolist()
        norms = torch.stack([step.gradient_norm for step in self.pending]).tolist()
        for step, row, norm, mine in zip(self.pending, means, norms, own[:, names.index("loss")].tolist(), strict=True):
            losses = dict(zip(names, row, strict=True))
            self._judge(step, losses["loss"], norm, mine)
            self.judged.append({**losses, "gradient_norm": norm})
        self.pending = []
        # The mean over processes, so that all of them look after the same steps.
        self.interval = max(1, min(self.most_steps, int(SECONDS_BETWEEN / max(seconds, 1e-6))))
        self.looked = time.perf_counter()
        return Look(stop > 0, save > 0)

    def saved_now(self) -> None:
        """A checkpoint was written."""
        self.saved = time.perf_counter()

    def means(self) -> dict[str, float]:
        """Means of what was judged since the last call; a gradient that fp16 made infinite is left out."""
        names = dict.fromkeys(name for losses in self.judged for name in losses)
        values = {name: [losses[name] for losses in self.judged if name in losses] for name in names}
        self.judged = []
        finite = {name: [value for value in found if math.isfinite(value)] for name, found in values.items()}
        return {name: fmean(found) for name, found in finite.items() if found}

    def _judge(self, step: Step, loss: float, norm: float, mine: float) -> None:
        limit = math.inf
        if self.stop_above and len(self.usual) >= USUAL_AFTER:
            # 0 is usual where few images have masks to learn from.
            limit = self.stop_above * median(self.usual) or math.inf
        self.usual.append(loss)
        wrong = ""
        if not math.isfinite(loss):
            wrong = f"the loss is {loss}"
        elif loss > limit:
            wrong = f"the loss is {loss:.3g}, more than {self.stop_above:g} times that of the steps before"
        # With fp16 the optimizer leaves such a step out and goes on with smaller numbers.
        self.infinite = 0 if math.isfinite(norm) else self.infinite + 1
        if not wrong and self.infinite > (MOST_LEFT_OUT if self.accelerator.scaler is not None else 0):
            wrong = f"the gradient's norm is {norm}"
        if wrong:
            concerned = mine > limit or not math.isfinite(mine) or (math.isfinite(loss) and loss <= limit)
            keys = gather_object(step.keys if concerned else [])
            more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
            raise UnsoundLoss(f"{wrong} at step {step.number}, images {', '.join(keys[:KEYS_SHOWN])}{more}")
