"""Pictures in: where they lie, reading and decoding them, what is known of them, and how they become encoder input."""

from embeddings_cache.images.annotations import bounding_box, center_point, decode_masks, decode_rle, encode_rle
from embeddings_cache.images.decoding import decode_image, reason_of
from embeddings_cache.images.preprocessing import (
    PIXEL_MEAN,
    PIXEL_STD,
    fingerprint,
    normalize,
    pad_pixels,
    resize_longest_side,
    to_encoder_input,
)
from embeddings_cache.images.samples import Sample, count_images, read_images
from embeddings_cache.images.scenes import generate_scene, sa1b_annotation, scene_count, write_scene_tars
from embeddings_cache.images.skipped import Skipped, SkippedSamples
from embeddings_cache.images.sources import Share, assign_sources, expand_sources, keep_key, pick_sources

__all__ = [
    "PIXEL_MEAN",
    "PIXEL_STD",
    "Sample",
    "Share",
    "Skipped",
    "SkippedSamples",
    "assign_sources",
    "bounding_box",
    "center_point",
    "count_images",
    "decode_image",
    "decode_masks",
    "decode_rle",
    "encode_rle",
    "expand_sources",
    "fingerprint",
    "generate_scene",
    "keep_key",
    "normalize",
    "pad_pixels",
    "pick_sources",
    "read_images",
    "reason_of",
    "resize_longest_side",
    "sa1b_annotation",
    "scene_count",
    "to_encoder_input",
    "write_scene_tars",
]
