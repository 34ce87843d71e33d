"""The folder for the hub in transformers' own hands, in a process that cannot import anything of this project's, nor
segment-anything; and what the model card says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from distill.evaluate.ious import mask_iou
from distill.export.hub import export_hugging_face
from distill.export.hub.hugging_face import PREFIX
from distill.export.hub.modules import student_modules
from distill.export.proof import Reference
from distill.export.subject import Subject
from distill.recipe import load_recipe
from embeddings_cache.images.scenes import generate_scene
from exports import SIZE, reference, scene_row, small_student, toy
from students import InputError, StudentEncoder, build_student_sam, create_student, save_student
from support import Cli

SIZES = {"landscape": (128, 85), "portrait": (90, 128), "square": (128, 128), "larger": (300, 211)}
"""Width and height; all but the last are taken as they are."""

ALONE = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("students", "distill", "embeddings_cache", "recipes", "segment_anything"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np, torch
from PIL import Image
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline

asked = json.load(open("asked.json"))
masks = {}
for folder in asked["folders"]:
    model = AutoModelForMaskGeneration.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
    processor = AutoProcessor.from_pretrained(folder)
    seen = processor(images=Image.open("square.png"), return_tensors="pt")["pixel_values"]
    masks[f"{folder} embedding"] = model.get_image_embeddings(seen).numpy()
    for picture, prompts in asked["pictures"].items():
        image = Image.open(f"{picture}.png")
        for number, prompt in enumerate(prompts):
            inputs = processor(images=image, return_tensors="pt", **prompt)
            for multimask in (True, False):
                with torch.no_grad():
                    made = model(**inputs, multimask_output=multimask)
                found = processor.post_process_masks(
                    made.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
                )
                masks[f"{folder} {picture} {number} {multimask}"] = found[0][0].numpy()
everything = pipeline("mask-generation", model=asked["folders"][0], trust_remote_code=True)
found = everything(Image.open("landscape.png"), pred_iou_thresh=0.3, stability_score_thresh=0.3)
print(len(found["masks"]), "masks of everything")
model.save_pretrained("saved")
again = AutoModel.from_pretrained("saved", trust_remote_code=True)
assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())
np.savez("masks.npz", **masks)
"""


def exported(student: StudentEncoder, path: Path) -> Path:
    """A student's folder; the student lies beside it."""
    checkpoint = path.with_suffix(".safetensors")
    save_student(checkpoint, student, {})
    settings = load_recipe(["recipe=quickstart", f"run_dir={path.parent}", f"checkpoint={checkpoint}"])
    sam = build_student_sam(student, toy(student.img_size))
    subject = Subject(student.config.name, "toy", None, student, student, sam, None)
    found = Reference(student, sam, [scene_row(seed, student.img_size) for seed in range(2)])
    export_hugging_face(path, settings, subject, found)
    return path


def prompts_on(width: int, height: int) -> list[dict[str, list]]:
    x, y = width * 0.4, height * 0.5
    return [
        {"input_points": [[[x, y]]]},
        {"input_points": [[[x, y], [width * 0.1, height * 0.1]]], "input_labels": [[1, 0]]},
        {"input_boxes": [[[width * 0.2, height * 0.2, width * 0.8, height * 0.7]]]},
        {"input_points": [[[[x, y]]]], "input_boxes": [[[width * 0.2, height * 0.2, width * 0.8, height * 0.7]]]},
    ]


def expected_of(sam: Sam, image: np.ndarray, prompt: dict[str, list], multimask: bool) -> np.ndarray:
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    points = np.array(prompt.get("input_points", [])).reshape(-1, 2)
    labels = np.array(prompt.get("input_labels", np.ones((1, len(points))))).reshape(-1)
    box = np.array(prompt["input_boxes"][0][0]) if "input_boxes" in prompt else None
    given = {"point_coords": points, "point_labels": labels} if len(points) else {}
    return predictor.predict(**given, box=box, multimask_output=multimask)[0]


