"""SAMs in transformers' layout: told by the names that it gave them itself, and computing what it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from students import InputError, create_student, identify, inspect_checkpoint, load_checkpoint, save_hugging_face
from students.hugging_face import from_hugging_face
from students.sam import encoder_only_sam, untrained_sam
from support import ROOT

State = dict[str, torch.Tensor]
POSITIONS = "shared_image_embedding.positional_embedding"
SAME_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
KNOWN = {
    "vision_encoder.pos_embed": "image_encoder.pos_embed",
    "vision_encoder.patch_embed.projection.bias": "image_encoder.patch_embed.proj.bias",
    "vision_encoder.layers.11.layer_norm1.weight": "image_encoder.blocks.11.norm1.weight",
    "vision_encoder.layers.3.layer_norm2.bias": "image_encoder.blocks.3.norm2.bias",
    "vision_encoder.layers.2.attn.rel_pos_h": "image_encoder.blocks.2.attn.rel_pos_h",
    "vision_encoder.layers.0.mlp.lin1.weight": "image_encoder.blocks.0.mlp.lin1.weight",
    "vision_encoder.neck.conv1.weight": "image_encoder.neck.0.weight",
    "vision_encoder.neck.layer_norm1.weight": "image_encoder.neck.1.weight",
    "vision_encoder.neck.conv2.weight": "image_encoder.neck.2.weight",
    "vision_encoder.neck.layer_norm2.bias": "image_encoder.neck.3.bias",
    POSITIONS: "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.point_embed.3.weight": "prompt_encoder.point_embeddings.3.weight",
    "prompt_encoder.not_a_point_embed.weight": "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.mask_embed.conv1.weight": "prompt_encoder.mask_downscaling.0.weight",
    "prompt_encoder.mask_embed.layer_norm1.weight": "prompt_encoder.mask_downscaling.1.weight",
    "prompt_encoder.mask_embed.conv2.weight": "prompt_encoder.mask_downscaling.3.weight",
    "prompt_encoder.mask_embed.layer_norm2.weight": "prompt_encoder.mask_downscaling.4.weight",
    "prompt_encoder.mask_embed.conv3.bias": "prompt_encoder.mask_downscaling.6.bias",
    "mask_decoder.transformer.layers.1.layer_norm4.weight": "mask_decoder.transformer.layers.1.norm4.weight",
    "mask_decoder.transformer.layer_norm_final_attn.bias": "mask_decoder.transformer.norm_final_attn.bias",
    "mask_decoder.upscale_conv1.weight": "mask_decoder.output_upscaling.0.weight",
    "mask_decoder.upscale_layer_norm.bias": "mask_decoder.output_upscaling.1.bias",
    "mask_decoder.upscale_conv2.bias": "mask_decoder.output_upscaling.3.bias",
    "mask_decoder.output_hypernetworks_mlps.2.proj_in.bias": "mask_decoder.output_hypernetworks_mlps.2.layers.0.bias",
    "mask_decoder.output_hypernetworks_mlps.2.layers.0.bias": "mask_decoder.output_hypernetworks_mlps.2.layers.1.bias",
    "mask_decoder.output_hypernetworks_mlps.2.proj_out.bias": "mask_decoder.output_hypernetworks_mlps.2.layers.2.bias",
    "mask_decoder.iou_prediction_head.proj_in.bias": "mask_decoder.iou_prediction_head.layers.0.bias",
    "mask_decoder.iou_prediction_head.layers.0.bias": "mask_decoder.iou_prediction_head.layers.1.bias",
    "mask_decoder.iou_prediction_head.proj_out.bias": "mask_decoder.iou_prediction_head.layers.2.bias",
}
"""Names of one tensor in transformers and in segment-anything, each kind once, as transformers' documentation and a
reading of both models' code give them."""


@pytest.fixture(scope="module")
def layout() -> dict[str, list[int]]:
    """Names and shapes that transformers itself wrote for a ViT-B."""
    return json.loads((ROOT / "tests" / "data" / "hugging_face" / "sam_vit_b.json").read_text())["tensors"]


@pytest.fixture(scope="module")
def hollow(layout: dict[str, list[int]]) -> State:
    """A whole SAM in transformers' layout; each tensor is one number, which no other is."""
    state = {name: torch.tensor([n / 1024]).expand(shape) for n, (name, shape) in enumerate(layout.items())}
    return {**state, SAME_POSITIONS: state[POSITIONS]}


