"""Every family's pyramid, at half the pixels, in every format; and in float16 with activations that sum beyond it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models import small_pyramid, with_large_sums
from timm.layers.grn import GlobalResponseNorm
from timm.models.efficientvit_mit import LiteMLA
from torch import nn
from torch.nn.functional import interpolate

from distill.export.coreml import Origin, convert_encoder, export_coreml_encoder
from distill.export.encoder import RgbEncoder
from distill.export.onnx import encoder_model, export_onnx_encoder
from distill.export.onnx.encoder import onnx_encode
from distill.export.onnx.int8 import Pictures, calibrate, quantize
from distill.export.proof import Reference
from distill.export.substitutes import LinearAttention, ResponseNorm, bicubic
from exports import scene_row
from students import StudentEncoder
from students.table import EXPORTED

SIZE = 128
QUICK = ("efficientvit_l1", "repvit_m0_9")


def reference_of(student: StudentEncoder) -> Reference:
    return Reference(student, None, [scene_row(seed, SIZE) for seed in range(2)])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(EXPORTED)]
)
def test_every_format_computes_what_pytorch_computes(name: str, tmp_path: Path) -> None:
    student = small_pyramid(name)
    reference = reference_of(student)
    model = encoder_model(RgbEncoder(student).eval())
    export_onnx_encoder(model, reference, tmp_path / "encoder_fp16.onnx", float16=True)
    export_onnx_encoder(model, reference, tmp_path / "encoder.onnx")
    pictures = [scene_row(seed, SIZE).pixels() for seed in range(2, 6)]
    ranges = calibrate(tmp_path / "encoder.onnx", Pictures(pictures, SIZE))
    (tmp_path / "encoder_int8.onnx").write_bytes(quantize(model, ranges, []).SerializeToString())
    found = reference.parity(onnx_encode(tmp_path / "encoder_int8.onnx"))
    assert 1e-3 < found["relative_error"] <= 0.3  # with every layer in 8 bits; an export leaves some in float
    package = convert_encoder(RgbEncoder(student, eight_bit=True).eval())
    entry = export_coreml_encoder(package, reference, tmp_path / "Encoder.mlpackage", Origin("x", "toy", None))
    assert entry["parity"]["relative_error_in_float32"] < 5e-3  # of weights in float16; nothing of the padding


@pytest.mark.parametrize("name", ["efficientvit_l1", "efficientvit_b1"])
def test_sums_beyond_float16_do_no_harm(name: str, tmp_path: Path) -> None:
    """Spelled out as in PyTorch, the attention's sums are hundreds of times as large as the largest float16."""
    student = with_large_sums(small_pyramid(name), 600.0)
    sums = []
    for module in student.modules():
        if isinstance(module, LiteMLA):
            module.register_forward_hook(lambda mla, given, _: sums.append(largest_sum(mla, given[0])))
    reference = reference_of(student)
    assert max(sums) > 500 * 65504
    model = encoder_model(RgbEncoder(student).eval())
    export_onnx_encoder(model, reference, tmp_path / "encoder_fp16.onnx", float16=True)
    package = convert_encoder(RgbEncoder(student, eight_bit=True).eval())
    export_coreml_encoder(package, reference, tmp_path / "Encoder.mlpackage", Origin("x", "toy", None))


def largest_sum(attention: LiteMLA, x: torch.Tensor) -> float:
    """Of those that the published code computes."""
    qkv = attention.qkv(x)
    q, k, v = (
        part.reshape(-1, attention.dim, x.shape[2] * x.shape[3])
        for part in qkv.unflatten(1, (-1, 3, attention.dim)).unbind(2)
    )
    return (q.relu().transpose(1, 2) @ (k.relu() @ v.transpose(1, 2))).abs().max().item()


@torch.no_grad()
def test_linear_attention_is_timms_exactly(seeded: None) -> None:
    attention = LiteMLA(64, 64, dim=16, scales=(3,)).double().eval()
    attention.eps = 1e-15
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    x[1, :, 3:] = 0  # queries and keys that are all 0
    for magnitude in (1e-3, 1.0, 1e3):
        expected = attention(x * magnitude)
        found = LinearAttention(attention)(x * magnitude)
        torch.testing.assert_close(found, expected, atol=1e-6 * magnitude, rtol=0)  # its sums are in float32


@pytest.mark.parametrize("channels_last", [True, False])
@torch.no_grad()
def test_response_norm_is_timms_and_takes_as_large_values_as_float16_holds(channels_last: bool, seeded: None) -> None:
    norm = GlobalResponseNorm(6, channels_last=channels_last)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 40, 40, 6) if channels_last else torch.randn(2, 6, 40, 40)
    expected = norm(x * 3000)
    torch.testing.assert_close(ResponseNorm(norm)(x * 3000), expected, atol=1e-2, rtol=1e-5)
    found = ResponseNorm(norm).half()((x * 3000).half()).float()
    assert (found - expected).norm() / expected.norm() < 5e-3


@torch.no_grad()
def test_linear_attention_takes_as_large_keys_as_float16_holds(seeded: None) -> None:
    """At 64 × 64 cells, where a key times the root of their number would be beyond it."""
    attention = LiteMLA(32, 32, dim=16).eval()
    attention.eps = 1e-15
    x = torch.randn(1, 32, 64, 64)
    attention.qkv.conv.weight *= 3000
    attention.proj.conv.weight /= 3000
    assert 3000 < attention.qkv(x).abs().max() < 20000
    expected = attention(x)
    found = LinearAttention(attention).half()(x.half()).float()
    assert (found - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("factor", [0.5, 2, 4, 8])
def test_bicubic_interpolation_is_pytorchs(factor: float) -> None:
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = interpolate(x, scale_factor=factor, mode="bicubic")
    torch.testing.assert_close(bicubic(factor)(x), expected, atol=1e-5, rtol=0)


def test_what_goes_in_natively_is_compared_at_that_size(tmp_path: Path) -> None:
    """A file of `export.input=native` takes pictures of the backbone's side, and makes the embedding of the image's."""
    student = small_pyramid("repvit_m0_9")
    reference = reference_of(student.native())
    assert [max(picture.shape) for picture in reference.pictures] == [SIZE // 2] * 2
    entry = export_onnx_encoder(
        encoder_model(RgbEncoder(student.native()).eval()), reference, tmp_path / "encoder.onnx"
    )
    assert entry["inputs"]["image"]["shape"] == [1, 3, SIZE // 2, SIZE // 2]
    assert entry["outputs"]["image_embeddings"]["shape"] == [1, 64, SIZE // 16, SIZE // 16]
    whole = reference_of(student)
    apart = np.linalg.norm(whole.embeddings[0] - reference.embeddings[0]) / np.linalg.norm(whole.embeddings[0])
    assert 0 < apart < 0.1  # a picture resized once or twice is nearly the same
