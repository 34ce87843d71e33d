"""Latencies that others have published, to stand beside ours; nothing here was measured by us."""

from typing import Any

REPVIT_SAM = "RepViT-SAM, arXiv:2312.05760"

_MEASURED: list[tuple[str, str, float | None]] = [
    ("RepViT-SAM encoder", "iPhone 12", 48.9),
    ("RepViT-SAM encoder", "MacBook M1 Pro", 44.8),
    ("MobileSAM encoder", "iPhone 12", None),
    ("MobileSAM encoder", "MacBook M1 Pro", 482.2),
    ("ViT-B encoder", "MacBook M1 Pro", 6249.5),
    ("mask decoder", "iPhone 12", 11.6),
    ("mask decoder", "MacBook M1 Pro", 11.8),
]
"""Milliseconds at 1024 px, Core ML; None: out of memory."""

PUBLISHED_LATENCIES: list[dict[str, Any]] = [
    {"name": name, "device": device, "ms": ms, "reason": None if ms else "out of memory", "source": REPVIT_SAM}
    for name, device, ms in _MEASURED
]
