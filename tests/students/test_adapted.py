"""Fine-tuned SAMs: what was added to the decoder, to the encoder, and ViTs that work at another image size."""

import re
from pathlib import Path

import pytest
import torch

from students import InputError, inspect_checkpoint, left_out, load_checkpoint, untrained_sam
from students.architectures import SAM_IMAGE_SIZE, architecture, known_architectures, recognise
from students.layouts import PREFIX

State = dict[str, torch.Tensor]
SAM_HQ = {
    "mask_decoder.hf_token.weight": (1, 256),
    "mask_decoder.hf_mlp.layers.0.weight": (256, 256),
    "mask_decoder.compress_vit_feat.0.weight": (768, 256, 2, 2),
    "mask_decoder.embedding_maskfeature.0.weight": (64, 32, 3, 3),
}
"""Some of what SAM-HQ (arXiv:2306.01567) adds to the decoder."""


def zeros(shapes: dict[str, tuple[int, ...]]) -> State:
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def at_image_size(state: State, size: int) -> State:
    """A ViT-B's tables of positions for another number of cells."""
    cells = size // 16
    changed = {f"{PREFIX}pos_embed": (1, cells, cells, 768)}
    changed |= {f"{PREFIX}blocks.{n}.attn.rel_pos_{side}": (2 * cells - 1, 64) for n in (2, 5, 8, 11) for side in "hw"}
    return {**state, **{name: torch.full((1,), 0.25).expand(shape) for name, shape in changed.items()}}


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (SAM_HQ, r"4 tensors \(mask_decoder\.compress_vit_feat\.0\.weight, .*, \.\.\.\) beside it are not SAM's own"),
        ({"mask_decoder.adapter.weight": (8, 256)}, r"1 tensors \(mask_decoder\.adapter\.weight\) beside it"),
        ({"class_head.weight": (9, 9)}, r"1 tensors \(class_head\.weight\) beside it"),
        ({"mask_decoder.mask_tokens.weight": (10, 256)}, r"1 tensors \(mask_decoder\.mask_tokens\.weight\) beside it"),
    ],
)
def test_a_decoder_with_more_in_it_leaves_an_encoder_that_teaches(
    added: dict, said: str, hollow_vit_b: State, tmp_path: Path
) -> None:
    torch.save({**hollow_vit_b, **zeros(added)}, tmp_path / "tuned.pth")
    found = inspect_checkpoint(tmp_path / "tuned.pth")
    assert (found.name, found.image_size, found.has_decoder) == ("vit_b", 1024, False)
    assert re.match(rf"its image encoder alone is used, for {said}", found.left_out)


def test_what_is_left_out_is_said_by_the_sam_too(small_sam: State, tmp_path: Path) -> None:
    path = tmp_path / "tuned.pth"
    torch.save({**small_sam, **zeros(SAM_HQ)}, path)
    sam = load_checkpoint(path)
    with torch.no_grad():
        assert sam.image_encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 256, 8, 8)
    assert left_out(sam) == f"{path}: {inspect_checkpoint(path).left_out}"
    with pytest.raises(InputError, match=r"tuned\.pth: its image encoder alone is used, for .*; build_student_sam"):
        sam.prompt_encoder()


def test_without_one_of_the_two_parts_the_encoder_is_left(hollow_vit_b: State, tmp_path: Path) -> None:
    torch.save({name: t for name, t in hollow_vit_b.items() if not name.startswith("mask_d")}, tmp_path / "x.pth")
    found = inspect_checkpoint(tmp_path / "x.pth")
    assert found.left_out == "its image encoder alone is used, for it has no mask_decoder"


def test_nothing_is_said_of_what_has_nothing_else(small_sam: State, tmp_path: Path) -> None:
    torch.save({name: t for name, t in small_sam.items() if name.startswith(PREFIX)}, tmp_path / "encoder.pth")
    sam = load_checkpoint(tmp_path / "encoder.pth")
    assert left_out(sam) is None
    assert left_out(untrained_sam(sam.image_encoder)) is None
    with pytest.raises(InputError, match=r"encoder\.pth holds an image encoder alone; build_student_sam"):
        sam.mask_decoder()


