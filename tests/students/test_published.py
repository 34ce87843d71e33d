"""Published students load here, and compute what their publishers' own code computes."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor

from embeddings_cache.images.scenes import generate_scene
from published import image_by_rule, read_peer, repvit_of_the_paper, weights_by_rule
from students import (
    PUBLISHED,
    InputError,
    architecture_of,
    build_encoder,
    create_student,
    load_checkpoint,
    save_published,
    save_student,
)
from students.sam import untrained_sam

NUMBERS = {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
MORE = "is not a checkpoint, or holds more than tensors: not loaded"
STUDENTS = {
    "mobile_sam": "tiny_vit_5m", "repvit_sam": "repvit_m2_3", "edge_sam": "repvit_m1",
    "efficientvit_sam_l0": "efficientvit_l0", "efficientvit_sam_l1": "efficientvit_l1",
    "efficientvit_sam_xl0": "efficientvit_xl0",
}  # fmt: skip
SLOW = ("repvit_sam", "efficientvit_sam_l1", "efficientvit_sam_xl0")
PEERS = [pytest.param(peer, marks=pytest.mark.slow if peer in SLOW else ()) for peer in STUDENTS]


@pytest.fixture(scope="module")
def decoder() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return untrained_sam(torch.nn.Identity()).state_dict()


@pytest.mark.parametrize("peer", PEERS)
@torch.no_grad()
def test_outputs_are_the_publishers_own(peer: str, decoder: dict[str, torch.Tensor], tmp_path: Path) -> None:
    expected = read_peer(peer)
    torch.save({**weights_by_rule(expected), **decoder}, tmp_path / "peer.pt")
    assert architecture_of(tmp_path / "peer.pt") == peer
    sam = load_checkpoint(tmp_path / "peer.pt")
    assert sam.image_encoder.config.name == STUDENTS[peer]
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in sam.state_dict().items() if name in decoder)
    image, values = image_by_rule(expected), torch.tensor(expected["sample_value"])
    native = sam.image_encoder.native()
    assert native.img_size == image.shape[-1]
    for encoder in (native, native.fused()):
        found = encoder(image)
        assert list(found.shape) == expected["output_shape"]
        torch.testing.assert_close(found.flatten()[expected["sample_index"]], values, atol=2e-4, rtol=0)
        assert found.mean().item() == pytest.approx(expected["output_mean"], abs=1e-4)
        assert found.std().item() == pytest.approx(expected["output_std"], abs=1e-4)


@pytest.mark.parametrize("peer", ["efficientvit_sam_l0", pytest.param("efficientvit_sam_l1", marks=pytest.mark.slow)])
@torch.no_grad()
def test_efficientvits_samples_are_met_to_rounding_with_their_epsilon(peer: str, tmp_path: Path) -> None:
    """They were computed with batch norms' usual epsilon; the publishers' loader sets 1e-6, as the weights need it."""
    expected = read_peer(peer)
    torch.save(weights_by_rule(expected), tmp_path / "peer.pt")
    encoder = load_checkpoint(tmp_path / "peer.pt").image_encoder.native()
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-6}
    for norm in norms:
        norm.eps = 1e-5
    found = encoder(image_by_rule(expected)).flatten()[expected["sample_index"]]
    torch.testing.assert_close(found, torch.tensor(expected["sample_value"]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_segment_anythings_own_classes_take_it(decoder: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """EdgeSAM's layout in the predictor, with every kind of prompt, and in the mask generator with crops."""
    peer = read_peer("edge_sam")
    torch.save({**weights_by_rule(peer), **decoder}, tmp_path / "edge_sam.pth")
    sam = load_checkpoint(str(tmp_path / "edge_sam.pth"))
    image = generate_scene(np.random.default_rng(5), 200)[0]
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    points, box = (np.array([[60, 50]]), np.array([1])), np.array([20, 20, 90, 90])
    masks, ious, low_res = predictor.predict(*points, box=box)
    assert masks.shape == (3, *image.shape[:2])
    assert np.isfinite(ious).all()
    again, _, _ = predictor.predict(*points, mask_input=low_res[:1], multimask_output=False)
    assert again.shape == (1, *image.shape[:2])
    records = SamAutomaticMaskGenerator(
        sam, points_per_side=2, pred_iou_thresh=-10.0, stability_score_thresh=0.0, crop_n_layers=1
    ).generate(image)
    assert records
    assert all(record["segmentation"].shape == image.shape[:2] for record in records)


@torch.no_grad()
def test_repvit_sam_is_the_papers(tmp_path: Path) -> None:
    """And not only the publishers': a second reading, in float64."""
    peer = read_peer("repvit_sam")
    weights = weights_by_rule(peer)
    torch.save(weights, tmp_path / "repvit_sam.pt")
    encoder = load_checkpoint(tmp_path / "repvit_sam.pt").image_encoder.double()
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).double()
    weights = {name: tensor.double() for name, tensor in weights.items()}
    expected = repvit_of_the_paper(weights, image)
    assert (repvit_of_the_paper(weights, image.flip(3)) - expected).abs().mean() > 0.1
    torch.testing.assert_close(encoder(image), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(encoder.fused()(image), expected, atol=2e-3, rtol=0)  # folded in float32


@pytest.mark.parametrize("peer", PEERS)
@torch.no_grad()
def test_a_student_goes_to_its_publishers_code_and_back(peer: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = build_encoder(PUBLISHED[peer])
    student(torch.randn(2, 3, 64, 64))  # moves the batch statistics away from their start
    donor = untrained_sam(torch.nn.Identity())
    save_published(tmp_path / "there.pt", student, donor)
    written = torch.load(tmp_path / "there.pt", weights_only=True)
    layout = {key: list(tensor.shape) for key, tensor in written.items() if key.startswith("image_encoder.")}
    assert layout == read_peer(peer)["layout"]
    assert all(torch.equal(tensor, written[key]) for key, tensor in donor.state_dict().items())
    assert architecture_of(tmp_path / "there.pt") == peer
    back = load_checkpoint(tmp_path / "there.pt").image_encoder
    assert back.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in student.state_dict().items())


@pytest.mark.parametrize("config", [("repvit_m1_1", "stride1"), ("repvit_m0_9", "fuse"), ("tiny_vit_11m", "fuse")])
def test_other_sizes_of_theirs_load_as_well(config: tuple[str, str], tmp_path: Path) -> None:
    student = create_student(config[0], downsample=config[1])
    save_published(tmp_path / "s.pt", student, untrained_sam(torch.nn.Identity()))
    assert architecture_of(tmp_path / "s.pt") == config[0] + ("-fuse" if config[1] == "fuse" else "")
    found = load_checkpoint(tmp_path / "s.pt").image_encoder
    assert found.config == student.config
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in student.state_dict().items())


