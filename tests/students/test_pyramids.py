"""Students with a pyramid, at fewer pixels than the image has, of any backbone that timm can cut into stages."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import randomize_norms
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from torch import nn
from torch.nn.functional import interpolate

from embeddings_cache.images.scenes import generate_scene
from students import InputError, build_student_sam, create_student, list_students, load_student, save_student
from students.backbones import FAMILIES
from students.necks import Reduction
from students.sam import untrained_sam

OF_EACH_FAMILY = (
    "repvit_m0_9", "tiny_vit_5m", "efficientvit_b0", "efficientvit_l0", "efficientvit_xl0", "fastvit_t8",
    "fastvit_sa12", "mobilenetv4_conv_small", "mobilenetv4_hybrid_medium", "convnext_atto", "convnextv2_atto",
    "ghostnetv3_100",
)  # fmt: skip
NOT_LISTED = ("resnet18", "resnet33ts", "mobilevit_s", "hgnetv2_b0", "shvit_s1", "mobileone_s0", "edgenext_xx_small")
FOLDED = ("repvit_m0_9", "fastvit_t8", "efficientvit_b0", "efficientvit_xl0")
NARROW = {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize("name", [*OF_EACH_FAMILY, *NOT_LISTED])
def test_half_the_pixels_make_the_same_grid_and_train_every_parameter(name: str) -> None:
    student = create_student(name, 256, 64, neck="pyramid", neck_depth=1, input_size=128)
    embedding = student(torch.randn(2, 3, 256, 256))
    assert embedding.shape == (2, 64, 16, 16)
    embedding.square().mean().backward()
    # DistributedDataParallel stops at parameters without a gradient.
    assert [n for n, p in student.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", [*OF_EACH_FAMILY, *NOT_LISTED])
@torch.no_grad()
def test_folding_keeps_the_outputs(name: str, seeded: None) -> None:
    student = create_student(name, 128, 64, neck="pyramid", neck_depth=1, input_size=64)
    student = randomize_norms(student).eval()
    image = torch.randn(1, 3, 128, 128)
    expected, fused = student(image), student.fused()
    torch.testing.assert_close(fused(image), expected, atol=2e-4, rtol=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.neck.modules())
    if name in FOLDED:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.backbone.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OF_EACH_FAMILY)
@torch.no_grad()
def test_half_precision_and_channels_last(name: str, dtype: torch.dtype, seeded: None) -> None:
    student = randomize_norms(create_student(name, 128, 64, neck="pyramid", neck_depth=1, input_size=64)).eval()
    image = torch.randn(2, 3, 128, 128)
    expected = student(image)
    laid_out = copy.deepcopy(student).to(memory_format=torch.channels_last)
    torch.testing.assert_close(laid_out(image), expected, atol=1e-4, rtol=0)
    halved = laid_out.to(dtype)(image.to(dtype, memory_format=torch.channels_last))
    assert halved.dtype == dtype
    assert (halved.float() - expected).norm() / expected.norm() < 0.05


def test_every_listed_name_is_one_that_timm_has_or_ours() -> None:
    listed = list_students()
    assert {"efficientvit_l0", "efficientvit_xl1", "convnext_nano", "convnext_tiny", "fastvit_sa12"} <= set(listed)
    assert all(any(name.startswith(family.rstrip("*")) for name in listed) for family in FAMILIES)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_reduction_is_pytorchs_antialiased_one_and_pillows(ratio: int) -> None:
    size = 48 * ratio
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    image[:, :, 30 * ratio :] = 0  # padding
    found = Reduction(ratio)(image)
    expected = interpolate(image, scale_factor=1 / ratio, mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert (found[:, :, 31:] == 0).all()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR), dtype=np.float32)
    ours = Reduction(ratio)(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 1  # Pillow rounds after each axis


@torch.no_grad()
def test_native_is_what_comes_after_the_reduction() -> None:
    student = create_student("repvit_m0_9", 128, 64, neck="pyramid", input_size=64, **NARROW).eval()
    image = torch.randn(1, 3, 128, 128)
    native = student.native()
    assert native.img_size == 64
    assert torch.equal(native(Reduction(2)(image)), student(image))
    assert torch.equal(native.fused()(Reduction(2)(image)), student.fused()(image))


@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_segment_anythings_own_classes_take_it(name: str) -> None:
    """At half the pixels in the predictor and in the mask generator, neither of which knows."""
    torch.manual_seed(0)
    student = create_student(name, 256, neck="pyramid", neck_depth=1, input_size=128)
    sam = build_student_sam(student, untrained_sam(nn.Identity(), 256))
    image = generate_scene(np.random.default_rng(5), 200)[0]
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    masks, _, low_res = predictor.predict(np.array([[60, 50]]), np.array([1]), box=np.array([20, 20, 90, 90]))
    assert masks.shape == (3, *image.shape[:2])
    assert low_res.shape == (3, 64, 64)
    records = SamAutomaticMaskGenerator(
        sam, points_per_side=2, pred_iou_thresh=-10.0, stability_score_thresh=0.0
    ).generate(image)
    assert records
    assert all(record["segmentation"].shape == image.shape[:2] for record in records)


def test_a_file_says_what_it_takes_to_build_it_again(tmp_path: Path) -> None:
    student = create_student(
        "efficientvit_l1", 128, 32, neck="pyramid", neck_depth=2, neck_expand=2, input_size=64, depths=[1, 1, 1, 1, 1]
    ).eval()
    save_student(tmp_path / "student.safetensors", student, {})
    loaded = load_student(tmp_path / "student.safetensors")
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded(image), student(image))
    assert loaded.config == student.config


def test_files_from_before_there_were_pyramids_load(tmp_path: Path) -> None:
    student = create_student("repvit_m0_9", 128, 64, **NARROW).eval()
    save_student(tmp_path / "new.safetensors", student, {"recipe": "seed: 1"})
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    config = json.loads(metadata["student"])
    earlier = {key: config[key] for key in ("name", "image_size", "embed_dim", "overrides", "downsample")}
    save_file(tensors, tmp_path / "old.safetensors", {**metadata, "student": json.dumps(earlier)})
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path / "old.safetensors")(image), student(image))


@pytest.mark.parametrize(
    "claim",
    [
        {"name": "vit_7b_patch16_dinov3", "neck": "pyramid"},
        {"neck": "pyramid", "neck_depth": 10**9},
        {"image_size": 64_000_000, "input_size": 32, "neck": "pyramid"},
        {"overrides": {"embed_dim": [80_000] * 4, "depth": [1] * 4}},
    ],
)
def test_what_a_file_says_of_itself_takes_no_memory(claim: dict, tmp_path: Path) -> None:
    student = {"name": "repvit_m0_9", "image_size": 128, "embed_dim": 64, "overrides": {}, **claim}
    metadata = {"format": "sam-distill student", "student": json.dumps(student)}
    save_file({"x": torch.zeros(1)}, tmp_path / "s.safetensors", metadata)
    with pytest.raises(InputError, match=r"cannot be cut|does not hold the weights|0 to 100|1/16 of it"):
        load_student(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "repvit_m0_9", "input_size": 300}, "input_size 300 of student 'repvit_m0_9' does not divide"),
        ({"name": "repvit_m0_9", "input_size": 2048}, "input_size 2048 of student 'repvit_m0_9' does not divide"),
        ({"name": "repvit_m0_9", "input_size": 0}, "input_size 0 of student 'repvit_m0_9' does not divide"),
        ({"name": "repvit_m0_9", "input_size": 512, "neck": "sam"}, "goes with neck=pyramid; neck=sam needs all 1024"),
        ({"name": "repvit_m0_9", "downsample": "fuse"}, "downsample=fuse of student 'repvit_m0_9' goes with neck=sam"),
        ({"name": "repvit_m0_9", "neck": "fpn"}, "unknown neck 'fpn'; known: sam, pyramid"),
        ({"name": "repvit_m0_9", "neck_depth": -1}, "neck_depth -1, neck_expand 1 of student .* 0 to 100"),
        (
            {"name": "efficientvit_xl0", "image_size": 192, "input_size": 96},
            r"\[16, 32, 64\] px, which do not divide 96 px",
        ),
        ({"name": "repvit_m0_9", "image_size": 192, "input_size": 64}, "do not fit: all, 1/2, 1/4, ... do"),
        ({"name": "repvit_m0_9", "widths": [8, 8], "depths": [1, 1]}, "has stages at 4, 8 px; neck=pyramid"),
        ({"name": "efficientvit_l0", "depths": [1, 1]}, "neck=pyramid needs|does not take these overrides"),
        ({"name": "convnext_atto", "act_layer": "foo"}, "does not take these overrides"),
        ({"name": "efficientvit_xl0", "head_dim": 0}, "does not take these overrides"),
        ({"name": "resnet18d", "neck": "sam"}, "student 'resnet18d' does not take 1024 px"),
        ({"name": "swin_tiny_patch4_window7_224"}, "'swin_tiny_patch4_window7_224' does not take 1024 px"),
        ({"name": "repvit_m0_9", "neck": "sam", "neck_depth": 8}, "neck_depth and neck_expand .* go with neck=pyramid"),
        ({"name": "vit_base_patch16_224"}, "'vit_base_patch16_224' cannot be cut into stages; neck=pyramid needs"),
        ({"name": "fastvit_mci3", "overrides": {"layers": 3}}, "does not take these overrides|has no 'overrides'"),
        ({"name": "repvit_m0_9", "widths": [8] * 3, "depths": [1] * 3}, "has stages at 4, 8, 16 px; neck=pyramid"),
        ({"name": "efficientvit_l0", "pretrained": True}, "timm has no ImageNet weights of 'efficientvit_l0'"),
    ],
)
def test_what_cannot_be_built_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_student(**{"neck": "pyramid", **arguments})
