from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel

from distill.export.onnx.decoder import export_onnx_decoder, low_res_model, run_decoder
from distill.export.onnx.file import open_session
from distill.export.onnx.postprocess import append_postprocessing
from distill.export.prompts import Prompt, points_of
from distill.export.proof import ParityError, Reference
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from exports import reference_of, scene_row, toy

SIZES = [(1024, 1024), (1500, 2250), (600, 400), (400, 600), (480, 640), (3000, 2000), (31, 977), (1, 1)]
"""Height and width."""


def model(sam: Sam, single: bool = True, crop: bool = False) -> onnx.ModelProto:
    return append_postprocessing(low_res_model(sam, single), crop)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return toy(256)


@pytest.fixture(scope="module")
def files(sam: Sam, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("decoders")
    made = {"single": model(sam), "four": model(sam, single=False), "cropped": model(sam, crop=True)}
    for name, graph in made.items():
        onnx.save(graph, directory / f"{name}.onnx")
    return {name: directory / f"{name}.onnx" for name in made}


def predictor_of(sam: Sam, height: int, width: int) -> SamPredictor:
    """A predictor that has seen a scene, scaled to some size."""
    scene = Image.fromarray(generate_scene(np.random.default_rng(3), 256)[0])
    predictor = SamPredictor(sam)
    predictor.set_image(np.asarray(scene.resize((width, height))))
    return predictor


def prompts(height: int, width: int) -> dict[str, Prompt]:
    """Each as `SamPredictor.predict` takes it, in pixels of the image."""
    rng = np.random.default_rng(0)
    seven = rng.uniform(0, 1, (7, 2)) * (width, height)
    labels = np.array([1, 1, 0, 1, 0, 0, 1])
    box = np.array([0.2 * width, 0.3 * height, 0.7 * width, 0.8 * height])
    return {
        "a point": {"point_coords": seven[:1], "point_labels": labels[:1]},
        "two points": {"point_coords": seven[:2], "point_labels": labels[:2]},
        "seven points": {"point_coords": seven, "point_labels": labels},
        "a box": {"box": box},
        "a point and a box": {"point_coords": seven[2:3], "point_labels": labels[2:3], "box": box},
    }


def assert_equal_masks(found: np.ndarray, expected: np.ndarray) -> None:
    """Logits within 1e-3, and equal masks: a pixel may only flip where rounding decides its sign."""
    assert found.shape == expected.shape
    apart = np.abs(found - expected)
    assert apart.max() <= 1e-3
    flipped = (found > 0) != (expected > 0)
    assert not flipped[np.abs(expected) > 1e-4].any()
    assert flipped.mean() < 1e-4


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_four_masks_are_sam_predictors_at_every_size(height: int, width: int, sam: Sam, files: dict[str, Path]) -> None:
    predictor, session = predictor_of(sam, height, width), open_session(files["four"])
    for prompt in prompts(height, width).values():
        for earlier in (None, np.random.default_rng(1).normal(0, 5, (1, 64, 64)).astype(np.float32)):
            prompt = {**prompt, **({} if earlier is None else {"mask_input": earlier})}
            found = run_decoder(session, predictor, prompt)
            one = predictor.predict(**prompt, multimask_output=False, return_logits=True)
            three = predictor.predict(**prompt, multimask_output=True, return_logits=True)
            assert_equal_masks(found["masks"][0, :1], one[0])
            assert_equal_masks(found["masks"][0, 1:], three[0])
            np.testing.assert_allclose(found["iou_predictions"][0], np.append(one[1], three[1]), atol=1e-5)
            np.testing.assert_allclose(found["low_res_masks"][0, 1:], three[2], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_single_mask_is_the_one_that_segment_anything_chooses(
    height: int, width: int, sam: Sam, files: dict[str, Path]
) -> None:
    """Against segment-anything's own ONNX model, run by PyTorch."""
    theirs = SamOnnxModel(sam, return_single_mask=True).eval()
    predictor, session = predictor_of(sam, height, width), open_session(files["single"])
    for prompt in prompts(height, width).values():
        found = run_decoder(session, predictor, prompt)
        coords, labels = (torch.from_numpy(part) for part in points_of(predictor, prompt))
        nothing = torch.zeros(1, 1, 64, 64), torch.zeros(1)
        size = torch.tensor([height, width], dtype=torch.float32)
        masks, iou, low_res = theirs(predictor.features, coords, labels, *nothing, size)
        assert_equal_masks(found["masks"], masks.numpy())
        assert_equal_masks(found["low_res_masks"], low_res.numpy())
        np.testing.assert_allclose(found["iou_predictions"], iou.numpy(), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cvat_gets_the_object_alone_and_where_it_is(height: int, width: int, sam: Sam, files: dict[str, Path]) -> None:
    predictor = predictor_of(sam, height, width)
    whole, cropped = open_session(files["single"]), open_session(files["cropped"])
    for prompt in prompts(height, width).values():
        mask = run_decoder(whole, predictor, prompt)["masks"][0, 0] > 0
        found = run_decoder(cropped, predictor, prompt)
        xtl, ytl, xbr, ybr = (int(found[name][0]) for name in ("xtl", "ytl", "xbr", "ybr"))
        assert found["masks"].dtype == np.uint8
        if mask.any():
            rows, columns = np.nonzero(mask)
            assert (xtl, ytl, xbr, ybr) == (columns.min(), rows.min(), columns.max(), rows.max())
        np.testing.assert_array_equal(found["masks"][0, 0], mask[ytl : ybr + 1, xtl : xbr + 1])


@pytest.mark.slow
def test_an_empty_mask_is_one_pixel_for_cvat(tmp_path: Path) -> None:
    sam = load_teacher("toy", None, 128)
    for network in sam.mask_decoder.output_hypernetworks_mlps:
        torch.nn.init.zeros_(network.layers[-1].weight)
        torch.nn.init.zeros_(network.layers[-1].bias)
    onnx.save(model(sam, crop=True), tmp_path / "decoder.onnx")
    found = run_decoder(open_session(tmp_path / "decoder.onnx"), predictor_of(sam, 60, 90), prompts(60, 90)["a point"])
    assert found["masks"].tolist() == [[[[0]]]]
    assert [int(found[name][0]) for name in ("xtl", "ytl", "xbr", "ybr")] == [0, 0, 0, 0]


def test_sizes_that_divide_badly_are_cut_where_the_resizing_put_them(sam: Sam, files: dict[str, Path]) -> None:
    """The short side is rounded in float64; in float32 some of these come out a pixel off."""
    session, rng = open_session(files["single"]), np.random.default_rng(0)
    predictor = predictor_of(sam, 40, 40)
    low_res = predictor.predict(box=np.array([5, 5, 30, 30]), multimask_output=False)[2]
    for height, width in [*rng.integers(1, 5000, (40, 2)).tolist(), [3, 512], [5, 512], [1365, 2048]]:
        longest = max(height, width)
        if height * width > 2_000_000 or min(height, width) * 256 < longest:
            continue
        predictor.original_size = (height, width)
        predictor.input_size = predictor.transform.get_preprocess_shape(height, width, 256)
        prompt = {
            "point_coords": np.array([[width / 2, height / 2]]),
            "point_labels": np.ones(1),
            "mask_input": low_res,
        }
        found = run_decoder(session, predictor, prompt)
        best = np.argmax(predictor.predict(**prompt)[1])
        assert_equal_masks(found["masks"][0, 0], predictor.predict(**prompt, return_logits=True)[0][best])


def test_inputs_and_outputs_are_segment_anythings(files: dict[str, Path]) -> None:
    for name, path in files.items():
        onnx.checker.check_model(onnx.load(path), full_check=True)
        session = open_session(path)
        assert [entry.name for entry in session.get_inputs()] == [
            "image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size",
        ]  # fmt: skip
        outputs = [entry.name for entry in session.get_outputs()]
        assert outputs[:3] == ["masks", "iou_predictions", "low_res_masks"]
        assert outputs[3:] == (["xtl", "ytl", "xbr", "ybr"] if name == "cropped" else [])


@pytest.mark.parametrize("broken", ["masks", "iou_predictions", "mask_input"])
def test_each_output_and_an_earlier_mask_are_compared(
    broken: str, sam: Sam, tmp_path: Path, files: dict[str, Path]
) -> None:
    """Of a decoder whose logits are right: no object for CVAT, predicted IoUs negated, the earlier mask unheeded."""
    graph = onnx.load(files["cropped" if broken == "masks" else "single"])
    if broken == "mask_input":
        for node in graph.graph.node:
            node.input[:] = ["never" if name == "has_mask_input" else name for name in node.input]
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "never"))
    else:
        for node in graph.graph.node:
            node.output[:] = [f"{name}_before" if name == broken else name for name in node.output]
        operator = "Sub" if broken == "masks" else "Neg"
        inputs = [f"{broken}_before"] * (2 if operator == "Sub" else 1)
        graph.graph.node.append(onnx.helper.make_node(operator, inputs, [broken]))
    row = scene_row(0, 256)
    compared = Reference(sam.image_encoder, sam, [row])
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export_onnx_decoder(graph, compared, tmp_path / "decoder.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_decoder_is_described_and_one_of_another_sam_is_refused(tmp_path: Path) -> None:
    compared = reference_of()
    described = export_onnx_decoder(model(toy()), compared, tmp_path / "decoder.onnx")
    assert described["parity"]["max_difference"] <= described["parity"]["allowed"]["max_difference"] == 1e-3
    assert described["inputs"]["image_embeddings"]["shape"] == [1, 128, 8, 8]
    assert described["outputs"]["low_res_masks"]["shape"] == [1, 1, 32, 32]
    other = load_teacher("toy", None, 128)
    torch.nn.init.normal_(other.prompt_encoder.point_embeddings[1].weight)
    with pytest.raises(ParityError, match=r"^decoder_cvat\.onnx differs from PyTorch: by "):
        export_onnx_decoder(model(other, crop=True), compared, tmp_path / "decoder_cvat.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.onnx"]
