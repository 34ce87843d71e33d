from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distill.main import help_text, main
from distill.recipe import (
    STAGES,
    Recipe,
    describe_keys,
    differences,
    list_recipes,
    load_recipe,
    to_yaml,
)
from distill.student import student_config
from distill.training.plan import Plan, Schedule, phase_settings
from students import PUBLISHED, InputError

PAPERS = [
    "efficientvit_l0", "efficientvit_l1", "repvit_m0_9", "repvit_m1_1", "repvit_m1_1_512", "repvit_m2_3",
    "repvit_m2_3_masks", "tiny_vit_5m",
]  # fmt: skip


def test_the_shipped_recipes_are_the_papers_the_quickstart_and_ones_own_photos() -> None:
    assert list_recipes() == sorted(["quickstart", "own_photos", "edge_sam", "mobile_sam", *PAPERS])


@pytest.mark.parametrize("name", PAPERS)
def test_paper_recipes_have_the_papers_setting(name: str) -> None:
    recipe = load_recipe([f"recipe={name}"])
    assert recipe.student.name == name.removesuffix("_512").removesuffix("_masks")
    assert recipe.teacher.name == "vit_h"
    assert (recipe.image_size, recipe.data.fraction, recipe.train.epochs) == (1024, 0.01, 8)
    assert (recipe.train.loss, recipe.student.downsample) == ({"mse": 1.0}, "stride1")


@pytest.mark.parametrize(("name", "published"), [("efficientvit_l0", "l0"), ("efficientvit_l1", "l1")])
def test_efficientvits_recipes_train_what_its_authors_released(name: str, published: str) -> None:
    assert student_config(load_recipe([f"recipe={name}"])) == PUBLISHED[f"efficientvit_sam_{published}"]


