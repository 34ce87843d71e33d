"""Losses that are no numbers any more, or far too high: which step, which images, and what is kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from distill.launch import create_accelerator
from distill.recipe import Recipe, load_recipe
from distill.schema import TrainRecipe
from distill.train import train
from distill.training.monitor import Monitor, Step, UnsoundLoss
from embeddings_cache.shards.reader import EmbeddingsCache
from embeddings_cache.system.stopping import StopRequest
from students import InputError
from support import TINY, places


@pytest.fixture
def recipe(finished_run: Path, scene_tar: Path, tmp_path: Path) -> Recipe:
    """The tiny recipe on a copy of the finished cache."""
    shutil.copytree(finished_run / "cache", tmp_path / "cache")
    return load_recipe([*TINY, *places(tmp_path, scene_tar), "train.workers=0", "train.checkpoint_every=1"])


def spoil(cache: EmbeddingsCache, key: str, value: float) -> None:
    """Put a value into an embedding of the cache, as a teacher in float16 that overflowed would have."""
    for path in cache.shards:
        with h5py.File(path, "r+") as file:
            keys = [stored.decode() for stored in file["keys"][:]]
            if key in keys:
                embedding = file["embeddings"][keys.index(key)]
                embedding[:, 0, 0] = value
                file["embeddings"][keys.index(key)] = embedding


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "the loss is nan"), (30000, "more than 5 times that of the steps")]
)
def test_a_bad_image_is_named_and_the_last_good_checkpoint_kept(value: float, said: str, recipe: Recipe) -> None:
    recipe.train = replace(recipe.train, stop_above=5.0, epochs=4)
    cache = EmbeddingsCache(Path(recipe.cache.dir))
    rows, _ = cache.split(recipe.data.val_images)
    # The image that the twelfth step of four takes last: the second of the third epoch. It is met earlier, in others.
    bad = cache.keys[int(np.random.default_rng([recipe.seed, 0]).permutation(rows)[-1])]
    spoil(cache, bad, value)
    with pytest.raises(InputError) as stopped:
        train(recipe, create_accelerator(recipe))
    message = str(stopped.value)
    assert said in message
    assert bad in message
    assert "step-0000" in message
    assert "\n" not in message
    step = int(message.partition(" at step ")[2].partition(",")[0])
    saved = sorted((Path(recipe.run_dir) / "checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{step - 1:08d}"
    lines = [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def step_of(number: int, loss: float, norm: float = 1.0) -> Step:
    return Step(number, {"loss": torch.tensor(loss)}, torch.tensor(norm), [f"sa_{number}"])


def test_what_is_usual_is_learnt_anew_when_the_losses_change() -> None:
    monitor = Monitor(Accelerator(), 10.0, 1, 0.0)
    for number in range(20):
        monitor.add(step_of(number, 0.01), TrainRecipe())
        monitor.look(StopRequest())
    monitor.add(step_of(20, 1.0), TrainRecipe(loss={"mask": 1.0}))
    assert not monitor.look(StopRequest()).stop
    monitor = Monitor(Accelerator(), 10.0, 1, 0.0)
    for number in range(20):
        monitor.add(step_of(number, 0.01), TrainRecipe())
    monitor.add(step_of(20, 1.0), TrainRecipe())
    with pytest.raises(UnsoundLoss, match=r"the loss is 1, more than 10 times .* at step 20, images sa_20"):
        monitor.look(StopRequest())


def test_a_loss_is_not_unusual_where_most_images_teach_nothing() -> None:
    """As for `truth`, of a folder of which little is labelled."""
    monitor = Monitor(Accelerator(), 10.0, 1, 0.0)
    for number in range(40):
        monitor.add(step_of(number, 0.9 if number % 8 == 7 else 0.0), TrainRecipe())
        assert not monitor.look(StopRequest()).stop


def test_a_gradient_that_is_no_number_stops_the_run() -> None:
    monitor = Monitor(Accelerator(), 0.0, 1, 0.0)
    monitor.add(step_of(3, 1.0, float("inf")), TrainRecipe())
    with pytest.raises(UnsoundLoss, match="the gradient's norm is inf at step 3, images sa_3"):
        monitor.look(StopRequest())


def test_a_look_says_who_asked_and_whether_a_checkpoint_is_overdue() -> None:
    monitor, request = Monitor(Accelerator(), 0.0, 1, 1e-12), StopRequest()
    monitor.add(step_of(1, 1.0), TrainRecipe())
    look = monitor.look(request)
    assert (look.stop, look.save) == (False, True)
    request.signal_number = 15
    monitor.saved_now()
    monitor.checkpoint_seconds = 60.0
    monitor.add(step_of(2, 3.0), TrainRecipe())
    look = monitor.look(request)
    assert (look.stop, look.save) == (True, False)
    assert monitor.means() == {"loss": 2.0, "gradient_norm": 1.0}
