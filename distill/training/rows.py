"""Which rows of the cache a process trains on and which it validates on."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from distill.recipe import Recipe
from embeddings_cache.shards import EmbeddingsCache, held_out_keys
from embeddings_cache.system import processes_here
from students import InputError


@dataclass(frozen=True)
class Group:
    """Processes that share rows: all of them, or, where each machine has shards of its own, those of a machine."""

    rank: int
    size: int


@dataclass(frozen=True)
class Rows:
    """Row numbers in this process's cache.

    `of_group` are the training rows that the group divides at every step; `held_out` and `watched` this process's share
    of the validation's. `an_epoch` counts the training images of an epoch, those of all processes.
    """

    group: Group
    of_group: list[int]
    held_out: list[int]
    watched: list[int]
    an_epoch: int


def divide_rows(recipe: Recipe, cache: EmbeddingsCache, accelerator: Accelerator) -> Rows:
    """Divide the cache; with `cache.per_node` each machine's processes divide what lies there.

    What is held out is decided by the keys of all machines, and so are the same images wherever they lie.

    Raises:
        InputError: nothing would be left to train on, or two machines have the same images.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    group, keys = Group(rank, ranks), cache.keys
    if recipe.cache.per_node:
        group = Group(accelerator.local_process_index, processes_here())
        if sum(gather_object([group.size if group.rank == 0 else 0])) != ranks:
            raise InputError("cache.per_node: the launcher does not say LOCAL_RANK and LOCAL_WORLD_SIZE; torchrun does")
        everywhere = gather_object(cache.keys if group.rank == 0 else [])
        keys = sorted(set(everywhere))
        shared = len(everywhere) - len(keys)
        if shared > cache.info.skipped:  # a key that two sources had, and two shards have, counts among those
            raise InputError(f"cache.per_node: machines share {shared} images; each takes its own")
        accelerator.print(f"train: {len(keys)} of the cache's {cache.info.images} images are on the machines")
    held_out = held_out_keys(keys, recipe.data.val_images)
    watched = set(sorted(held_out)[: recipe.train.watch_images])
    mine = [index for index, key in enumerate(cache.keys) if key in held_out]
    of_group = [index for index, key in enumerate(cache.keys) if key not in held_out]
    least = min(gather_object([len(of_group) * ranks // group.size]))
    return Rows(
        group,
        of_group,
        mine[group.rank :: group.size],
        [index for index in mine if cache.keys[index] in watched][group.rank :: group.size],
        least,
    )
