"""ONNX: encoders and decoders as one file each, compared with PyTorch before they are kept."""

from distill.export.onnx.decoder import decoder_model, export_onnx_decoder, low_res_model
from distill.export.onnx.encoder import (
    encoder_model,
    export_onnx_encoder,
    export_picture_encoder,
    picture_encoder_model,
)
from distill.export.onnx.file import marked, open_session
from distill.export.onnx.int8 import WEIGHTS_ALONE, export_int8_encoder
from distill.export.onnx.opset import in_opset

__all__ = [
    "WEIGHTS_ALONE",
    "decoder_model",
    "encoder_model",
    "export_int8_encoder",
    "export_onnx_decoder",
    "export_onnx_encoder",
    "export_picture_encoder",
    "in_opset",
    "low_res_model",
    "marked",
    "open_session",
    "picture_encoder_model",
]
