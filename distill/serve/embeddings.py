"""Embeddings that are kept: the most recently used ones, in so many bytes."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from embeddings_cache.images import resized_shape


@dataclass(frozen=True)
class Embedding:
    """Of a picture.

    Attributes:
        id: what the picture goes by.
        values: float32 (1, C, h, w).
        original_size: height and width of the picture.
        input_size: the same after resizing.
    """

    id: str
    values: np.ndarray
    original_size: tuple[int, int]
    image_size: int

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width after resizing."""
        return resized_shape(self.original_size, self.image_size)


class Embeddings:
    """A cache by the picture's id; may be used from several threads.

    Args:
        room: bytes of all embeddings at most.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.bytes = 0
        self._kept: OrderedDict[str, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, id: str) -> Embedding | None:
        """An embedding, which is then the most recently used one; None where there is none."""
        with self._lock:
            if id in self._kept:
                self._kept.move_to_end(id)
            return self._kept.get(id)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def put(self, embedding: Embedding) -> None:
        """Keep an embedding, and forget those that have not been used for longest where there is no room."""
        with self._lock:
            if embedding.id in self._kept:
                return
            self._kept[embedding.id] = embedding
            self.bytes += embedding.values.nbytes
            while self.bytes > self.room and self._kept:
                _, forgotten = self._kept.popitem(last=False)
                self.bytes -= forgotten.values.nbytes