def test_it_is_the_sam_that_it_is(hollow: State, tmp_path: Path) -> None:
    """From the directory, and every tensor in its place."""
    torch.save(hollow, tmp_path / "pytorch_model.bin")
    sam = load_checkpoint(tmp_path)
    found = sam.state_dict()
    for theirs, ours in KNOWN.items():
        assert torch.equal(found[ours], hollow[theirs]), theirs
    numbers = [tensor.flatten()[0].item() for tensor in found.values()]
    assert len(set(numbers)) == len(numbers)
    assert len(numbers) == len(hollow) - 1


@pytest.mark.parametrize(("left_out", "prefix"), [(POSITIONS, ""), (SAME_POSITIONS, "model."), (None, "module.sam.")])
def test_either_copy_of_the_positions_is_enough(
    left_out: str | None, prefix: str, hollow: State, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    torch.save({prefix + name: tensor for name, tensor in hollow.items() if name != left_out}, path)
    assert identify(path) == ("vit_b", True)


def test_copies_of_the_positions_that_differ_are_no_sam(hollow: State, tmp_path: Path) -> None:
    torch.save({**hollow, SAME_POSITIONS: torch.ones(2, 128)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"is no SAM: {POSITIONS} and {SAME_POSITIONS} differ"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", ["", "vision_encoder."])
def test_the_encoder_alone(prefix: str, hollow: State, tmp_path: Path) -> None:
    """As `SamVisionModel` is saved, and as its encoder's own state dict."""
    names = [name for name in hollow if name.startswith("vision_encoder.")]
    torch.save({prefix + n.removeprefix("vision_encoder."): hollow[n] for n in names}, tmp_path / "pytorch_model.bin")
    assert identify(tmp_path) == ("vit_b", False)


def test_sam_hq_of_transformers_is_an_encoder_alone(hollow: State, tmp_path: Path) -> None:
    torch.save({**hollow, "mask_decoder.hq_token.weight": torch.zeros(1, 256)}, tmp_path / "pytorch_model.bin")
    assert "(mask_decoder.hq_token.weight) beside it are not SAM's own" in inspect_checkpoint(tmp_path).left_out


def test_slimmer_ones_are_refused_by_what_differs(hollow: State, tmp_path: Path) -> None:
    slim = {**hollow, "vision_encoder.neck.conv1.weight": torch.zeros(1).expand(256, 168, 1, 1)}
    torch.save(slim, tmp_path / "pytorch_model.bin")
    expected = r"looks most like vit_b, but: image_encoder\.neck\.0\.weight is \[256, 168, 1, 1\]"
    with pytest.raises(InputError, match=expected):
        load_checkpoint(tmp_path)


def small_sam(image_size: int = 64) -> Sam:
    """segment-anything's classes with few channels, and every weight drawn."""
    torch.manual_seed(2)
    cells = image_size // 16
    sam = Sam(
        ImageEncoderViT(
            img_size=image_size,
            embed_dim=32,
            depth=3,
            num_heads=4,
            mlp_ratio=2,
            out_chans=16,
            norm_layer=lambda channels: torch.nn.LayerNorm(channels, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        PromptEncoder(16, (cells, cells), (image_size, image_size), mask_in_chans=8),
        MaskDecoder(transformer_dim=16, transformer=TwoWayTransformer(2, 16, 4, 24), iou_head_hidden_dim=20),
    )
    for parameter in sam.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sam.eval()


def test_what_is_written_has_transformers_names(layout: dict[str, list[int]], tmp_path: Path) -> None:
    sam = small_sam()
    save_hugging_face(tmp_path / "sam", sam)
    written = load_file(tmp_path / "sam" / "model.safetensors")
    # Of as many layers as the small one has.
    deeper = tuple(f"vision_encoder.layers.{number}." for number in range(3, 12))
    assert written.keys() == {name for name in layout if not name.startswith(deeper)} | {SAME_POSITIONS}
    ours = sam.state_dict()
    back = from_hugging_face(written, "it")
    assert back.keys() == ours.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.items())
    config = json.loads((tmp_path / "sam" / "config.json").read_text())
    assert config["vision_config"]["global_attn_indexes"] == [1]
    assert config["mask_decoder_config"]["iou_head_hidden_dim"] == 20


def test_what_transformers_has_no_class_for_is_not_written(tmp_path: Path) -> None:
    student = create_student("repvit_m0_9", 64, widths=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    with pytest.raises(InputError, match="SamModel has SAM's own image encoder"):
        save_hugging_face(tmp_path / "sam", untrained_sam(student, 64))
    with pytest.raises(InputError, match="x holds an image encoder alone"):
        save_hugging_face(tmp_path / "sam", encoder_only_sam(small_sam().image_encoder, "x"))
    assert not (tmp_path / "sam").exists()


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that let the image through, positions included, which both libraries leave at zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            scale = 0.02 if "pos" in name else parameter[0].numel() ** -0.5
            parameter.data = values * scale
        else:
            parameter.data = (1.0 if name.endswith("weight") else 0.0) + 0.1 * values
    return model.eval()


@torch.no_grad()
def assert_equal_outputs(theirs: Any, ours: Sam, prompt: str, of_masks: float = 1e-4) -> None:
    """transformers' `SamModel` and segment-anything's `Sam` make the same embeddings, masks and IoUs of an image."""
    size = ours.image_encoder.img_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(7))
    points = torch.tensor([[[size * 0.3, size * 0.4], [size * 0.6, size * 0.7]]])
    labels, boxes = torch.tensor([[1, 0]]), torch.tensor([[size * 0.1, size * 0.2, size * 0.8, size * 0.9]])
    embedding = ours.image_encoder(image)
    assert embedding.std() > 0.05
    torch.testing.assert_close(theirs.get_image_embeddings(image), embedding, atol=1e-4, rtol=0)
    if prompt == "points":
        given: dict[str, Any] = {"input_points": points[None], "input_labels": labels[None]}
        sparse, dense = ours.prompt_encoder((points, labels), None, None)
    else:
        given = {"input_boxes": boxes[None]}
        sparse, dense = ours.prompt_encoder(None, boxes, None)
    found = theirs(pixel_values=image, **given)
    pe = ours.prompt_encoder.get_dense_pe()
    masks, ious = ours.mask_decoder(embedding, pe, sparse, dense, multimask_output=True)
    assert masks.std() > 0.01
    torch.testing.assert_close(found.pred_masks[0], masks, atol=of_masks, rtol=0)
    torch.testing.assert_close(found.iou_scores[0], ious, atol=of_masks, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["points", "boxes"])
@pytest.mark.parametrize("image_size", [64, 128])
def test_transformers_computes_the_same_of_what_is_written(image_size: int, prompt: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sam = drawn(small_sam(image_size))
    save_hugging_face(tmp_path, sam)
    model, loading = transformers.SamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_outputs(model.eval(), sam, prompt)
    processor = transformers.SamImageProcessor.from_pretrained(tmp_path)
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    pixels = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"])
    assert pixels.shape == (1, 3, image_size, image_size)
    assert (pixels[..., -1, :] == 0).all()  # padding, after the normalisation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shards", "epsilon", "of_masks"), [(False, 1e-5, 1e-4), (True, 1e-5, 1e-4), (False, 1e-6, 1e-3)]
)
def test_what_transformers_wrote_computes_the_same_here(
    shards: bool, epsilon: float, of_masks: float, tmp_path: Path
) -> None:
    """A ViT-B, at an image size at which it takes a second; up to the epsilon that transformers has by default."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(image_size=256).to_dict(),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(image_size=256).to_dict(),
        mask_decoder_config=transformers.SamMaskDecoderConfig(layer_norm_eps=epsilon).to_dict(),
    )
    theirs = drawn(transformers.SamModel(config))
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "100MB"} if shards else {}))
    assert (tmp_path / "model.safetensors").exists() is not shards
    given = tmp_path if shards else tmp_path / "model.safetensors"
    found = inspect_checkpoint(given)
    assert (found.name, found.image_size, found.has_decoder) == ("vit_b", 256, True)
    assert_equal_outputs(theirs, load_checkpoint(given), "points", of_masks)


@pytest.mark.slow
def test_the_recorded_layout_is_transformers_own(layout: dict[str, list[int]], tmp_path: Path) -> None:
    """And a ViT-B of segment-anything goes there and comes back."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.SamModel(transformers.SamConfig()).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in theirs.items()}
    assert {**layout, SAME_POSITIONS: layout[POSITIONS]} == {**shapes, SAME_POSITIONS: shapes[POSITIONS]}
    torch.manual_seed(0)
    sam = sam_model_registry["vit_b"]()
    save_hugging_face(tmp_path, sam)
    model, loading = transformers.SamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vision_config.global_attn_indexes == [2, 5, 8, 11]
    back = load_checkpoint(tmp_path).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in sam.state_dict().items())
