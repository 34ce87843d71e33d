import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from distill.recipe import Recipe, load_recipe
from distill.report.results import report
from distill.run import write_section
from embeddings_cache.system import sha256
from students import InputError
from support import CHROMIUM, TINY, places

PROBE = """
<script>
addEventListener("load", () => {
  const text = (selector) => [...document.querySelectorAll(selector)].map((e) => e.innerText.trim());
  const seen = {
    width: innerWidth, scrollWidth: document.documentElement.scrollWidth,
    ground: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    pictures: [...document.images].map((i) => [i.naturalWidth, i.getBoundingClientRect().width]),
    curves: [...document.querySelectorAll("figure svg")].map((s) => s.getBoundingClientRect().height),
    labels: [...document.querySelectorAll("figure svg text")].map((t) => getComputedStyle(t).fill),
    miou: [...document.querySelectorAll("#miou tbody tr")].map((r) => [...r.cells].map((c) => c.innerText)),
    files: text("#files tbody tr"), run: text("#run tbody tr"), captions: text(".panels figcaption"),
    latency: text("#latency tbody tr"), fetched: performance.getEntriesByType("resource").map((e) => e.name),
  };
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>
"""


def shown(page: Path, *flags: str, width: int = 1000) -> dict:
    """What a real browser makes of a page: it is opened from disk, and a script in a copy of it looks around."""
    assert CHROMIUM is not None
    copy = page.with_name("probed.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += [f"--window-size={width},900", *flags, "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[:500]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture
def recipe(finished_run: Path, scene_tar: Path, tmp_path: Path) -> Recipe:
    """The finished run, in a copy that a test may change."""
    shutil.copytree(finished_run / "run", tmp_path / "run")
    finished = load_recipe([*TINY, *places(finished_run, scene_tar)])
    return replace(finished, run_dir=str(tmp_path / "run"))


def page_of(recipe: Recipe) -> Path:
    return Path(recipe.run_dir) / "report" / "index.html"


def content_of(recipe: Recipe) -> dict:
    return json.loads(page_of(recipe).with_name("report.json").read_text())


def test_the_json_says_what_was_run_and_what_came_of_it(recipe: Recipe) -> None:
    content, run = content_of(recipe), Path(recipe.run_dir)
    assert content["recipe"] == "quickstart"
    assert content["settings"]["train"]["batch_size"] == recipe.train.batch_size
    assert content["teacher"]["name"] == "toy"
    assert content["software"]["torch"]
    assert content["evaluation"]["miou"] == json.loads((run / "evaluation.json").read_text())["masks"]["miou"]
    assert content["export"] == json.loads((run / "export" / "manifest.json").read_text())["files"]
    assert set(content["seconds_by_stage"]) == {"precompute", "train", "evaluate", "export"}
    assert all(seconds > 0 for seconds in content["seconds_by_stage"].values())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "val_mse", "val_miou_point", "val_miou_box"):
        assert content["curves"][name] == [[line["step"], line[name]] for line in lines if name in line]
    assert len(content["curves"]["val_miou_box"]) == recipe.train.epochs + 1


def test_the_picture_shows_every_panel(recipe: Recipe) -> None:
    with Image.open(page_of(recipe).with_name("masks.png")) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
    quarters = np.array_split(pixels, 4, axis=1)
    assert all((quarter.std(axis=(0, 1)) > 20).all() for quarter in quarters)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_renders_it(recipe: Recipe) -> None:
    seen, content = shown(page_of(recipe)), content_of(recipe)
    assert len(seen["pictures"]) == 12
    assert all(natural > 60 and width > 60 for natural, width in seen["pictures"])
    assert seen["captions"][:4] == ["prompted by box", "ground truth", "teacher", "student"]
    assert len(seen["curves"]) == 2
    assert min(seen["curves"]) > 100
    columns = ("student_teacher", "student_truth", "teacher_truth")
    expected = [
        [prompt, size, str(means["masks"]), *(f"{means[column]:.3f}" for column in columns)]
        for prompt, sizes in content["evaluation"]["miou"].items()
        for size, means in sizes.items()
    ]
    assert seen["miou"] == expected
    assert seen["files"][0].startswith("export/encoder.onnx")
    assert any(line.startswith("train") for line in seen["run"])
    assert all(name.startswith("data:") for name in seen["fetched"])  # nothing beside the page is needed
    assert seen["ground"] == "rgb(255, 255, 255)"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_it_fits_a_phone(recipe: Recipe) -> None:
    seen = shown(page_of(recipe), width=500)
    assert seen["scrollWidth"] <= seen["width"] <= 500
    assert all(width < seen["width"] / 2 for _, width in seen["pictures"])  # two panels a line


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_it_is_dark_where_dark_is_preferred(recipe: Recipe) -> None:
    seen = shown(page_of(recipe), "--blink-settings=preferredColorScheme=0")

    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert brightness(seen["ground"]) < 50
    assert brightness(seen["ink"]) > 200
    assert seen["labels"]
    assert min(map(brightness, seen["labels"])) > 200  # words in the curves too


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_benchmark_is_shown_and_names_are_text(recipe: Recipe, accelerator: Accelerator) -> None:
    row = {"name": "<b>ours</b>", "backend": "onnxruntime", "median_ms": 12.34, "p10_ms": 11.0, "p90_ms": 15.0}
    (Path(recipe.run_dir) / "benchmark.json").write_text(json.dumps({"students": {"rows": [row]}}))
    assert report(recipe, accelerator)
    assert shown(page_of(recipe))["latency"] == ["<b>ours</b>\tonnxruntime\t12.3 ms\t11.0–15.0 ms"]


