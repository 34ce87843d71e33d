"""ONNX: encoders and decoders as one file each, compared with PyTorch before they are kept."""

from distill.export.onnx.batch import batch_decoder_model, export_batch_decoder
from distill.export.onnx.decoder import decoder_model, export_onnx_decoder, low_res_model
from distill.export.onnx.encoder import (
    FLOAT32,
    encoder_model,
    export_onnx_encoder,
    export_picture_encoder,
    picture_encoder_model,
)
from distill.export.onnx.file import marked, open_session
from distill.export.onnx.float16 import in_float16
from distill.export.onnx.int8 import WEIGHTS_ALONE, export_int8_encoder
from distill.export.onnx.opset import in_opset
from distill.export.onnx.prompted import export_prompt_decoder, prompt_model, prompt_model_in
from distill.export.onnx.tensorrt import export_trt_decoder, export_trt_encoder
from distill.export.onnx.vision import export_vision_encoder, vision_model

__all__ = [
    "FLOAT32",
    "WEIGHTS_ALONE",
    "batch_decoder_model",
    "decoder_model",
    "encoder_model",
    "export_batch_decoder",
    "export_int8_encoder",
    "export_onnx_decoder",
    "export_onnx_encoder",
    "export_picture_encoder",
    "export_prompt_decoder",
    "export_trt_decoder",
    "export_trt_encoder",
    "export_vision_encoder",
    "in_float16",
    "in_opset",
    "low_res_model",
    "marked",
    "open_session",
    "picture_encoder_model",
    "prompt_model",
    "prompt_model_in",
    "vision_model",
]
