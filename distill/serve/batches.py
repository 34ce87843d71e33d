"""Pictures that wait for the encoder at the same time are encoded together."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

Encode = Callable[[list[np.ndarray]], Awaitable[list[np.ndarray]]]
"""Pictures RGB uint8 (h, w, 3) → an embedding each."""


class Batcher:
    """Hands pictures to an encoder, one batch after the other.

    Args:
        encode: at work on one batch at a time.
        size: pictures of a batch at most.
        wait: seconds that a picture waits for others. While a batch is encoded the next one gathers anyway.
    """

    def __init__(self, encode: Encode, size: int, wait: float) -> None:
        self._encode, self._size, self._wait = encode, size, wait
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in the running loop."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End; pictures that wait are not encoded any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def encode(self, pixels: np.ndarray) -> np.ndarray:
        """The embedding, float32 (1, C, h, w), of a picture; raises what the encoder raised."""
        done: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((pixels, done))
        return await done

    async def _work(self) -> None:
        while True:
            batch = await self._gather()
            try:
                embeddings = await self._encode([pixels for pixels, _ in batch])
            except asyncio.CancelledError:
                for _, done in batch:
                    done.cancel()
                raise
            except Exception as error:  # of these pictures; the next batch is another's
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for (_, done), embedding in zip(batch, embeddings, strict=True):
                    if not done.done():
                        done.set_result(embedding)

    async def _gather(self) -> list[tuple[np.ndarray, "asyncio.Future[np.ndarray]"]]:
        """The next pictures; those whose waiting has ended with the server are passed over."""
        batch: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = []
        loop = asyncio.get_running_loop()
        until = float("inf")
        while len(batch) < self._size:
            left = until - loop.time()
            try:
                if not batch:
                    one = await self._waiting.get()
                elif left > 0:
                    one = await asyncio.wait_for(self._waiting.get(), left)
                else:
                    one = self._waiting.get_nowait()
            except (asyncio.TimeoutError, asyncio.QueueEmpty):
                break
            if one[1].done():
                continue
            if not batch:
                until = loop.time() + self._wait
            batch.append(one)
        return batch
