from importlib.resources import files

import pytest
import torch

from embeddings_cache.teacher.toy import TOY_IMAGE_SIZE, WEIGHTS, build_toy_sam, load_toy_state, load_toy_teacher
from recipes.toy_teacher import measure


def test_it_segments_scenes_that_it_has_never_seen() -> None:
    """The shipped weights, measured as the script that made them measures: seeds that training did not draw."""
    scores = measure(load_toy_teacher(), range(1000, 1024))
    assert scores["box"] >= 0.85
    assert scores["point"] >= 0.75


def test_untrained_weights_would_not_pass() -> None:
    torch.manual_seed(0)
    scores = measure(build_toy_sam(TOY_IMAGE_SIZE), range(1000, 1004))
    assert max(scores.values()) < 0.5


def test_the_weights_are_small() -> None:
    assert files("embeddings_cache.teacher").joinpath(WEIGHTS).stat().st_size < 8_000_000  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [128, 192, 320])
def test_other_image_sizes_keep_everything_but_the_positions(size: int) -> None:
    ours, other = load_toy_teacher().state_dict(), load_toy_teacher(size).state_dict()
    changed = {
        name for name in ours if ours[name].shape != other[name].shape or not torch.equal(ours[name], other[name])
    }
    assert changed
    assert all("pos" in name for name in changed)
    sam = load_toy_teacher(size)
    with torch.no_grad():
        assert sam.image_encoder(torch.zeros(1, 3, size, size)).shape == (1, 128, size // 16, size // 16)


def test_growing_and_shrinking_positions_keeps_them_smooth() -> None:
    """Positions that are linear in the cell stay so in a grid twice as fine, away from the edges."""
    torch.manual_seed(0)
    small, large = build_toy_sam(128), build_toy_sam(256)
    with torch.no_grad():
        ramp = torch.arange(8.0).view(1, 8, 1, 1).expand_as(small.image_encoder.pos_embed)
        small.image_encoder.pos_embed.copy_(ramp)
    load_toy_state(large, small.state_dict())
    rows = large.image_encoder.pos_embed[0, 4:12, 5, 0]
    torch.testing.assert_close(rows[2:] - rows[:-2], torch.ones(6), atol=1e-4, rtol=0)