def test_a_contender_that_failed_is_shown_with_the_reason(recipe: Recipe, accelerator: Accelerator) -> None:
    row = {"name": "vit_h", "backend": "eager", "reason": "killed, <most likely> for want of memory"}
    (Path(recipe.run_dir) / "benchmark.json").write_text(json.dumps({"students": {"rows": [row]}}))
    assert report(recipe, accelerator)
    assert "killed, &lt;most likely&gt; for want of memory" in page_of(recipe).read_text()


def test_it_is_made_anew_when_a_figure_changed_and_only_then(
    recipe: Recipe, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    before = page_of(recipe).stat().st_mtime_ns
    assert not report(recipe, accelerator)
    assert page_of(recipe).stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert f"report      {page_of(recipe)}" in out
    metrics = Path(recipe.run_dir) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 10', '"step": 11'))
    assert report(recipe, accelerator)
    assert content_of(recipe)["curves"]["val_mse"][-1][0] == 11


def test_exports_of_another_student_are_not_shown(recipe: Recipe, accelerator: Accelerator) -> None:
    manifest = Path(recipe.run_dir) / "export" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["made_from"]["student_sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    report(recipe, accelerator)
    assert content_of(recipe)["export"] == {}
    assert "Nothing of this student has been exported" in page_of(recipe).read_text()


def test_a_student_from_elsewhere_has_not_the_runs_curves(
    recipe: Recipe, accelerator: Accelerator, tmp_path: Path
) -> None:
    (Path(recipe.run_dir) / "benchmark.json").write_text(json.dumps({"students": {"rows": []}}))
    shutil.copy(Path(recipe.run_dir) / "student.safetensors", tmp_path / "other.safetensors")
    recipe.checkpoint = str(tmp_path / "other.safetensors")
    assert report(recipe, accelerator)
    assert not any(content_of(recipe)["curves"].values())
    assert content_of(recipe)["benchmark"] is None
    assert "<h2>Training</h2>" not in page_of(recipe).read_text()


def test_zero_shot_tasks_have_a_table_each(recipe: Recipe, accelerator: Accelerator) -> None:
    results = {
        "run": {"ODS": 0.5, "R50": None, "images": 2, "skipped": {"3": "why"}, "of_the_teachers": {"ODS": 0.8}},
        "teacher": {"ODS": 0.625, "R50": 0.0, "images": 3, "skipped": {}, "of_the_teachers": {"ODS": 1.0}},
    }
    student = Path(recipe.run_dir) / "student.safetensors"
    section = {
        "task": "edges", "unit": "images", "columns": ["ODS", "R50"], "limit": None, "results": results,
        "checkpoints": {"run": str(student), "older": str(student)},
        "made_from": {
            "contestants": {
                "run": {"contestant": {"sha256": sha256(student)}},
                "older": {"contestant": {"sha256": "of what lay there before it was trained again"}},
            }
        },
    }  # fmt: skip
    stale = {**section, "results": {**results, "older": results["run"]}}
    write_section(Path(recipe.run_dir) / "evaluation.json", "edges", stale)
    assert report(recipe, accelerator)
    assert content_of(recipe)["tasks"]["edges"] == {
        key: section[key] for key in ("unit", "columns", "limit", "results")
    }
    table = page_of(recipe).read_text().partition('<table id="edges">')[2].partition("</table>")[0]
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in table.split("<tr>")[1:]]
    assert rows == [
        ["ODS", "R50", "images"],
        ["run", "0.5000", "(80.0", "%)", "–", "2,", "1", "skipped"],
        ["teacher", "0.6250", "0.0000", "3"],
    ]
    assert not report(recipe, accelerator)


def test_an_image_that_is_gone_is_named(recipe: Recipe, accelerator: Accelerator) -> None:
    path = Path(recipe.run_dir) / "evaluation.json"
    path.write_text(path.read_text().replace('"sa_', '"gone_'))
    with pytest.raises(InputError, match=r"gone_.* is not among the images any more"):
        report(recipe, accelerator)


def test_no_report_without_an_evaluation(recipe: Recipe, accelerator: Accelerator) -> None:
    os.remove(Path(recipe.run_dir) / "evaluation.json")
    with pytest.raises(InputError, match=r"evaluation\.json is missing, .*run stage=evaluate first"):
        report(recipe, accelerator)