@pytest.mark.parametrize("adapter", ["MLP_Adapter.D_fc1.weight", "prompt_generator.weight"])
def test_adapters_within_the_encoder_are_refused_as_such(adapter: str, hollow_vit_b: State, tmp_path: Path) -> None:
    name = f"{PREFIX}blocks.0.{adapter}"
    torch.save({**hollow_vit_b, name: torch.zeros(3)}, tmp_path / "adapted.pth")
    expected = rf"adapted\.pth is a vit_b with 1 tensors \({name}\) added to its encoder, which change what it computes"
    with pytest.raises(InputError, match=expected):
        load_checkpoint(tmp_path / "adapted.pth")


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        (
            "",
            ("image_encoder.blocks.0.attn.qkv.linear_a_q.weight", "image_encoder.blocks.0.attn.qkv.linear_b_v.weight"),
        ),
        ("base_model.model.", ("image_encoder.blocks.0.attn.qkv.lora_A.default.weight", "mask_decoder.lora_B.weight")),
        ("sam.", ("w_a_000", "w_b_000")),
        ("", ("w_As.0.weight", "w_Bs.0.weight")),
    ],
)
def test_lora_has_to_be_merged_first(prefix: str, names: tuple[str, str], hollow_vit_b: State, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in {**hollow_vit_b, **zeros(dict.fromkeys(names, (4, 4)))}.items()}
    torch.save(state, tmp_path / "lora.pth")
    with pytest.raises(InputError, match=r"lora\.pth holds LoRA's pairs, 2 tensors \(.*\): merge them into the"):
        load_checkpoint(tmp_path / "lora.pth")


def test_pairs_without_the_weights_are_lora_too(tmp_path: Path) -> None:
    torch.save({"w_a_000": torch.zeros(4, 768), "w_b_000": torch.zeros(768, 4)}, tmp_path / "lora.pth")
    with pytest.raises(InputError, match="holds LoRA's pairs"):
        load_checkpoint(tmp_path / "lora.pth")


@torch.no_grad()
def test_vit_b_at_512_px(hollow_vit_b: State, tmp_path: Path) -> None:
    state = at_image_size(hollow_vit_b, 512)
    torch.save(state, tmp_path / "medical.pth")
    sam = load_checkpoint(tmp_path / "medical.pth")
    assert sam.image_encoder.img_size == 512
    assert sam.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in sam.state_dict().items())
    sparse, dense = sam.prompt_encoder((torch.zeros(1, 1, 2), torch.ones(1, 1)), None, None)
    embedding = torch.zeros(1, 256, 32, 32)
    masks, _ = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, True)
    assert masks.shape == (1, 3, 128, 128)
    assert sam.prompt_encoder.input_image_size == (512, 512)


@pytest.mark.parametrize("size", [64, 960])
def test_any_multiple_of_64_px(size: int, hollow_vit_b: State, tmp_path: Path) -> None:
    torch.save(at_image_size(hollow_vit_b, size), tmp_path / "tuned.pth")
    found = inspect_checkpoint(tmp_path / "tuned.pth")
    assert (found.name, found.image_size, found.has_decoder) == ("vit_b", size, True)


@pytest.mark.parametrize("name", ["vit_l", "vit_h"])
def test_the_larger_ones_too(name: str, tmp_path: Path) -> None:
    torch.save(zeros(dict(architecture(name, 512).shapes)), tmp_path / "tuned.pth")
    found = inspect_checkpoint(tmp_path / "tuned.pth")
    assert (found.name, found.image_size) == (name, 512)


@pytest.mark.parametrize(
    ("size", "said"), [(480, r"is \[59, 64\], not \[127, 64\]"), (1 << 20, r"is \[131071, 64\], not \[127, 64\]")]
)
def test_sizes_that_no_student_has_are_refused(size: int, said: str, hollow_vit_b: State, tmp_path: Path) -> None:
    torch.save(at_image_size(hollow_vit_b, size), tmp_path / "tuned.pth")
    with pytest.raises(InputError, match=rf"tuned\.pth looks most like vit_b, but: .*rel_pos_h {said}"):
        load_checkpoint(tmp_path / "tuned.pth")


def test_positions_of_two_sizes_are_no_sam(hollow_vit_b: State, tmp_path: Path) -> None:
    mixed = {**hollow_vit_b, f"{PREFIX}pos_embed": torch.zeros(1).expand(1, 32, 32, 768)}
    torch.save(mixed, tmp_path / "mixed.pth")
    with pytest.raises(InputError, match=r"rel_pos_h is \[127, 64\], not \[63, 64\]"):
        load_checkpoint(tmp_path / "mixed.pth")


@pytest.mark.slow
def test_every_encoder_is_known_for_itself() -> None:
    """Also where a smaller one is within it, as EfficientViT-SAM's L0 is in L1, and which nothing was added to."""
    known = {name: architecture(name, SAM_IMAGE_SIZE).shapes for name in known_architectures()}
    within = [name for name, shapes in known.items() if any(each.items() < shapes.items() for each in known.values())]
    assert "efficientvit_sam_l1" in within
    for shapes in known.values():
        assert known[recognise(shapes, "it").name] == shapes