def test_values_come_from_schema_then_file_then_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {images: some/*.tar}\ntrain: {lr: 0.5, epochs: 3}\n")
    recipe = load_recipe([f"recipe={path}", "train.epochs=7", "student.name=tiny_vit_5m"])
    assert (recipe.train.batch_size, recipe.train.lr, recipe.train.epochs) == (8, 0.5, 7)
    assert (recipe.name, recipe.run_dir, recipe.cache.dir) == ("mine", "runs/mine", "caches/vit_h-1024px")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("data.images=a/sa_{000000..000003}.tar", "data.images", "a/sa_{000000..000003}.tar"),
        ("data.images=pipe:curl -s http://x/{a,b}.tar", "data.images", "pipe:curl -s http://x/{a,b}.tar"),
        ("data.images=[a.tar, b]", "data.images", ["a.tar", "b"]),
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("cache.jpeg_quality=png", "cache.jpeg_quality", "png"),
        ("run_dir=2026-11-20", "run_dir", "2026-11-20"),
        ("train.loss={mse: 2}", "train.loss", {"mse": 2.0}),
        ("train.loss={mask: 1}", "train.loss", {"mask": 1.0}),
        ("train.loss.mask=1", "train.loss", {"l1": 1.0, "mask": 1.0}),
        ("student.overrides.depths=[1, 2, 3, 4]", "student.overrides.depths", [1, 2, 3, 4]),
        ("teacher.checkpoint=null", "teacher.checkpoint", None),
        ("train.workers=3", "train.workers", 3),
        ("train.mixed_precision=no", "train.mixed_precision", "no"),
        ("run_dir=007", "run_dir", "007"),
        ("run_dir=2026_11_20", "run_dir", "2026_11_20"),
        ("student.pretrained=true", "student.pretrained", True),
    ],
)
def test_command_line_values(argument: str, key: str, value: object) -> None:
    recipe = load_recipe(["recipe=quickstart", argument])
    assert OmegaConf.select(OmegaConf.structured(recipe), key) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command line: recipe=NAME is missing; recipes: edge_sam, "),
        (["recipe=repvit_m9"], "command line: unknown recipe 'repvit_m9'; did you mean 'repvit_m0_9'?"),
        (["recipe=gone.yaml"], "command line: recipe=gone.yaml: no such file"),
        (["recipe=quickstart", "train.epohcs=3"], "unknown key 'train.epohcs'; did you mean 'train.epochs'?"),
        (["recipe=quickstart", "--resume"], "command line: '--resume' is not key=value"),
        (["recipe=quickstart", "train.epochs=many"], "command line: train.epochs: Value 'many'"),
        (["recipe=quickstart", "train.epochs=-1"], "command line: train.epochs=-1 is negative"),
        (["recipe=quickstart", "data.fraction=1.5"], "command line: data.fraction=1.5 is more than 1"),
        (["recipe=quickstart", "train.lr=-1"], "command line: train.lr=-1.0 is not above 0"),
        (["recipe=quickstart", "seed=-1"], "command line: seed=-1 is negative"),
        (["recipe=quickstart", "image_size=1000"], "command line: image_size=1000 is not a multiple of 64"),
        (["recipe=quickstart", "stage=trian"], "command line: stage=trian is not known; did you mean 'train'?"),
        (["recipe=quickstart", "student.name=repvit_m3_2"], "student.name=repvit_m3_2 is not known; did you mean"),
        (["recipe=quickstart", "student.downsample=stride2"], "student.downsample=stride2 is not known; did you mean"),
        (["recipe=quickstart", "student.pretrained=3"], "student.pretrained=3 is neither true, false, auto, nor"),
        (["recipe=quickstart", "teacher.name=vit_x"], "teacher.name=vit_x is not known; did you mean 'vit_l'?"),
        (["recipe=quickstart", "cache.jpeg_quality=101"], "cache.jpeg_quality=101 is neither 1-100 nor png"),
        (["recipe=quickstart", "cache.jpeg_quality=true"], "cache.jpeg_quality=True is neither 1-100 nor png"),
        (["recipe=quickstart", "train.loss.l1=0"], "weights are not negative, and one is more than 0"),
        (["recipe=quickstart", "data.images=[a_{0..3}.tar, b"], "command line: data.images=[a_{0..3}.tar, b is not"),
        (["recipe=quickstart", "data.images=[1, 2]"], "data.images=[1, 2] is neither text nor a list of texts"),
        (["recipe=quickstart", "evaluate.data=scenes:5"], "scenes are made for data.images only"),
        (["recipe=quickstart", "evaluate.data=coco.json"], "goes with stage=evaluate; stage=all takes pictures"),
        (["recipe=quickstart", "train.loss.masks=1"], "train.loss=masks is not known; did you mean 'mask'?"),
        (["recipe=quickstart", "train.loss={}"], "train.loss={}: weights are not negative, and one is more than 0"),
        (["recipe=quickstart", "train.then=[{lr: 0}]"], "command line: train.then[0].lr=0.0 is not above 0"),
        (["recipe=quickstart", "train.then=[{}, {mask_points: 2}]"], "train.then[1].mask_points=2.0 is more than 1"),
        (["recipe=quickstart", "train.then=[{mask_targets: hard}]"], "then[0].mask_targets=hard is not known; known:"),
        (["recipe=quickstart", "train.mask_targets=sotf"], "train.mask_targets=sotf is not known; did you mean"),
        (["recipe=quickstart", "train.lr_per=0"], "command line: train.lr_per=0 is less than 1"),
        (["recipe=quickstart", "based_on=repvit_m2_3"], "command line: unknown key 'based_on'"),
        (["recipe=own_photos", "data.images=x"], "own_photos.yaml leaves to the command line: student.start=..., go"),
        (["recipe=own_photos", "data.images=x", "student.start=gone.pt"], "gone.pt: no such file"),
        (["recipe=quickstart", "train.then=[{epochs: 0}]"], "command line: train.then[0].epochs=0 is less than 1"),
        (["recipe=quickstart", "train.then=[{loss: {kl: 1}}]"], "train.then[0].loss=kl is not known"),
        (["recipe=quickstart", "train.then=[{loss: {mse: 0}}]"], "train.then[0].loss={'mse': 0.0}: weights are not"),
        (["recipe=quickstart", "train.then=[{epoch: 1}]"], "command line: epoch: Key 'epoch' not in 'PhaseRecipe'"),
        (["recipe=quickstart", "train.then=2"], "command line: train.then: "),
        (["recipe=quickstart", "train.batch_norm=global"], "train.batch_norm=global is not known; did you mean"),
        (["recipe=quickstart", "train.trackers=[tensorbord]"], "train.trackers=tensorbord is not known; did you mean"),
        (["recipe=quickstart", "train.ema=1"], "command line: train.ema=1.0 is not below 1"),
        (["recipe=quickstart", "train.stop_above=0.5"], "train.stop_above=0.5 would stop every run"),
        (["recipe=quickstart", "train.keep_checkpoints=0"], "train.keep_checkpoints=0 is less than 1"),
        (["recipe=quickstart", "export.formats=[coremll]"], "command line: export.formats=coremll is not known"),
        (["recipe=quickstart", "train.batch_size=9", "train.accumulate=2"], "9 does not divide by train.accumulate=2"),
        (["recipe=quickstart", "run_dir=${nowhere}"], "Interpolation key 'nowhere' not found"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_origin_and_the_nearest_right_thing(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for content, message in (
        ("trian: {lr: 1}", "mine.yaml: unknown key 'trian'; did you mean 'train"),
        ("train: {lr: fast}", "mine.yaml: train.lr: Value 'fast'"),
        ("train: [1", "mine.yaml is not valid YAML"),
        ("- 1", "mine.yaml is not a recipe"),
        ("seed: 1", "mine.yaml: data.images=None: say which tars or folder to use"),
        ("data: {images: 5}", "mine.yaml: data.images=5 is neither text nor a list of texts"),
    ):
        path.write_text(content)
        with pytest.raises(InputError) as error:
            load_recipe([f"recipe={path}"])
        assert message in str(error.value)


def test_a_phases_losses_are_those_that_it_names() -> None:
    recipe = load_recipe(["recipe=quickstart", "train.then=[{loss: {mask_bce: 5}, lr: 1e-4}, {epochs: 2}]"])
    assert [phase.loss for phase in recipe.train.then] == [{"mask_bce": 5.0}, None]
    assert [settings.loss for settings in phase_settings(recipe)] == [{"l1": 1.0}, {"mask_bce": 5.0}, {"l1": 1.0}]


def test_a_recipe_says_what_differs_from_the_one_that_it_is_based_on(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(
        "based_on: repvit_m1_1\nrun_dir: elsewhere\ntrain: {lr: 0.5, epochs: 3, loss: {cosine: 1}}\n"
    )
    (tmp_path / "deep" / "mine.yaml").write_text("based_on: ../base.yaml\ntrain: {epochs: 4, loss: {l1: 2}}\n")
    recipe = load_recipe([f"recipe={tmp_path / 'deep' / 'mine.yaml'}", "train.batch_size=2"])
    assert (recipe.name, recipe.run_dir) == ("mine", "runs/mine")  # and not the base's
    assert (recipe.student.name, recipe.data.fraction) == ("repvit_m1_1", 0.01)
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.batch_size) == (0.5, 4, 2)
    assert recipe.train.loss == {"l1": 2.0}
    (tmp_path / "recipe.yaml").write_text(saved := to_yaml(recipe))
    assert "based_on" not in saved
    assert load_recipe([f"recipe={tmp_path / 'recipe.yaml'}"]) == recipe


def test_a_base_is_asked_again_and_its_overrides_can_be_cleared(tmp_path: Path) -> None:
    """`???` takes back what a base says."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "based_on: quickstart\nstudent: {name: tiny_vit_5m, overrides: {}}\ndata: {images: '???', val_images: 3}\n"
    )
    with pytest.raises(InputError, match=r"mine.yaml leaves to the command line: data.images="):
        load_recipe([f"recipe={path}"])
    recipe = load_recipe([f"recipe={path}", "data.images=x"])
    assert (recipe.data.images, recipe.student.name, recipe.student.overrides) == ("x", "tiny_vit_5m", {})
    more = load_recipe(["recipe=quickstart", "student.overrides.depths=[1, 1, 1, 1]"])
    assert more.student.overrides == {"widths": [24, 48, 96, 192], "depths": [1, 1, 1, 1]}


def test_of_two_ways_to_say_warm_up_the_last_one_counts(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=edge_sam", "train.warmup_steps=100"])
    assert Plan.of(recipe, 1600, 1).phases[0].schedule.warmup == 100
    (tmp_path / "mine.yaml").write_text("based_on: edge_sam\ntrain: {warmup_steps: 50}\n")
    recipe = load_recipe([f"recipe={tmp_path / 'mine.yaml'}", "train.warmup_epochs=1"])
    assert Plan.of(recipe, 1600, 1).phases[0].schedule.warmup == 100
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_recipe([f"recipe={tmp_path / 'recipe.yaml'}"]) == recipe


def test_bases_that_are_unknown_or_go_round_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    second.write_text("based_on: first.yaml\ndata: {images: x}\n")
    for base, message in (
        ("repvit_m2_4", "first.yaml: based_on=repvit_m2_4 is not known; did you mean 'repvit_m2_3'?"),
        ("third.yaml", "first.yaml: based_on=third.yaml: no such file"),
        ("[a, b]", "first.yaml: based_on=['a', 'b'] is neither a recipe's name nor a path"),
        ("first.yaml", "first.yaml: based_on makes a circle: "),
        ("second.yaml", "second.yaml: based_on makes a circle: "),
    ):
        first.write_text(f"based_on: {base}\n")
        with pytest.raises(InputError) as error:
            load_recipe([f"recipe={first}"])
        assert message in str(error.value)
    assert str(error.value).count("→") == 2


def test_a_mistake_is_told_of_the_file_that_makes_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {images: x}\ntrain: {lr: -1}\n")
    (tmp_path / "mine.yaml").write_text("based_on: base.yaml\ntrain: {epochs: 2}\n")
    with pytest.raises(InputError, match=r"base.yaml: train.lr=-1.0 is not above 0"):
        load_recipe([f"recipe={tmp_path / 'mine.yaml'}"])
    (tmp_path / "base.yaml").write_text("data: {images: x}\n")
    (tmp_path / "mine.yaml").write_text("based_on: base.yaml\ntrain: {epochs: -2}\n")
    with pytest.raises(InputError, match=r"mine.yaml: train.epochs=-2 is negative"):
        load_recipe([f"recipe={tmp_path / 'mine.yaml'}"])


def test_edge_sams_phases_are_the_published_ones() -> None:
    """Of its training configuration; the first phase's rate is for a batch of 64."""
    recipe = load_recipe(["recipe=edge_sam"])
    assert student_config(recipe) == PUBLISHED["edge_sam"]
    plan = Plan.of(recipe, 1600, 1)
    first, second = plan.phases
    assert first.schedule == Schedule(0, 1000, 500, 0.0125 / 4, 6.25e-7 / 4, prefix=False)
    assert second.schedule == Schedule(1000, 500, 0, 1e-4, 1e-5, prefix=False)
    settings = [(p.settings.epochs, p.settings.weight_decay, p.settings.clip_norm) for p in plan.phases]
    assert settings == [(10, 0.01, 5.0), (5, 0.05, 0.01)]
    assert (first.settings.loss, first.settings.ignore_padding) == ({"mse": 1.0}, True)
    assert (second.settings.loss, second.settings.mask_targets) == ({"mask_bce": 5.0, "mask_dice": 5.0}, "binary")
    assert (second.settings.mask_prompts, second.settings.mask_points, second.settings.mask_rounds) == (16, 0.5, 1)
    assert student_config(load_recipe(["recipe=mobile_sam"])) == PUBLISHED["mobile_sam"]


def test_the_resolved_recipe_reproduces_itself(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=repvit_m2_3", "train.lr=3e-4", "run_dir=somewhere"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_recipe([f"recipe={tmp_path / 'recipe.yaml'}"]) == recipe


def test_home_is_what_a_tilde_says_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("data: {images: [~/a.tar, /b.tar]}\ncache: {dir: ~/cache}\nrun_dir: ~/run\n")
    given = ["teacher.checkpoint=~/sam.pth", "image=~/photo.jpg", "evaluate.data=~/val", "checkpoint=~/s.safetensors"]
    recipe = load_recipe(["recipe=~/mine.yaml", *given, "data.annotations=~/i.json", "student.pretrained=~/p.pth"])
    assert (recipe.data.images, recipe.cache.dir) == ([f"{tmp_path}/a.tar", "/b.tar"], f"{tmp_path}/cache")
    assert (recipe.run_dir, recipe.teacher.checkpoint) == (f"{tmp_path}/run", f"{tmp_path}/sam.pth")
    assert (recipe.image, recipe.evaluate.data) == (f"{tmp_path}/photo.jpg", f"{tmp_path}/val")
    assert (recipe.checkpoint, recipe.student.pretrained) == (f"{tmp_path}/s.safetensors", f"{tmp_path}/p.pth")
    assert recipe.data.annotations == f"{tmp_path}/i.json"
    assert load_recipe(["recipe=~/mine.yaml", "data.images=~/*.jpg"]).data.images == f"{tmp_path}/*.jpg"


def test_yaml_leaves_words_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {images: x}\ntrain: {mixed_precision: no}\nrun_dir: 2026-11-20\n")
    recipe = load_recipe([f"recipe={tmp_path / 'mine.yaml'}"])
    assert (recipe.train.mixed_precision, recipe.run_dir) == ("no", "2026-11-20")


def test_differences_are_those_that_shape_the_student(tmp_path: Path) -> None:
    saved = tmp_path / "recipe.yaml"
    started = ["recipe=quickstart", "train.lr=0.25"]
    saved.write_text(to_yaml(load_recipe(started)))
    same = load_recipe([*started, "train.workers=5", "cache.dir=x", "run_dir=y", "evaluate.grid=3"])
    assert differences(same, saved) == []
    other = load_recipe(["recipe=quickstart", "train.lr=0.5", "student.overrides.widths=[8, 8, 8, 8]"])
    assert differences(other, saved)[1] == "train.lr: 0.25, now 0.5"
    for key in ("train.epochs=3", "train.accumulate=2", "seed=1"):
        assert len(differences(load_recipe([*started, key]), saved)) == 1
    saved.write_text("of: another version")
    with pytest.raises(InputError, match="unknown key 'of'"):
        differences(same, saved)


def test_help_says_everything() -> None:
    text = help_text()
    for name in (*list_recipes(), *STAGES):
        assert name in text
    keys = list(describe_keys())
    assert {"stage", "train.checkpoint_every", "evaluate.data", "export.formats"} <= {key for key, _, _ in keys}
    for key, default, comment in keys:
        assert comment, f"{key} has no comment"
        assert f"{key}={default}" in text
        assert comment in text


def test_the_contracts_keys_exist() -> None:
    """Keys that others rely on: add freely, rename never."""
    keys = {key for key, _, _ in describe_keys()}
    for section, names in {
        "student": "name downsample neck input_size pretrained",
        "teacher": "name checkpoint",
        "data": "images fraction val_images max_skipped",
        "cache": "dir dtype images_per_shard jpeg_quality",
        "train": "epochs batch_size lr lr_per loss then checkpoint_every mask_targets mask_points",
        "evaluate": "task data",
        "export": "formats",
    }.items():
        assert {f"{section}.{name}" for name in names.split()} <= keys
    assert {"stage", "seed", "image_size", "run_dir", "checkpoint"} <= keys
    assert isinstance(load_recipe(["recipe=quickstart"]), Recipe)


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe=repvit_m9"],
        ["recipe=quickstart", "train.epohcs=3"],
        ["recipe=repvit_m2_3"],  # its checkpoint is not here
        ["recipe=repvit_m2_3", "teacher.checkpoint=nowhere.pth"],
        ["recipe=quickstart", "data.images=nothing/*.tar"],
        ["recipe=quickstart", "data.images=nothing/sa_{000000..000003}.tar"],
        ["recipe=quickstart", "data.images=scenes:none"],
        ["recipe=quickstart", "stage=train"],
        ["recipe=quickstart", "stage=evaluate"],
        ["recipe=quickstart", "stage=export", "checkpoint=nowhere.safetensors"],
        ["recipe=quickstart", "checkpoint=nowhere.safetensors"],
        ["recipe=quickstart", "evaluate.data=nothing/*.tar"],
        ["recipe=quickstart", "student.overrides.widths=[8, 16]"],
    ],
)
def test_a_mistake_is_one_line_exit_2_and_nothing_written(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("distill.py: ")
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_brings_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_recipe(["recipe=quickstart", "train.epochs=3", "seed=7"])))
    recipe = load_recipe(["stage=predict", f"run_dir={tmp_path}", "image=x.jpg", "point=1,2"])
    assert (recipe.name, recipe.train.epochs, recipe.seed) == ("quickstart", 3, 7)
    assert (recipe.stage, recipe.run_dir, recipe.image, recipe.point) == ("predict", str(tmp_path), "x.jpg", "1,2")
    assert load_recipe(["recipe=repvit_m0_9", f"run_dir={tmp_path}", "data.images=x"]).name == "repvit_m0_9"
    for elsewhere in (tmp_path / "elsewhere", ""):
        with pytest.raises(
            InputError, match=f"recipe=NAME is missing{f', and run_dir={elsewhere}' if elsewhere else ''}"
        ):
            load_recipe([f"run_dir={elsewhere}"])


def test_what_a_prediction_was_asked_for_is_not_saved(tmp_path: Path) -> None:
    arguments = ["recipe=quickstart", "stage=predict", "image=x.jpg", "point=1,2", "box=1,2,3,4"]
    (tmp_path / "saved.yaml").write_text(to_yaml(load_recipe(arguments)))
    assert load_recipe([f"recipe={tmp_path / 'saved.yaml'}"]) == load_recipe(["recipe=quickstart"])
