"""Published students on the command line: as a teacher, and as what a student of ours becomes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from segment_anything import SamPredictor, sam_model_registry

from distill.main import main
from distill.recipe import load_recipe
from embeddings_cache.images.scenes import write_scene_tar
from embeddings_cache.shards.format import read_info
from embeddings_cache.shards.reader import EmbeddingsCache
from embeddings_cache.teacher.loading import load_teacher
from published import read_peer, weights_by_rule
from students import create_student, load_checkpoint, save_published, save_student
from students.sam import untrained_sam


@pytest.fixture(scope="module")
def mobile_sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    peer = read_peer("mobile_sam")
    path = tmp_path_factory.mktemp("published") / "mobile_sam.pt"
    torch.manual_seed(3)
    decoder = untrained_sam(torch.nn.Identity()).state_dict()
    torch.save({**weights_by_rule(peer), **decoder}, path)
    return path


@pytest.mark.slow
def test_mobile_sam_teaches(mobile_sam: Path, tmp_path: Path) -> None:
    """A recipe for ViT-H, with nothing but another checkpoint."""
    tar = tmp_path / "scenes.tar"
    write_scene_tar(tar, range(2), 300)
    arguments = ["recipe=repvit_m0_9", f"teacher.checkpoint={mobile_sam}", f"data.images={tar}", "data.fraction=1.0"]
    arguments += [f"cache.dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}", "stage=precompute"]
    assert main(arguments) == 0
    assert read_info(tmp_path / "cache").identity.teacher_name == "mobile_sam"
    predictor = SamPredictor(load_checkpoint(mobile_sam))
    for row in EmbeddingsCache(tmp_path / "cache"):
        predictor.set_image(row.pixels())
        expected = predictor.get_image_embedding()[0].numpy()
        np.testing.assert_allclose(row.embedding.astype(np.float32), expected, atol=4e-3)


def test_a_name_on_the_command_line_counts_for_more(mobile_sam: Path) -> None:
    arguments = ["recipe=repvit_m2_3", f"teacher.checkpoint={mobile_sam}"]
    assert load_recipe(arguments).teacher.name == "mobile_sam"
    assert load_recipe([*arguments, "teacher.name=vit_h"]).teacher.name == "vit_h"
    assert load_recipe(["recipe=repvit_m2_3", "teacher.checkpoint=nowhere.pth"]).teacher.name == "vit_h"


def test_a_wrong_file_of_imagenet_weights_is_seen_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imagenet = tmp_path / "imagenet.pth"
    arguments = ["recipe=quickstart", f"student.pretrained={imagenet}", f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, f"cache.dir={tmp_path / 'cache'}"]) == 2
    assert "imagenet.pth: no such file" in capsys.readouterr().err
    imagenet.write_text("words")
    assert main([*arguments, f"cache.dir={tmp_path / 'cache'}"]) == 2
    assert "imagenet.pth is not a checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [imagenet]


def test_other_sizes_teach(tmp_path: Path) -> None:
    save_published(tmp_path / "s.pt", create_student("repvit_m0_9"), untrained_sam(torch.nn.Identity()))
    assert load_recipe(["recipe=repvit_m2_3", f"teacher.checkpoint={tmp_path / 's.pt'}"]).teacher.name == "repvit_m0_9"
    assert load_teacher("repvit_m0_9", str(tmp_path / "s.pt"), 1024).image_encoder.config.name == "repvit_m0_9"


def test_convert(mobile_sam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = create_student("tiny_vit_5m")
    student(torch.randn(2, 3, 64, 64))  # moves the batch statistics away from their start
    save_student(tmp_path / "student.safetensors", student, {})
    arguments = ["recipe=tiny_vit_5m", f"teacher.checkpoint={mobile_sam}", f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, f"checkpoint={tmp_path / 'student.safetensors'}", "stage=convert"]) == 0
    converted = tmp_path / "run" / "export" / "mobile_sam.pt"
    assert f"convert: {converted}" in capsys.readouterr().out
    tensors, teacher = torch.load(converted, weights_only=True), torch.load(mobile_sam, weights_only=True)
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: t.shape for k, t in teacher.items()}
    assert all(torch.equal(t, tensors[key]) for key, t in teacher.items() if not key.startswith("image_encoder."))
    found = load_checkpoint(converted).image_encoder.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in student.state_dict().items())


def test_a_sam_becomes_one_that_transformers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own decoder, and whatever image size it was fine-tuned at."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in sam_model_registry["vit_b"]().state_dict().items()}
    shapes["image_encoder.pos_embed"] = torch.Size((1, 32, 32, 768))
    shapes |= {f"image_encoder.blocks.{n}.attn.rel_pos_{s}": torch.Size((63, 64)) for n in (2, 5, 8, 11) for s in "hw"}
    state = {name: torch.tensor([n / 1024]).expand(shape) for n, (name, shape) in enumerate(shapes.items())}
    torch.save({"model": state, "epoch": 3}, tmp_path / "medical.pth")
    arguments = ["recipe=quickstart", f"checkpoint={tmp_path / 'medical.pth'}", f"run_dir={tmp_path / 'run'}"]
    assert main([*arguments, "stage=convert"]) == 0
    converted = tmp_path / "run" / "export" / "vit_b-transformers"
    assert f"convert: {converted}" in capsys.readouterr().out
    written = load_file(converted / "model.safetensors")
    # One of the decoder and one of the encoder; tests/students/test_hugging_face.py has all kinds.
    for ours, theirs in (
        ("image_encoder.blocks.7.norm2.bias", "vision_encoder.layers.7.layer_norm2.bias"),
        ("mask_decoder.iou_prediction_head.layers.2.weight", "mask_decoder.iou_prediction_head.proj_out.weight"),
    ):
        assert torch.equal(written[theirs], state[ours])
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "sam"
    assert config["vision_config"]["image_size"] == config["prompt_encoder_config"]["image_size"] == 512
    assert sorted(path.name for path in converted.parent.iterdir()) == ["vit_b-transformers"]


def test_what_transformers_has_no_place_for_is_not_converted(
    mobile_sam: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recipe=quickstart", f"run_dir={tmp_path / 'run'}", "stage=convert"]
    assert main([*arguments, f"checkpoint={mobile_sam}"]) == 2
    expected = "mobile_sam.pt cannot be converted: mobile_sam is in its publisher's layout, and transformers' SamModel"
    assert expected in capsys.readouterr().err
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in sam_model_registry["vit_b"]().state_dict().items()}
    shapes["mask_decoder.hf_token.weight"] = torch.Size((1, 256))
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, tmp_path / "hq.pth")
    assert main([*arguments, f"checkpoint={tmp_path / 'hq.pth'}"]) == 2
    expected = "hq.pth cannot be converted: its image encoder alone is used, for 1 tensors (mask_decoder.hf_token"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", [{"image_size": 512}, {"embed_dim": 128}, {"depths": [1, 1, 3, 1]}])
def test_students_of_other_numbers_have_no_published_layout(
    changed: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_student(tmp_path / "s.safetensors", create_student("repvit_m0_9", **changed), {})
    arguments = ["recipe=quickstart", f"run_dir={tmp_path / 'run'}", f"checkpoint={tmp_path / 's.safetensors'}"]
    assert main([*arguments, "stage=convert"]) == 2
    assert "s.safetensors cannot be converted: published are whole students" in capsys.readouterr().err


def test_a_teacher_without_decoder_makes_no_masks(
    scene_tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "student.safetensors"
    save_student(path, create_student("repvit_m0_9", 128, widths=[8, 16, 24, 32], depths=[1, 1, 1, 1]), {})
    arguments = ["recipe=quickstart", "image_size=128", f"teacher.checkpoint={path}"]
    assert main([*arguments, f"run_dir={tmp_path / 'all'}"]) == 2
    assert "student.safetensors holds an image encoder alone: it can teach" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    arguments.append(f"checkpoint={path}")
    assert load_recipe(arguments).teacher.name == "student"
    assert main([*arguments, f"run_dir={tmp_path / 'run'}", f"evaluate.data={scene_tar}", "stage=evaluate"]) == 2
    assert "student.safetensors holds an image encoder alone" in capsys.readouterr().err
