"""Masks as Label Studio's brush regions hold them: run lengths of RGBA values, packed bit by bit.

The format is that of rle-pack (https://github.com/thi-ng/umbrella, packages/rle-pack), by which Label Studio's editor
reads and writes it: 32 bits for the number of values, 5 for the bits of a value less one, four times 4 for the bits of
four kinds of run length less one; then each run as a bit that is 1, two bits for the kind of its length, its length
less one, and its value.
"""

import numpy as np

VALUE_BITS = 8
LENGTH_BITS = (3, 4, 8, 16)
"""The four kinds, those that the editor itself writes; a longer run is several."""

CHANNELS = 4
"""A pixel is red, green, blue and alpha: all 255 on the object, all 0 beside it."""


def encode_mask(mask: np.ndarray) -> list[int]:
    """A mask, boolean (H, W), as the bytes of a brush region's `rle`."""
    pixels = mask.ravel()
    starts = np.flatnonzero(np.concatenate([[True], pixels[1:] != pixels[:-1]]))
    lengths, values = _split(np.diff(starts, append=pixels.size) * CHANNELS, pixels[starts])
    kinds = np.searchsorted(np.left_shift(1, LENGTH_BITS), lengths)
    bits = np.array(LENGTH_BITS)[kinds]
    runs = ((((4 | kinds) << bits) | (lengths - 1)) << VALUE_BITS) | np.where(values, 255, 0)
    head = pixels.size * CHANNELS << 5 | (VALUE_BITS - 1)
    for each in LENGTH_BITS:
        head = head << 4 | (each - 1)
    return _pack(np.append(head, runs), np.append(32 + 5 + 4 * 4, 3 + bits + VALUE_BITS))


def _split(lengths: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs, of which none is longer than the last kind of length says."""
    longest = 1 << LENGTH_BITS[-1]
    parts = -(-lengths // longest)
    pieces = np.full(parts.sum(), longest)
    pieces[np.cumsum(parts) - 1] = lengths - (parts - 1) * longest
    return pieces, np.repeat(values, parts)


def _pack(words: np.ndarray, bits: np.ndarray) -> list[int]:
    """The lowest so many bits of each word, one after the other, as bytes; the last is filled up with zeros."""
    ends = np.cumsum(bits)
    below = np.repeat(ends, bits) - 1 - np.arange(ends[-1])
    return np.packbits(((np.repeat(words, bits) >> below) & 1).astype(np.uint8)).tolist()
