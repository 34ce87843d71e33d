"""Chance that is the same on every machine."""

import hashlib


def stable_hash(text: str, purpose: str) -> float:
    """A number in [0, 1) that is the same on every machine; hashes of different purposes are independent."""
    digest = hashlib.sha256(f"{purpose}:{text}".encode(errors="surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
