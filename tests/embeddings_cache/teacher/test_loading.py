import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling import ImageEncoderViT

from embeddings_cache.images.preprocessing import pad_pixels, resize_longest_side, to_encoder_input
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.precompute import cache_identity
from embeddings_cache.teacher.encoder import TeacherEncoder
from embeddings_cache.teacher.loading import check_teacher, inspect_teacher, load_teacher, weights_sha256
from students import InputError, create_student, save_student
from students.architectures import architecture
from support import ROOT


def test_toy_teacher_is_the_same_every_time_and_leaves_the_seed_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    digest = weights_sha256(load_teacher("toy", None, 128))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert weights_sha256(load_teacher("toy", None, 128)) == digest


def test_encode_agrees_with_sam_predictor() -> None:
    sam = load_teacher("toy", None, 128)
    images = [generate_scene(np.random.default_rng(seed), 150)[0] for seed in range(3)]
    pictures = [resize_longest_side(image, 128) for image in images]
    batch = TeacherEncoder(sam, torch.device("cpu"))(
        torch.stack([pad_pixels(picture, 128) for picture in pictures]),
        torch.tensor([picture.shape[:2] for picture in pictures]),
    )
    predictor = SamPredictor(sam)
    for image, embedding in zip(images, batch, strict=True):
        predictor.set_image(image)
        torch.testing.assert_close(embedding[None], predictor.get_image_embedding(), atol=1e-5, rtol=0)


def test_digest_is_of_the_weights_alone(tmp_path: Path) -> None:
    sam = load_teacher("toy", None, 128)
    digest = weights_sha256(sam)
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight[0, 0] += 1e-6
    assert weights_sha256(sam) != digest


@pytest.fixture(scope="module")
def vit_b_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return sam_model_registry["vit_b"]().state_dict()


