"""Core ML: converted in a process of its own, run by torch to be compared, kept where it is right."""

from distill.export.coreml.apart import Conversions, conversions
from distill.export.coreml.conversion import MAX_POINTS, convert_decoder, convert_encoder
from distill.export.coreml.decoder import decoder_feeds, export_coreml_decoder
from distill.export.coreml.encoder import PADDING_COLOUR, export_coreml_encoder
from distill.export.coreml.origin import Origin
from distill.export.coreml.package import require_coremltools
from distill.export.coreml.weights import PACKAGES

__all__ = [
    "MAX_POINTS",
    "PACKAGES",
    "PADDING_COLOUR",
    "Conversions",
    "Origin",
    "conversions",
    "convert_decoder",
    "convert_encoder",
    "decoder_feeds",
    "export_coreml_decoder",
    "export_coreml_encoder",
    "require_coremltools",
]
