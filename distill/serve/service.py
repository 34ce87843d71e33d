"""What the server does: pictures → embeddings, each once; prompts → masks, past the pictures that wait."""

import asyncio
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import msgspec
import numpy as np
from PIL import Image

from distill.schema import PredictRecipe, ServeRecipe
from distill.serve.batches import Batcher
from distill.serve.embeddings import Embedding, Embeddings
from distill.serve.engines import Engine
from distill.serve.errors import Refused, busy
from distill.serve.everything import everything_of
from distill.serve.masks import Stop, masks_of
from distill.serve.messages import Embedded, Everything, EverythingRequest, Format, Masks, MasksRequest, Prompt
from distill.serve.metrics import Metrics
from distill.serve.pictures import Picture, id_of, read_picture
from embeddings_cache.images import Reading
from students import InputError

Result = TypeVar("Result")

READERS = 2
"""Threads that decode pictures; one of the largest takes 400 MB there."""

MOST_EVERYTHING = 4
"""Requests for everything that wait or are at work, one at a time."""


class Service:
    """The engine behind its queues, and the embeddings that are kept.

    Args:
        engine: what encodes and decodes.
        settings: sizes and limits.
        reading: how pictures are read.
        predict: what of everything in a picture is kept, unless a request says otherwise.
        decoders: requests for masks that are worked on at once.
        batch_size: pictures that are encoded at once at most.
        metrics: is told of all.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeRecipe,
        reading: Reading,
        predict: PredictRecipe,
        decoders: int,
        batch_size: int,
        metrics: Metrics,
    ) -> None:
        self.engine, self.settings, self.reading, self.predict, self.metrics = (
            engine,
            settings,
            reading,
            predict,
            metrics,
        )
        self._decoders, self._batch_size = decoders, batch_size
        self.embeddings = Embeddings(settings.cache_mb * 2**20)
        self._encoding: dict[str, asyncio.Task[Embedding]] = {}
        self._batcher = Batcher(self._encode_batch, batch_size, settings.batch_ms / 1e3)
        names = {"reader": READERS, "encoder": 1, "decoder": decoders, "everything": 1}
        self._threads = {name: ThreadPoolExecutor(count, name) for name, count in names.items()}
        self._queues = {
            "encode": Queue("pictures", settings.queue, partial(self._told, "encode")),
            "masks": Queue("requests for masks", settings.queue, partial(self._told, "masks")),
            "everything": Queue("requests for everything", MOST_EVERYTHING, partial(self._told, "everything")),
        }

    def start(self) -> None:
        """Begin, in the running loop."""
        self._batcher.start()

    async def stop(self) -> None:
        """End; what waits is not done any more."""
        await self._batcher.stop()
        for task in list(self._encoding.values()):
            task.cancel()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    async def warm_up(self) -> None:
        """Do everything that requests ask for once, in every thread, so that the first is as fast as the others.

        Raises:
            InputError: not one embedding would be kept.
        """
        side = self.engine.image_size
        noise = np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
        for count in range(1, self._batch_size + 1):
            values = (await self.in_thread("encoder", self.engine.encode, [noise] * count))[0]
        if values.nbytes > self.embeddings.room:
            needed = values.nbytes / 2**20
            raise InputError(f"serve.cache_mb={self.settings.cache_mb}: one embedding has {needed:.0f} MB")
        embedding = Embedding("", values, (noise.shape[0], noise.shape[1]), side)
        photographs = [encoded(noise, kind) for kind in ("JPEG", "PNG") for _ in range(READERS)]
        await asyncio.gather(*(self.in_thread("reader", self._read, each) for each in photographs))
        masks = [self.in_thread("decoder", self._warm_up_masks, embedding) for _ in range(self._decoders)]
        await asyncio.gather(*masks)
        nothing = {"points_per_side": 4}
        await self.in_thread("everything", everything_of, self.engine, embedding, nothing, "rle", 0.0, lambda: False)

    def _warm_up_masks(self, embedding: Embedding) -> None:
        side = self.engine.image_size
        click = Prompt(points=[(side / 2, side / 2)])
        box = Prompt(box=(side / 4, side / 4, side / 2, side / 2))
        both = Prompt(points=click.points, box=box.box)
        more = Prompt(points=[(side / 2, side / 2), (side / 4, side / 4), (1.0, 1.0)])
        kinds: list[Format] = ["rle", "png", "polygons"]
        for prompts in ([click], [click], [click] * 8, [box], [more], [both]):
            for kind in kinds:
                request = MasksRequest(prompts, format=kind, low_res=True)
                answer = masks_of(self.engine, embedding, request, lambda: False)
        again = Prompt(points=click.points, mask_input=answer[0][0].low_res)
        msgspec.json.encode(masks_of(self.engine, embedding, MasksRequest([again]), lambda: False))

    async def embed(self, encoded: bytes) -> Embedding:
        """The embedding of a picture's file; one that several ask for at once is made once.

        Raises:
            Refused: it is no picture, or too many wait already.
        """
        id = await self.in_thread("reader", id_of, encoded) if len(encoded) > 2**18 else id_of(encoded)
        if (kept := self.embeddings.get(id)) is not None:
            self.metrics.hits.inc()
            return kept
        task = self._encoding.get(id)
        if task is None:
            self._queues["encode"].enter()
            self.metrics.misses.inc()
            task = self._encoding[id] = asyncio.create_task(self._embed(id, encoded))
            task.add_done_callback(partial(self._encoded, id))
        else:
            self.metrics.joined.inc()
        return await asyncio.shield(task)  # others may wait for it too

    def kept(self, id: str) -> Embedding:
        """An embedding by the picture's id.

        Raises:
            Refused: there is none (any more).
        """
        if (found := self.embeddings.get(id)) is None:
            raise Refused(404, "unknown_id", "no embedding of this id is kept (any more): send the picture again")
        self.metrics.hits.inc()
        return found

    def embedded(self, embedding: Embedding) -> Embedded:
        """An answer to `/v1/embed`."""
        height, width = embedding.original_size
        return Embedded(embedding.id, width, height)

    async def masks(self, embedding: Embedding, request: MasksRequest) -> bytes:
        """The answer to `/v1/masks`, as JSON.

        Raises:
            Refused: prompts that are none, too many of them, or too many requests.
        """
        if len(request.prompts) > self.settings.prompts:
            raise Refused(422, "too_many_prompts", f"a request has {self.settings.prompts} prompts at most")
        height, width = embedding.original_size

        def work(stopped: Callable[[], bool]) -> bytes:
            with self.metrics.decode.time():
                masks = masks_of(self.engine, embedding, request, stopped)
            return msgspec.json.encode(Masks(embedding.id, width, height, masks))

        with self._queues["masks"].place():
            return await self._stoppable("decoder", work)

    async def everything(self, embedding: Embedding, request: EverythingRequest) -> bytes:
        """The answer to `/v1/everything`, as JSON.

        Raises:
            Refused: too many requests.
        """
        names = ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh")
        asked = {name: value for name in names if (value := getattr(request, name)) is not None}
        settings = {**asdict(self.predict), **asked}
        height, width = embedding.original_size

        def work(stopped: Callable[[], bool]) -> bytes:
            found = everything_of(self.engine, embedding, settings, request.format, request.tolerance, stopped)
            return msgspec.json.encode(Everything(embedding.id, width, height, found))

        with self._queues["everything"].place():
            return await self._stoppable("everything", work)

    async def in_thread(self, name: str, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in one of a pool's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[name], function, *arguments)

    async def _stoppable(self, name: str, work: Callable[[Stop], bytes]) -> bytes:
        """The same, of one that looks whether it is to stop, which it is when nobody waits for it any more."""
        stop = Stop()
        try:
            return await self.in_thread(name, work, stop)
        finally:
            stop.set()

    def _read(self, encoded: bytes) -> Picture:
        return read_picture(encoded, self.engine.image_size, self.reading)

    async def _embed(self, id: str, encoded: bytes) -> Embedding:
        picture = await self.in_thread("reader", self._read, encoded)
        values = await self._batcher.encode(picture.pixels)
        embedding = Embedding(id, values, picture.original_size, self.engine.image_size)
        self.embeddings.put(embedding)
        return embedding

    async def _encode_batch(self, pictures: list[np.ndarray]) -> list[np.ndarray]:
        self.metrics.batch.observe(len(pictures))
        with self.metrics.encode.time():
            return await self.in_thread("encoder", self.engine.encode, pictures)

    def _encoded(self, id: str, task: asyncio.Task[Embedding]) -> None:
        self._queues["encode"].leave()
        self._encoding.pop(id, None)
        if not task.cancelled():
            task.exception()  # which nobody may be waiting for

    def _told(self, kind: str, length: int) -> None:
        self.metrics.queue.labels(kind).set(length)


class Queue:
    """Counts who is at work or waits, and refuses one more than so many.

    Args:
        what: is counted.
        limit: at most.
        told: the length, whenever it changes.
    """

    def __init__(self, what: str, limit: int, told: Callable[[int], None]) -> None:
        self._what, self._limit, self._told = what, limit, told
        self._length = 0
        told(0)

    def enter(self) -> None:
        """Take a place, which is to be given back.

        Raises:
            Refused: there is none.
        """
        if self._length >= self._limit:
            raise busy(f"{self._limit} {self._what} are at work or waiting: try again in a moment")
        self._length += 1
        self._told(self._length)

    def leave(self) -> None:
        """Give a place back."""
        self._length -= 1
        self._told(self._length)

    @contextmanager
    def place(self) -> Iterator[None]:
        """`enter` and `leave`."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """RGB uint8 (H, W, 3) as a picture's file: JPEG or PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
