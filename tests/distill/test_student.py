"""Which weights a student begins with."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from distill.evaluate.masks import evaluate_masks
from distill.launch import create_accelerator
from distill.recipe import load_recipe
from distill.run import claim_run_dir
from distill.stages.train import check
from distill.student import begin_student, check_student, settle_pretrained, student_config
from distill.train import refuse_unlabelled, train
from embeddings_cache.shards import EmbeddingsCache
from students import InputError, create_student, load_student, save_published, save_student, untrained_sam
from students.imagenet import repository_of
from support import ROOT, places


@pytest.fixture
def own_photos(finished_run: Path, scene_tar: Path, tmp_path: Path) -> list[str]:
    """Going on from the finished student, with its teacher and images."""
    images, _, cache = places(finished_run, scene_tar)
    start = f"student.start={finished_run / 'run' / 'student.safetensors'}"
    teacher = ("teacher.name=toy", "teacher.checkpoint=null", "teacher.batch_size=4", "data.val_images=4")
    return ["recipe=own_photos", start, images, cache, *teacher, f"run_dir={tmp_path / 'run'}", "train.workers=0"]


def test_a_start_tells_what_the_recipe_leaves_out(own_photos: list[str], finished_run: Path) -> None:
    recipe, begun = load_recipe(own_photos), load_student(finished_run / "run" / "student.safetensors")
    assert recipe.image_size == 128
    assert student_config(recipe, 128) == begun.config
    assert load_recipe([*own_photos, "image_size=192"]).image_size == 192
    state = begin_student(recipe, 128).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in begun.state_dict().items())
    check(recipe, before=())


def test_a_run_does_without_the_file_that_it_began_with(own_photos: list[str], tmp_path: Path) -> None:
    start = own_photos[1].partition("=")[2]
    (tmp_path / "start.safetensors").write_bytes(Path(start).read_bytes())
    recipe = load_recipe([*own_photos, f"student.start={tmp_path / 'start.safetensors'}"])
    claim_run_dir(recipe)
    (tmp_path / "start.safetensors").unlink()
    again = load_recipe([f"run_dir={recipe.run_dir}"])
    assert again == recipe
    with pytest.raises(InputError, match=r"start.safetensors"):
        check(again, before=())
    (Path(recipe.run_dir) / "checkpoints" / "step-00000001").mkdir(parents=True)
    for goes_on in (again, load_recipe([*own_photos, f"student.start={tmp_path / 'start.safetensors'}"])):
        assert goes_on == recipe
        check(goes_on, before=())
        assert begin_student(goes_on, 128).config == student_config(recipe, 128)


def test_weights_that_cannot_be_had_any_more_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`student.pretrained=auto` that came to true, on a machine without network, after a checkpoint."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "recipe.yaml").write_text(f"data: {{images: x}}\nrun_dir: {tmp_path}\nstudent: {{pretrained: true}}\n")
    recipe = load_recipe([f"recipe={tmp_path / 'recipe.yaml'}"])
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    check_student(recipe, 256)
    assert begin_student(recipe, 256).config == student_config(recipe, 256)


def test_a_start_of_another_width_than_the_teachers_is_refused_before_precompute(
    own_photos: list[str], tmp_path: Path
) -> None:
    narrow = create_student("repvit_m0_9", 128, 64, widths=[8, 16, 16, 32], depths=[1, 1, 1, 1])
    save_student(tmp_path / "narrow.safetensors", narrow, {})
    recipe = load_recipe([*own_photos, f"student.start={tmp_path / 'narrow.safetensors'}"])
    with pytest.raises(InputError, match="makes embeddings of 64 channels, and the teacher's have 128"):
        check(recipe, before=())
    with pytest.raises(InputError, match=r"student.start=.* does not fit the recipe's student: "):
        begin_student(recipe, 128)


def test_auto_keeps_to_a_run_that_has_begun_and_to_no_other(tmp_path: Path, accelerator: Accelerator) -> None:
    arguments = ["recipe=quickstart", "data.images=x", f"run_dir={tmp_path / 'run'}"]
    claim_run_dir(load_recipe([*arguments, "student.pretrained=true"]))
    recipe = load_recipe([*arguments, "student.pretrained=auto"])
    settle_pretrained(recipe, accelerator, trains=False)
    assert recipe.student.pretrained == "auto"  # nothing was trained by that recipe, and another takes its place
    (tmp_path / "run" / "checkpoints").mkdir()
    settle_pretrained(recipe, accelerator, trains=False)
    assert recipe.student.pretrained is True


def test_another_student_than_the_recipes_is_refused(own_photos: list[str]) -> None:
    for said, message in (
        ("student.name=repvit_m1_1", "is another student: student.name=repvit_m1_1, there repvit_m0_9"),
        ("student.downsample=fuse", "student.downsample=fuse, there stride1"),
    ):
        with pytest.raises(InputError, match=message):
            check(load_recipe([*own_photos, said]), before=())
    with pytest.raises(InputError, match=r"student.pretrained=True: student.start=.* is where the weights begin"):
        load_recipe([*own_photos, "student.pretrained=true"])


def test_a_published_students_file_is_a_start(tmp_path: Path) -> None:
    student = create_student("repvit_m1", downsample="fuse")
    save_published(tmp_path / "edge_sam.pth", student, untrained_sam(student))
    recipe = load_recipe(["recipe=own_photos", f"student.start={tmp_path / 'edge_sam.pth'}", "data.images=x"])
    assert (recipe.image_size, recipe.student.name, recipe.student.downsample) == (1024, "repvit_m1", "fuse")
    state = begin_student(recipe, 256).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in student.state_dict().items())


def test_a_student_goes_on_at_another_size_where_its_backbone_does(tmp_path: Path) -> None:
    small = {"widths": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
    for name, more, fits in (
        ("repvit_m0_9", {}, True),
        ("tiny_vit_5m", {"num_heads": [1, 1, 1, 1], "window_sizes": [7, 4, 7, 4]}, True),
    ):
        save_student(tmp_path / f"{name}.safetensors", create_student(name, 128, 64, **small, **more), {})
        keys = [f"student.start={tmp_path / name}.safetensors", "data.images=x", "image_size=256"]
        assert (begin_student(load_recipe(["recipe=own_photos", *keys]), 64).img_size == 256) is fits


def test_own_photos_bring_a_student_nearer_to_the_truth(own_photos: list[str], finished_run: Path) -> None:
    """The finished run's student was trained for ten steps: there is much to learn."""
    longer = ("train.batch_size=4", "train.epochs=6", "train.lr=0.003", "train.mask_prompts=4", "train.log_every=1")
    recipe = load_recipe([*own_photos, *longer])
    accelerator = create_accelerator(recipe)
    assert train(recipe, accelerator)
    evaluate_masks(recipe, accelerator)
    runs = finished_run / "run", Path(recipe.run_dir)
    scores = [json.loads((path / "evaluation.json").read_text())["masks"] for path in runs]
    before, after = ([score["miou"][prompt]["all"]["student_truth"] for prompt in ("point", "box")] for score in scores)
    assert sum(after) > sum(before) + 0.05
    lines = [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
    truth = [line["truth"] for line in lines if "truth" in line]
    assert sum(truth[-5:]) < 0.9 * sum(truth[:5])
    # Batch norms are frozen: whoever has a few photographs has no statistics.
    begun, kept = (load_student(path / "student.safetensors").state_dict() for path in runs)
    assert all(torch.equal(kept[name], begun[name]) for name in kept if "running" in name)


def test_without_annotations_there_is_no_truth(own_photos: list[str], finished_run: Path) -> None:
    recipe, cache = load_recipe(own_photos), EmbeddingsCache(finished_run / "cache")
    rows = [cache[index] for index in range(3)]
    refuse_unlabelled(recipe, rows, [0, 1, 2])  # type: ignore[arg-type]
    rows = [*(replace(row, annotation=None) for row in rows), rows[0]]
    refuse_unlabelled(recipe, rows, [0, 1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"learns from annotated masks, and of 3 training images in .* none has any"):
        refuse_unlabelled(recipe, rows, [0, 1, 2])  # type: ignore[arg-type]
    refuse_unlabelled(replace(recipe, train=replace(recipe.train, loss={"mse": 1.0})), rows, [0])  # type: ignore[arg-type]


WHOLE = """
image_size: 128
student: {name: repvit_m0_9, pretrained: auto}
teacher: {name: toy}
data: {val_images: 4}
train: {epochs: 0, batch_size: 4, watch_images: 0}
"""
"""ImageNet weights are of a whole backbone."""


@pytest.mark.slow
def test_auto_is_what_it_came_to(finished_run: Path, scene_tar: Path, tmp_path: Path) -> None:
    """Drawn weights where there are no others, timm's where the hub's cache has them; and a run keeps to it."""
    (tmp_path / "whole.yaml").write_text(WHOLE)
    images, _, cache = places(finished_run, scene_tar)
    torch.manual_seed(1)  # the run draws with 0
    imagenet = timm.create_model("repvit_m0_9")
    snapshot = tmp_path / "hub" / f"models--{repository_of('repvit_m0_9').replace('/', '--')}" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    save_file(imagenet.state_dict(), snapshot / "model.safetensors")

    def run(name: str, **environment: str) -> str:
        keys = [f"recipe={tmp_path / 'whole.yaml'}", "stage=train", images, cache, f"run_dir={tmp_path / name}"]
        command = [sys.executable, str(ROOT / "distill.py"), *keys]
        whole = {**os.environ, **environment}
        result = subprocess.run(command, cwd=ROOT, env=whole, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    nowhere = {"HF_HUB_CACHE": str(tmp_path / "empty"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    there = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    assert "student.pretrained=auto: false, the student begins with drawn weights: ImageNet" in run("drawn", **nowhere)
    assert "student.pretrained=auto: true, the student begins with timm's weights" in run("timms", **there)
    assert "is there already" in run("timms", **nowhere)
    for name, settled in (("drawn", "false"), ("timms", "true")):
        assert f"pretrained: {settled}" in (tmp_path / name / "recipe.yaml").read_text()
    state = load_student(tmp_path / "timms" / "student.safetensors").backbone.state_dict()
    theirs = imagenet.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.items())
    drawn = load_student(tmp_path / "drawn" / "student.safetensors").backbone.state_dict()
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in drawn.items())
