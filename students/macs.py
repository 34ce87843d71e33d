"""What a model computes, counted."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of the convolutions and matrix products in a call, those of attention among them; not of
    products channel by channel, such as `ChannelScale`'s, of which a folded student has none."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