def in_transformers(
    directory: Path, students: dict[str, StudentEncoder], learnt: bool = True, **environment: str
) -> str:
    """Compare embeddings and masks of some students' folders with `SamPredictor`'s; returns what transformers said."""
    folders = {str(exported(student, directory / name)): student for name, student in students.items()}
    pictures = {}
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        picture = Image.fromarray(generate_scene(np.random.default_rng(seed), 320)[0]).resize((width, height))
        picture.save(directory / f"{name}.png")
        pictures[name] = prompts_on(width, height)
    (directory / "asked.json").write_text(json.dumps({"folders": list(folders), "pictures": pictures}))
    alone = {"HF_HOME": str(directory / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-P", "-c", ALONE] if sys.version_info >= (3, 11) else [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=directory, env={**os.environ, **alone}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    masks = np.load(directory / "masks.npz")
    found_some = []
    for folder, student in folders.items():
        sam = build_student_sam(student, toy(student.img_size))
        predictor = SamPredictor(sam)
        predictor.set_image(np.array(Image.open(directory / "square.png")))
        expected = predictor.get_image_embedding().numpy()
        assert np.linalg.norm(masks[f"{folder} embedding"] - expected) <= 1e-4 * np.linalg.norm(expected), folder
        for name, prompts in pictures.items():
            if name == "larger" and not learnt:
                continue  # rounding in how it is resized moves what no training has settled
            image = np.array(Image.open(directory / f"{name}.png"))
            for number, prompt in enumerate(prompts):
                for multimask in (True, False):
                    found = masks[f"{folder} {name} {number} {multimask}"]
                    expected = expected_of(sam, image, prompt, multimask)
                    assert found.shape == expected.shape
                    found_some.append(expected.any())
                    least = 0.99 if name == "larger" else 0.999
                    assert all(map(lambda *pair: mask_iou(*pair) >= least, found, expected)), (folder, name, prompt)
    assert not learnt or np.mean(found_some) > 0.5, "masks that prove nothing"
    return done.stdout + done.stderr


def test_transformers_makes_the_same_masks(tmp_path: Path) -> None:
    students = {"repvit": small_student(), "tiny_vit": small_student("tiny_vit_5m")}
    said = in_transformers(tmp_path, students)
    assert "masks of everything" in said
    assert "is not supported" not in said


@pytest.mark.slow
@pytest.mark.parametrize("packages", [["transformers==4.57.3"]])
def test_an_older_transformers_does_so_too(packages: list[str], tmp_path: Path) -> None:
    target = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", "--target", target, *packages]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip: {done.stderr.strip().splitlines()[-1]}")
    in_transformers(tmp_path, {"repvit": small_student()}, PYTHONPATH=str(target))


@pytest.mark.slow
def test_other_kinds_of_students_too(tmp_path: Path) -> None:
    """What they compute at the start lies in the file: reductions, places, attention's indices. Their weights are
    drawn, so that it is their embeddings that count."""
    torch.manual_seed(0)
    pyramid = {"neck": "pyramid", "neck_depth": 1, "embed_dim": 128}
    students = {
        "efficientvit": create_student("efficientvit_b0", SIZE, input_size=SIZE // 2, **pyramid),
        "fused": small_student(downsample="fuse"),
        "convnext": create_student("convnextv2_atto", SIZE, **pyramid),
        "fastvit": create_student("fastvit_t8", SIZE, **pyramid),
    }
    in_transformers(
        tmp_path, {name: each.eval().requires_grad_(False) for name, each in students.items()}, learnt=False
    )


def test_nothing_is_handed_out_that_is_not_needed_or_could_not_be_read(tmp_path: Path) -> None:
    student = small_student()
    folder = exported(student, tmp_path / "huggingface")
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.endswith(".py")} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    state = student.state_dict()
    assert all(torch.equal(weights[PREFIX + name], tensor) for name, tensor in state.items())
    code = student_modules("0")
    assert set(code) < names
    assert all("segment_anything" not in text and "students." not in text.split('"""')[-1] for text in code.values())
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".py", ".md", ".json"))
    assert str(tmp_path) not in text, "a path of the machine"


def test_encoders_that_transformers_has_itself_are_refused(tmp_path: Path) -> None:
    sam = toy()
    vit = sam.image_encoder
    recipe = load_recipe(["recipe=quickstart", f"run_dir={tmp_path}"])
    with pytest.raises(InputError, match=r"huggingface takes students; .* stage=convert writes it"):
        export_hugging_face(
            tmp_path / "huggingface", recipe, Subject("vit_b", "vit_b", None, vit, vit, sam, None), reference(vit)
        )
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_the_run_came_to(finished_run: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("student.safetensors", "recipe.yaml", "cache.json", "evaluation.json"):
        (out / name).write_bytes((finished_run / "run" / name).read_bytes())
    (out / "report").mkdir()
    for name in ("report.json", "masks.png"):
        (out / "report" / name).write_bytes((finished_run / "run" / "report" / name).read_bytes())
    done = cli("stage=export", f"run_dir={out}", "export.formats=[huggingface]")
    assert done.returncode == 0, done.stderr
    card = (out / "export" / "huggingface" / "README.md").read_text()
    scores = json.loads((out / "evaluation.json").read_text())["masks"]
    mean = scores["miou"]["box"]["all"]
    row = f"| box | {mean['student_teacher']:.3f} | {mean['student_truth']:.3f} | {mean['teacher_truth']:.3f} |"
    assert row in card
    assert "- Teacher: `toy`" in card
    assert "![Masks of the teacher and of this student](masks.png)" in card
    assert (out / "export" / "huggingface" / "masks.png").exists()
    assert "\nlicense: other\nlicense_name: to-be-filled-in\n" in card

    (out / "evaluation.json").unlink()  # as where nobody has evaluated it
    (out / "export" / "manifest.json").unlink()
    done = cli("stage=export", f"run_dir={out}", "export.formats=[huggingface]", "export.license=CC-BY-NC-4.0")
    assert done.returncode == 0, done.stderr
    card = (out / "export" / "huggingface" / "README.md").read_text()
    assert "It has not been evaluated" in card
    assert "masks.png" not in card
    assert card.startswith("---\nlicense: cc-by-nc-4.0\nlibrary_name: transformers\n")
