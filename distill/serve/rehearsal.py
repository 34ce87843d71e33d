"""The server's first requests, which come from itself: whatever is slow once is over when the port opens."""

import asyncio
import json
import socket
from collections.abc import Mapping

import numpy as np

from distill.serve.server import Accept
from distill.serve.service import encoded

TIMES = 4
"""Pictures, and clicks on each."""


async def rehearse(accept: Accept, headers: Mapping[str, str]) -> None:
    """Send a new picture and a click on it, a few times, over HTTP as anybody would.

    Args:
        accept: the server's.
        headers: what a request has to show.

    Raises:
        RuntimeError: one was not answered as it should be.
    """
    ours, theirs = socket.socketpair()
    await accept(theirs)
    reader, writer = await asyncio.open_connection(sock=ours)
    noise = np.random.default_rng(1).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    try:
        for number in range(TIMES):
            noise[0, 0] = number
            answer = await _post(reader, writer, "/v1/embed", "image/jpeg", encoded(noise, "JPEG"), headers)
            click = {"id": json.loads(answer)["id"], "prompts": [{"points": [[320, 240]]}]}
            for _ in range(TIMES):
                await _post(reader, writer, "/v1/masks", "application/json", json.dumps(click).encode(), headers)
    finally:
        writer.close()


async def _post(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    kind: str,
    body: bytes,
    headers: Mapping[str, str],
) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in head if line.startswith("content-length:"))
    answer = await reader.readexactly(length)
    if head[0].split()[1] != "200":
        raise RuntimeError(f"{path} answered {head[0]}: {answer[:500].decode('utf-8', 'replace')}")
    return answer
