"""Pictures in: where they lie, reading and decoding them, what is known of them, and how they become encoder input."""

from embeddings_cache.images.annotations import bounding_box, center_point, decode_masks, usable_annotation
from embeddings_cache.images.archives import is_archive
from embeddings_cache.images.decoding import (
    AS_OPENCV,
    SIXTEEN_BIT,
    Reading,
    TooManyPixels,
    decode_image,
    decode_picture,
    reason_of,
)
from embeddings_cache.images.folders import annotated_pictures
from embeddings_cache.images.polygons import CocoFile
from embeddings_cache.images.preprocessing import (
    PIXEL_MEAN,
    PIXEL_STD,
    fingerprint,
    normalize,
    pad_pixels,
    resize_longest_side,
    resize_picture,
    resized_shape,
    to_encoder_input,
)
from embeddings_cache.images.rle import check_rle, decode_rle, encode_rle
from embeddings_cache.images.samples import Account, Bad, Decoder, Encoded, Sample, read_images, read_with
from embeddings_cache.images.scenes import generate_scene, sa1b_annotation, scene_count, write_scene_tars
from embeddings_cache.images.skipped import Skipped, SkippedSamples, commonest, gather_notes, read_notes
from embeddings_cache.images.sources import Share, assign_sources, expand_sources, keep_key, pick_sources
from embeddings_cache.images.survey import Survey, listed, look_through

__all__ = [
    "AS_OPENCV",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "SIXTEEN_BIT",
    "Account",
    "Bad",
    "CocoFile",
    "Decoder",
    "Encoded",
    "Reading",
    "Sample",
    "Share",
    "Skipped",
    "SkippedSamples",
    "Survey",
    "TooManyPixels",
    "annotated_pictures",
    "assign_sources",
    "bounding_box",
    "center_point",
    "check_rle",
    "commonest",
    "decode_image",
    "decode_masks",
    "decode_picture",
    "decode_rle",
    "encode_rle",
    "expand_sources",
    "fingerprint",
    "gather_notes",
    "generate_scene",
    "is_archive",
    "keep_key",
    "listed",
    "look_through",
    "normalize",
    "pad_pixels",
    "pick_sources",
    "read_images",
    "read_notes",
    "read_with",
    "reason_of",
    "resize_longest_side",
    "resize_picture",
    "resized_shape",
    "sa1b_annotation",
    "scene_count",
    "to_encoder_input",
    "usable_annotation",
    "write_scene_tars",
]
