import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from models import randomize_norms
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from students import DOWNSAMPLES, InputError, StudentEncoder, create_student, list_students
from students.depthwise import ChannelScale
from support import ROOT

SMALLEST = ("repvit_m0_9", "tiny_vit_5m")
OTHERS = ("repvit_m1_0", "repvit_m2_3", "tiny_vit_11m", "tiny_vit_21m_512")
QUICK = tuple((name, downsample) for name in SMALLEST for downsample in DOWNSAMPLES)
WITH_SAMS_NECK = [name for name in list_students() if name.startswith(("repvit", "tiny_vit"))]
TINY_REPVIT = {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("name", WITH_SAMS_NECK)
def test_every_student_has_one_cell_every_16_pixels(name: str, downsample: str) -> None:
    student = create_student(name, image_size=128, downsample=downsample).eval()
    with torch.no_grad():
        assert student(torch.randn(1, 3, 128, 128)).shape == (1, 256, 8, 8)
        assert student(torch.randn(1, 3, 192, 192)).shape == (1, 256, 12, 12)  # no multiple of a window


def test_channels_are_scaled_as_timms_convolutions_do() -> None:
    """The backbone alone is timm's; seed, outputs, statistics and gradients are the same."""
    torch.manual_seed(0)
    ours = create_student("repvit_m0_9", 64).backbone
    assert sum(isinstance(module, ChannelScale) for module in ours.modules()) > 5
    torch.manual_seed(0)
    theirs = timm.create_model("repvit_m0_9", num_classes=0)
    theirs.stages[3].downsample.spatial_downsample.c.stride = (1, 1)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected, found = (model.double().forward_features(image) for model in (theirs, ours))
    torch.testing.assert_close(found, expected)
    for output in (expected, found):
        output.square().mean().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "downsample"), [("repvit_m0_9", "stride1"), ("tiny_vit_5m", "fuse")])
@torch.no_grad()
def test_half_precision_and_channels_last(name: str, downsample: str, dtype: torch.dtype, seeded: None) -> None:
    student = randomize_norms(create_student(name, image_size=128, downsample=downsample)).eval()
    image = torch.randn(2, 3, 128, 128)
    expected = student(image)
    laid_out = copy.deepcopy(student).to(memory_format=torch.channels_last)
    found = laid_out(image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    halved = laid_out.to(dtype)(image.to(dtype, memory_format=torch.channels_last))
    assert halved.dtype == dtype
    assert (halved.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("name", "downsample"),
    [
        *QUICK,
        *(pytest.param(name, "stride1", marks=pytest.mark.slow) for name in OTHERS),
    ],
)
@torch.no_grad()
def test_torch_export_takes_students(name: str, downsample: str) -> None:
    student = create_student(name, image_size=128, downsample=downsample).eval()
    image = torch.randn(1, 3, 128, 128)
    exported = torch.export.export(student.fused(), (image,)).run_decompositions({})
    torch.testing.assert_close(exported.module()(image), student(image), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "downsample"), [("repvit_m0_9", "stride1"), ("tiny_vit_5m", "fuse")])
@torch.no_grad()
def test_torch_compile_sees_one_graph(name: str, downsample: str) -> None:
    torch.compiler.reset()
    student = create_student(name, image_size=128, downsample=downsample).eval()
    image = torch.randn(1, 3, 128, 128)
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), student(image), atol=1e-5, rtol=0)