def test_without_a_decoder_there_are_embeddings_and_no_masks(tmp_path: Path) -> None:
    save_student(tmp_path / "student.safetensors", create_student("repvit_m0_9", 128, **NUMBERS), {})
    assert architecture_of(tmp_path / "student.safetensors") == "student"
    predictor = SamPredictor(load_checkpoint(tmp_path / "student.safetensors"))
    predictor.set_image(np.zeros((90, 120, 3), np.uint8))
    assert predictor.get_image_embedding().shape == (1, 256, 8, 8)
    with pytest.raises(InputError, match=r"student\.safetensors holds an image encoder alone; build_student_sam"):
        predictor.predict(np.array([[60, 50]]), np.array([1]))


class Code:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def compressed(path: Path) -> None:
    """A zip of 30 kB that unpacks to 30 MB."""
    torch.save({"x": torch.zeros(30 << 18)}, path)
    with zipfile.ZipFile(path) as stored:
        members = {info.filename: stored.read(info) for info in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in members.items():
            bomb.writestr(name, content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda path: path.write_bytes(b""), "is not a checkpoint"),
        (lambda path: path.write_text("<!doctype html><title>404</title>"), "is not a checkpoint"),
        (lambda path: torch.save({"model": Code(path.parent / "ran")}, path), MORE),
        (lambda path: path.write_bytes(pickle.dumps(Code(path.parent / "ran"), 2)), MORE),
        (compressed, "is compressed, as no checkpoint is: 31,4.* bytes unpacked; not loaded"),
        (
            lambda path: torch.save({"weight": torch.eye(3).to_sparse()}, path),
            "holds sparse, quantized, complex or empty",
        ),
        (lambda path: torch.save({"a\n\x1b[2Jb": torch.zeros(3)}, path), r"holds no SAM .*\(a\\n\\x1b\[2Jb\)"),
        (lambda path: torch.save({"weight": 3}, path), "holds no state dict"),
        (
            lambda path: torch.save({"weight": torch.zeros(3)}, path),
            r"holds no SAM that is known: 1 tensors \(weight\)",
        ),
    ],
)
def test_files_from_strangers_are_refused_in_a_line(
    content: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "stranger.pt"
    content(path)
    with pytest.raises(InputError, match=rf"stranger\.pt {said}") as refused:
        load_checkpoint(path)
    assert str(refused.value).isprintable()
    assert not (tmp_path / "ran").exists()


def test_one_compressed_member_is_enough_to_refuse(decoder: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Mapped into memory it would be read as weights."""
    torch.save(decoder, tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, zipfile.ZipFile(tmp_path / "mixed.pt", "w") as mixed:
        for number, info in enumerate(stored.infolist()):
            mixed.writestr(info.filename, stored.read(info), zipfile.ZIP_STORED if number else zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"mixed\.pt is compressed"):
        load_checkpoint(tmp_path / "mixed.pt")


def test_loading_leaves_the_seed_alone(tmp_path: Path) -> None:
    save_student(tmp_path / "student.safetensors", create_student("tiny_vit_5m", 128), {})
    save_published(tmp_path / "mobile_sam.pt", create_student("tiny_vit_5m"), untrained_sam(torch.nn.Identity()))
    before = torch.random.get_rng_state()
    for name in ("student.safetensors", "mobile_sam.pt"):
        load_checkpoint(tmp_path / name)
        assert torch.equal(torch.random.get_rng_state(), before)


def test_what_differs_is_named(decoder: dict[str, torch.Tensor], tmp_path: Path) -> None:
    layout = {name: torch.zeros(shape) for name, shape in read_peer("mobile_sam")["layout"].items()}
    key = "image_encoder.neck.0.weight"
    for change, said in (
        ({key: torch.zeros(256, 319, 1, 1)}, rf"{key} is \[256, 319, 1, 1\], not \[256, 320, 1, 1\]"),
        ({key: None}, rf"1 missing \({key}\)"),
        (
            {"class_head.weight": torch.zeros(9, 9), "mask_decoder.iou_token.weight": None, key: None},
            rf"2 missing \({key}, mask_decoder\.iou_token\.weight\); 1 surplus \(class_head\.weight\)",
        ),
        ({"mask_decoder.iou_token.weight": None}, r"1 missing \(mask_decoder\.iou_token\.weight\)"),
    ):
        state = {name: tensor for name, tensor in {**layout, **decoder, **change}.items() if tensor is not None}
        torch.save(state, tmp_path / "tuned.pt")
        with pytest.raises(InputError, match=rf"tuned\.pt looks most like mobile_sam, but: {said}$"):
            load_checkpoint(tmp_path / "tuned.pt")