@pytest.mark.parametrize("wrap", ["bare", "model", "ddp"])
def test_checkpoints_in_segment_anythings_layout_load(
    wrap: str, vit_b_state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    content: dict = vit_b_state
    if wrap == "model":
        content = {"model": vit_b_state, "epoch": 3}
    if wrap == "ddp":
        content = {f"module.{name}": tensor for name, tensor in vit_b_state.items()}
    torch.save(content, tmp_path / "sam.pth")
    before = torch.random.get_rng_state()
    sam = load_teacher("vit_b", str(tmp_path / "sam.pth"), 1024)
    assert torch.equal(torch.random.get_rng_state(), before)  # what training draws does not depend on it
    assert all(torch.equal(tensor, vit_b_state[name]) for name, tensor in sam.state_dict().items())
    assert not sam.training
    assert not any(parameter.requires_grad for parameter in sam.parameters())


def test_another_architectures_checkpoint_is_refused(tmp_path: Path) -> None:
    state = load_teacher("toy", None, 128).state_dict()
    torch.save(state, tmp_path / "toy.pth")
    with pytest.raises(InputError, match=r"toy\.pth holds a toy, not a vit_b: teacher\.name=toy takes it"):
        load_teacher("vit_b", str(tmp_path / "toy.pth"), 1024)
    del state["mask_decoder.iou_token.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"cut\.pth looks most like vit_b, but: 101 missing \(.*; 20 surplus"):
        load_teacher("vit_b", str(tmp_path / "cut.pth"), 1024)


@pytest.mark.parametrize("name", ["toy.pth", "toy.safetensors"])
def test_a_toys_checkpoint_loads_at_any_image_size(name: str, tmp_path: Path) -> None:
    sam = load_teacher("toy", None, 128)
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight += 1
    (save_file if name.endswith("safetensors") else torch.save)(sam.state_dict(), tmp_path / name)
    path = str(tmp_path / name)
    check_teacher("toy", path, 128)
    assert weights_sha256(load_teacher("toy", path, 128)) == weights_sha256(sam)
    larger = load_teacher("toy", path, 256)
    assert larger.image_encoder.img_size == 256
    assert torch.equal(larger.mask_decoder.iou_token.weight, sam.mask_decoder.iou_token.weight)
    found = inspect_teacher(path)
    assert (found.name, found.image_size, found.has_decoder) == ("toy", 128, True)


def test_a_checkpoint_of_another_name_is_refused(vit_b_state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(vit_b_state, tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"sam\.pth holds a vit_b, not a vit_h: teacher\.name=vit_b takes it"):
        load_teacher("vit_h", str(tmp_path / "sam.pth"), 1024)


def test_an_xl1_that_is_called_l0_is_refused(tmp_path: Path) -> None:
    shapes = architecture("efficientvit_sam_xl1").shapes
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "l0.pt")
    said = (
        r"l0\.pt holds a efficientvit_sam_xl1, not a efficientvit_sam_l0: teacher\.name=efficientvit_sam_xl1 takes it"
    )
    with pytest.raises(InputError, match=said):
        check_teacher("efficientvit_sam_l0", str(tmp_path / "l0.pt"), 1024)
    del shapes[next(name for name in shapes if "stages.5.op_list.6" in name)]
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, tmp_path / "cut.pt")
    with pytest.raises(InputError, match=r"cut\.pt looks most like efficientvit_sam_xl1, but: 1 missing"):
        check_teacher("efficientvit_sam_xl1", str(tmp_path / "cut.pt"), 1024)


PYRAMID = {"neck": "pyramid", "neck_depth": 1, "input_size": 64}


@pytest.mark.parametrize(
    ("name", "options", "dtype", "largest"),
    [
        ("tiny_vit_5m", {"downsample": "fuse"}, "float32", 1e-5),
        ("repvit_m1", {"downsample": "fuse"}, "bfloat16", 0.05),
        ("efficientvit_b0", PYRAMID, "float32", 1e-5),
        ("efficientvit_l0", PYRAMID, "bfloat16", 0.05),
    ],
)
def test_a_student_teaches(name: str, options: dict, dtype: str, largest: float, tmp_path: Path) -> None:
    """Fused, and at a precision: also one whose embedding comes from several stages."""
    student = create_student(name, 128, 64, **options).eval()
    save_student(tmp_path / "student.safetensors", student, {})
    sam = load_teacher("student", str(tmp_path / "student.safetensors"), 128)
    assert cache_identity(
        sam, "student", teacher_dtype=dtype, dtype="float16", jpeg_quality=95, images="x", fraction=1.0
    ).embedding_shape == (64, 8, 8)
    pixels, sizes = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8), torch.tensor([[128, 128]] * 2)
    found = TeacherEncoder(sam, torch.device("cpu"), dtype)(pixels, sizes)
    with torch.no_grad():
        expected = student(to_encoder_input(pixels, sizes))
    assert (found - expected).norm() / expected.norm() < largest
    with pytest.raises(InputError, match=r"student\.safetensors works at image_size=128, not 256"):
        load_teacher("student", str(tmp_path / "student.safetensors"), 256)


@pytest.fixture(scope="module")
def vit_b_at_128_px(vit_b_state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ViT-B as it is after it was fine-tuned at 128 px: 8 × 8 cells, and every position drawn."""
    torch.manual_seed(1)
    state = {**vit_b_state, "image_encoder.pos_embed": torch.randn(1, 8, 8, 768) / 8}
    for name, tensor in vit_b_state.items():
        if "rel_pos" in name:
            everywhere = re.search(r"blocks\.(2|5|8|11)\.", name)
            state[name] = torch.randn(15, 64) / 8 if everywhere else torch.randn(tensor.shape) / 8
    return state


def test_a_vit_of_another_image_size_teaches_at_that_size(
    vit_b_at_128_px: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({"model": vit_b_at_128_px, "epoch": 30}, tmp_path / "medical.pth")
    check_teacher("vit_b", str(tmp_path / "medical.pth"), 128)
    sam = load_teacher("vit_b", str(tmp_path / "medical.pth"), 128)
    assert sam.prompt_encoder.input_image_size == (128, 128)
    encoder = ImageEncoderViT(
        img_size=128,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(2, 5, 8, 11),
    ).eval()
    prefix = "image_encoder."
    encoder.load_state_dict({n.removeprefix(prefix): t for n, t in vit_b_at_128_px.items() if n.startswith(prefix)})
    pixels, sizes = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8), torch.tensor([[128, 128]])
    with torch.no_grad():
        expected = encoder(to_encoder_input(pixels, sizes))
    found = TeacherEncoder(sam, torch.device("cpu"))(pixels, sizes)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("holds", "asked"), [(128, 1024), (128, 512), (1024, 512)])
def test_another_image_size_than_the_checkpoints_is_refused_beforehand(
    holds: int,
    asked: int,
    vit_b_state: dict[str, torch.Tensor],
    vit_b_at_128_px: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    state = vit_b_at_128_px if holds == 128 else vit_b_state
    torch.save({name: torch.zeros(1).expand(tensor.shape) for name, tensor in state.items()}, tmp_path / "sam.pth")
    for refuse in (check_teacher, load_teacher):
        with pytest.raises(InputError, match=rf"sam\.pth works at image_size={holds}, not {asked}$"):
            refuse("vit_b", str(tmp_path / "sam.pth"), asked)


def test_a_directory_of_transformers_is_a_teachers_checkpoint(tmp_path: Path) -> None:
    layout = json.loads((ROOT / "tests" / "data" / "hugging_face" / "sam_vit_b.json").read_text())["tensors"]
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in layout.items()}, tmp_path / "pytorch_model.bin")
    check_teacher("vit_b", str(tmp_path), 1024)
    with pytest.raises(InputError, match=r"works at image_size=1024, not 256$"):
        check_teacher("vit_b", str(tmp_path), 256)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)

    def __init__(self, path: Path) -> None:
        self.path = path


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="holds more than tensors: not loaded"):
        load_teacher("vit_b", str(tmp_path / "evil.pth"), 1024)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"PK\x03\x04 not a zip", b"hello world", b"error: not found"]
)
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pth is not a checkpoint"):
        load_teacher("vit_b", str(tmp_path / "x.pth"), 1024)


@pytest.mark.parametrize("content", [torch.zeros(3), {1: torch.zeros(3)}, {"weight": 3}])
def test_other_contents_are_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        load_teacher("vit_b", str(tmp_path / "x.pth"), 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit_h", None, 1024), r"teacher vit_h needs its weights: teacher\.checkpoint=FILE"),
        (("vit_h", "nowhere.pth", 1024), r"teacher\.checkpoint=nowhere\.pth: no such file"),
        (("vit_b", "nowhere.pth", 512), "works at image_size=1024"),
        (("toy", "nowhere.pth", 256), r"teacher\.checkpoint=nowhere\.pth: no such file"),
        (("toy", None, 250), "image_size=250 is not a multiple of 16"),
    ],
)
def test_what_cannot_be_loaded_is_said_beforehand(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_teacher(*arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("mask_decoder.iou_token.weight"), r"1 missing \(mask_decoder\.iou_token\.weight\)"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 surplus \(extra\)"),
        (
            lambda state: state.update({"image_encoder.pos_embed": torch.zeros(1).expand(1, 9999, 9999, 192)}),
            "holds no toy teacher: .* of another shape",
        ),
        (
            lambda state: state.update({"image_encoder.pos_embed": torch.zeros(1, 0, 0, 192)}),
            "holds no toy teacher: .* of another shape",
        ),
        (lambda state: state.clear(), "holds no"),
    ],
)
def test_what_is_no_toy_is_refused(change: Callable[[dict], object], said: str, tmp_path: Path) -> None:
    state = load_teacher("toy", None, 128).state_dict()
    change(state)
    torch.save(state, tmp_path / "toy.pth")
    with pytest.raises(InputError, match=said):
        check_teacher("toy", str(tmp_path / "toy.pth"), 128)