def test_without_a_network_imagenet_weights_are_refused_at_once(tmp_path: Path) -> None:
    code = "from students import InputError, create_student\n"
    code += (
        "try:\n    create_student('repvit_m0_9', 128, pretrained=True)\nexcept InputError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 40}
    result = subprocess.run([sys.executable, "-c", code], check=True, **options)
    (line,) = result.stdout.splitlines()
    assert line.startswith("ImageNet weights of 'repvit_m0_9' cannot be had: http://127.0.0.1:9 does not answer")
    assert "Retrying" not in result.stderr


@pytest.mark.parametrize("name", ["repvit_m0_9", "tiny_vit_5m"])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_imagenet_weights_from_a_file(name: str, downsample: str, tmp_path: Path) -> None:
    published = timm.create_model(name if name.startswith("rep") else f"{name}_224")
    torch.save(published.state_dict(), tmp_path / "imagenet.pth")
    student = create_student(name, 128, pretrained=tmp_path / "imagenet.pth", downsample=downsample)
    ours = [tensor for tensor in student.backbone.state_dict().values() if tensor.ndim == 4]
    known = [tensor for tensor in published.state_dict().values() if tensor.ndim == 4]
    assert all(any(a.shape == b.shape and torch.equal(a, b) for b in known) for a in ours)
    with pytest.raises(
        InputError, match=r"imagenet\.pth does not hold timm's weights of repvit_m1_1: \d+ (missing|surplus) "
    ):
        create_student("repvit_m1_1", 128, pretrained=tmp_path / "imagenet.pth")


def test_the_list_has_all_of_timms_and_the_papers_short_names() -> None:
    assert {"repvit_m0_9", "repvit_m1_1", "repvit_m2_3", "tiny_vit_5m", "tiny_vit_5m_224"} <= set(list_students())


def test_embedding_has_the_shape_of_sams_at_1024_px() -> None:
    student = create_student("repvit_m0_9", **TINY_REPVIT).eval()
    with torch.no_grad():
        assert student(torch.randn(1, 3, 1024, 1024)).shape == (1, 256, 64, 64)


def test_repvit_m2_3_has_the_parameters_of_repvit_sams_encoder() -> None:
    # The published repvit_sam.pt: 23,158,920 under image_encoder.
    assert sum(p.numel() for p in create_student("repvit_m2_3").parameters()) == 23_158_920


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("name", ["repvit_m0_9", "repvit_m1", "repvit_m2_3", "tiny_vit_5m"])
def test_fusing_keeps_the_outputs(name: str, downsample: str, seeded: None) -> None:
    student = randomize_norms(create_student(name, image_size=128, downsample=downsample)).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    fused = student.fused()
    image = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        difference = (fused(image) - student(image)).abs().max()
    assert difference < 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_weights_that_come_later_are_looked_up_again() -> None:
    """timm's TinyViT remembers its attention biases; an earlier forward pass must change nothing."""
    torch.manual_seed(0)
    students = [randomize_norms(create_student("tiny_vit_5m", image_size=128)).eval() for _ in range(2)]
    for name, parameter in students[1].named_parameters():
        if "attention_biases" in name:
            nn.init.normal_(parameter)
    image = torch.randn(1, 3, 128, 128)
    students[0](image)
    students[0].load_state_dict(students[1].state_dict())
    expected = students[1](image)
    assert torch.equal(students[0](image), expected)
    torch.testing.assert_close(students[0].fused()(image), expected, atol=1e-4, rtol=0)


def test_fusing_repvit_leaves_one_convolution_a_branch() -> None:
    student = create_student("repvit_m0_9", image_size=64)
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in model.modules()) for model in (student, student.fused())]
    assert convolutions[1] < convolutions[0]


def test_neck_is_sams() -> None:
    neck = create_student("repvit_m0_9", image_size=64, embed_dim=96, **TINY_REPVIT).neck
    assert [type(layer) for layer in neck] == [nn.Conv2d, LayerNorm2d, nn.Conv2d, LayerNorm2d]
    assert [tuple(p.shape) for p in neck.parameters()] == [
        (96, 32, 1, 1), (96,), (96,), (96, 96, 3, 3), (96,), (96,),
    ]  # fmt: skip


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("name", ["repvit_m1_1", "tiny_vit_5m"])
def test_gradients_reach_every_parameter(name: str, downsample: str) -> None:
    # DistributedDataParallel stops at parameters without one.
    student = create_student(name, image_size=64, downsample=downsample)
    student(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "convnext_atto"}, "no last downsampling that could have stride 1; neck=pyramid takes it"),
        ({"name": "repvit_m9"}, "unknown student 'repvit_m9'"),
        ({"name": "resnet5"}, "unknown student"),
        ({"name": "repvit_m0_9", "image_size": 1000}, "not a multiple of 64"),
        ({"name": "repvit_m0_9", "downsample": "stride2"}, "unknown downsample 'stride2'; known: stride1, fuse"),
        ({"name": "repvit_m0_9", "colour": "red"}, "has no 'colour' to override; it has .*depths.*widths"),
        ({"name": "repvit_m0_9", "checkpoint_path": "x.pth"}, "has no 'checkpoint_path'"),
        ({"name": "repvit_m0_9", "features_only": True}, "has no 'features_only'"),
        ({"name": "repvit_m0_9", "widths": [8, 16, 24]}, "overrides|has stages"),
        (
            {"name": "repvit_m0_9", "widths": [8, 16, 24], "depths": [1, 1, 1]},
            "has stages at 4, 8, 16 px; neck=sam needs .* 16 and 32",
        ),
        ({"name": "repvit_m0_9", "widths": [8] * 5, "depths": [1] * 5}, "has stages at 4, .* 64 px; neck=sam"),
        ({"name": "tiny_vit_5m", "widths": [10, 20, 30, 41]}, "overrides"),
    ],
)
def test_what_cannot_be_built_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_student(**arguments)


def test_same_seed_same_weights() -> None:
    def build() -> StudentEncoder:
        torch.manual_seed(3)
        return create_student("repvit_m0_9", image_size=64, **TINY_REPVIT)

    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
