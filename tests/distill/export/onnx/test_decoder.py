import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.onnx import SamOnnxModel
from segment_anything.utils.transforms import ResizeLongestSide

from distill.export.onnx.decoder import (
    decoder_model,
    export_onnx_decoder,
    low_res_model,
    run_decoder,
    uncropped,
)
from distill.export.onnx.file import open_session
from distill.export.prompts import Prompt, points_of
from distill.export.proof import ParityError, Reference
from embeddings_cache.images.scenes import generate_scene
from embeddings_cache.teacher.loading import load_teacher
from exports import reference_of, scene_row, toy

SIZES = [(1024, 1024), (1500, 2250), (600, 400), (400, 600), (480, 640), (3000, 2000), (31, 977), (1, 1)]
"""Height and width."""


def model(sam: Sam, single: bool = True, crop: bool = False) -> onnx.ModelProto:
    return decoder_model(low_res_model(sam, single), crop)


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
    """Against segment-anything's own ONNX model, run by PyTorch; of a box alone that takes one of three masks, which
    `SamPredictor`'s users do not ask for."""
    theirs = SamOnnxModel(sam, return_single_mask=True).eval()
    predictor, session = predictor_of(sam, height, width), open_session(files["single"])
    for name, prompt in prompts(height, width).items():
        found = run_decoder(session, predictor, prompt)
        if name == "a box":
            masks, _, low_res = predictor.predict(**prompt, multimask_output=False, return_logits=True)
            assert_equal_masks(found["masks"][0], masks)
            assert_equal_masks(found["low_res_masks"][0], low_res)
            continue
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
        logits = run_decoder(whole, predictor, prompt)["masks"][0, 0]
        mask = logits > 0
        found = run_decoder(cropped, predictor, prompt)
        xtl, ytl, xbr, ybr = (int(found[name][0]) for name in ("xtl", "ytl", "xbr", "ybr"))
        assert found["masks"].dtype == np.uint8
        if mask.any():
            rows, columns = np.nonzero(mask)
            assert (xtl, ytl, xbr, ybr) == (columns.min(), rows.min(), columns.max(), rows.max())
        flipped = found["masks"][0, 0] != mask[ytl : ybr + 1, xtl : xbr + 1]
        assert np.abs(logits[ytl : ybr + 1, xtl : xbr + 1][flipped]).max(initial=0) < 1e-4  # rounding decides those


def tail_alone(side: int) -> onnxruntime.InferenceSession:
    """What follows the low-resolution masks of CVAT's decoder: they are an input, for images of `side` px."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    given = helper.make_tensor_value_info("given", kind, [1, 1, side // 4, side // 4])
    coords = helper.make_tensor_value_info("point_coords", kind, [1, "num_points", 2])
    labels = helper.make_tensor_value_info("point_labels", kind, [1, "num_points"])
    made = helper.make_tensor_value_info("low_res_masks", kind, [1, 1, side // 4, side // 4])
    ious = helper.make_tensor_value_info("iou_predictions", kind, [1, 1])
    nodes = [
        helper.make_node("Identity", ["given"], ["low_res_masks"]),
        helper.make_node("ReduceSum", ["point_coords", "both"], ["sums"], keepdims=0),
        helper.make_node("Mul", ["sums", "point_labels"], ["products"]),
        helper.make_node("ReduceSum", ["products", "last"], ["iou_predictions"]),
    ]
    axes = {"both": np.array([2]), "last": np.array([1])}
    graph = helper.make_graph(
        nodes, "tail", [given, coords, labels], [made, ious],
        [onnx.numpy_helper.from_array(value, name) for name, value in axes.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return open_session(decoder_model(model, crop=True).SerializeToString())


def test_the_object_is_the_predictors_wherever_it_lies(sam: Sam) -> None:
    """Rectangles and noise of any place and size, in images of any size: where what is enlarged has as many rows or
    columns before and after, ONNX Runtime would copy these from the top."""
    session, rng = tail_alone(256), np.random.default_rng(0)
    equal = 0
    for number in range(600):
        height, width = (int(side) for side in rng.integers(20, 700, 2))
        low_res = np.full((1, 1, 64, 64), -8, np.float32)
        top, left, bottom, right = (int(place) for place in rng.integers(0, 64, 4))
        low_res[..., min(top, bottom) : max(top, bottom) + 1, min(left, right) : max(left, right) + 1] = 8
        low_res += rng.normal(0, number % 3, low_res.shape).astype(np.float32)
        input_size = ResizeLongestSide.get_preprocess_shape(height, width, 256)
        expected = sam.postprocess_masks(torch.from_numpy(low_res), input_size, (height, width))[0, 0].numpy()
        feeds = {
            "given": low_res,
            "point_coords": np.ones((1, 1, 2), np.float32),
            "point_labels": np.ones((1, 1), np.float32),
            "orig_im_size": np.array([height, width], np.float32),
        }
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, feeds), strict=True))
        mask = uncropped(found, (height, width))
        flipped = mask != (expected > 0)
        assert np.abs(expected[flipped]).max(initial=0) < 1e-3, (height, width, top, left, bottom, right)
        equal += not flipped.any()
    assert equal > 500


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


def asked(session: onnxruntime.InferenceSession, predictor: SamPredictor, **feeds: Any) -> dict[str, np.ndarray]:
    """What a client gets that feeds its own tensors: `coords` (N, 2) in pixels of the resized image, `labels` (N,)."""
    coords = np.asarray(feeds.pop("coords"), np.float32).reshape(1, -1, 2)
    whole = {
        "image_embeddings": predictor.features.numpy(),
        "point_coords": coords,
        "point_labels": np.asarray(feeds.pop("labels"), np.float32).reshape(1, -1),
        "mask_input": np.zeros((1, 1, 64, 64), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(predictor.original_size, np.float32),
        **feeds,
    }
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, whole), strict=True))


def test_a_prompt_without_its_end_is_understood(sam: Sam, files: dict[str, Path]) -> None:
    """CVAT's plugin of today, osam and X-AnyLabeling's efficientvit_sam send no end; AnyLabeling sends it
    beside a box too."""
    predictor = predictor_of(sam, 150, 200)
    a, b, box = [60.0, 70.0], [120.0, 90.0], np.array([30.0, 20.0, 150.0, 120.0])
    resized = predictor.transform.apply_coords(np.array([a, b, box[:2], box[2:]]), (150, 200))
    a_, b_, *corners = resized.tolist()
    nothing = [0.0, 0.0]
    three = [  # tensors that mean one thing, and what SamPredictor is asked for it
        ([([a_], [1]), ([a_, nothing], [1, -1])], {"point_coords": np.array([a]), "point_labels": np.ones(1)}),
        (
            [([a_, b_], [1, 0]), ([a_, b_, nothing], [1, 0, -1])],
            {"point_coords": np.array([a, b]), "point_labels": np.array([1, 0])},
        ),
        ([(corners, [2, 3]), ([*corners, nothing], [2, 3, -1])], {"box": box}),
        (
            [
                ([*corners, a_], [2, 3, 1]),
                ([a_, *corners], [1, 2, 3]),
                ([a_, nothing, *corners, nothing], [1, -1, 2, 3, -1]),
            ],
            {"point_coords": np.array([a]), "point_labels": np.ones(1), "box": box},
        ),
    ]
    for name, session in ((name, open_session(path)) for name, path in files.items()):
        for tensors, prompt in three:
            ambiguous = "box" not in prompt and len(prompt["point_coords"]) == 1
            _, ious, low_res = predictor.predict(**prompt, multimask_output=ambiguous)
            for coords, labels in tensors:
                found = asked(session, predictor, coords=coords, labels=labels)
                if name == "four":
                    some = slice(1, 4) if ambiguous else slice(0, 1)
                    np.testing.assert_allclose(found["low_res_masks"][0, some], low_res, atol=1e-3)
                    continue
                best = int(ious.argmax())
                np.testing.assert_allclose(found["low_res_masks"][0, 0], low_res[best], atol=1e-3)
                np.testing.assert_allclose(found["iou_predictions"][0, 0], ious[best], atol=1e-5)


def test_no_click_at_all_is_an_answer(sam: Sam, files: dict[str, Path]) -> None:
    """As CVAT's plugin asks while a user has only chosen the tool: the padding alone."""
    predictor, session = predictor_of(sam, 150, 200), open_session(files["single"])
    none = asked(session, predictor, coords=[], labels=[])
    padding = asked(session, predictor, coords=[[0, 0]], labels=[-1])
    np.testing.assert_array_equal(none["masks"], padding["masks"])


@pytest.mark.parametrize("says", [0.0, -1.0])
def test_an_earlier_mask_is_heeded_above_0_alone(says: float, sam: Sam, files: dict[str, Path]) -> None:
    """osam sends −1 for none, and what lies in a tensor that is not heeded may be anything."""
    predictor, session = predictor_of(sam, 150, 200), open_session(files["single"])
    point = {"coords": [[50, 60]], "labels": [1]}
    junk = np.full((1, 1, 64, 64), np.nan, np.float32)
    expected = asked(session, predictor, **point)
    found = asked(session, predictor, **point, mask_input=junk, has_mask_input=np.array([says], np.float32))
    np.testing.assert_array_equal(found["masks"], expected["masks"])


def test_the_padding_is_cut_where_resizing_put_it_at_every_size() -> None:
    """Both graphs' arithmetic in NumPy, on all sizes up to 8,192 (height and width trade places): integers for powers
    of two, and float64 for others, where integers are wrong."""
    for side, integers in ((256, True), (512, True), (1024, True), (768, False)):
        wrong = 0
        for longest in range(1, 8193):
            short = np.arange(1, longest + 1)
            expected = (short * (side * 1.0 / longest) + 0.5).astype(int)  # ResizeLongestSide.get_preprocess_shape
            wrong += int(((2 * short * side + longest) // (2 * longest) != expected).sum())
        assert (wrong == 0) is integers


@pytest.mark.parametrize("encoder_size", [256, 384])
def test_unpadding_is_the_predictors_at_ties(encoder_size: int, tmp_path: Path) -> None:
    """5632 × 110 px, at 384: the short side is 7.5, and float64 says 7."""
    sam = toy(encoder_size)
    onnx.save(model(sam), tmp_path / "decoder.onnx")
    session = open_session(tmp_path / "decoder.onnx")
    doubles = {node.op_type for node in onnx.load(tmp_path / "decoder.onnx").graph.node if _makes_float64(node)}
    assert bool(doubles) is (encoder_size == 384)
    predictor = predictor_of(sam, 40, 40)
    low_res = predictor.predict(box=np.array([5, 5, 30, 30]), multimask_output=False)[2]
    for height, width in ((110, 5632), (55, 2816), (2816, 55)):
        predictor.original_size = (height, width)
        predictor.input_size = predictor.transform.get_preprocess_shape(height, width, encoder_size)
        prompt = {"box": np.array([1, 1, width - 1, height - 1]), "mask_input": low_res}
        expected = predictor.predict(**prompt, multimask_output=False, return_logits=True)[0]
        assert_equal_masks(run_decoder(session, predictor, prompt)["masks"][0], expected)


def _makes_float64(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.DOUBLE


@pytest.mark.parametrize("opset", [18, 20])
def test_newer_opsets_compute_the_same(opset: int, sam: Sam, files: dict[str, Path], tmp_path: Path) -> None:
    predictor = predictor_of(sam, 150, 200)
    for name, single, crop in (("single", True, False), ("cropped", True, True)):
        newer = decoder_model(low_res_model(sam, single, opset), crop)
        assert [(entry.domain, entry.version) for entry in newer.opset_import] == [("", opset)]
        onnx.save(newer, tmp_path / "decoder.onnx")
        for prompt in prompts(150, 200).values():
            found = run_decoder(open_session(tmp_path / "decoder.onnx"), predictor, prompt)
            for key, expected in run_decoder(open_session(files[name]), predictor, prompt).items():
                np.testing.assert_allclose(found[key], expected, atol=1e-4)


CLICK = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
feeds = {
    "image_embeddings": np.load(sys.argv[2]), "point_coords": np.array([[[0, 0], [256, 256]]], np.float32),
    "point_labels": np.array([[2, 3]], np.float32), "mask_input": np.full((1, 1, 64, 64), 20, np.float32),
    "has_mask_input": np.ones(1, np.float32), "orig_im_size": np.array([6124, 8165], np.float32),
}
masks, *_ = session.run(None, feeds)
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(masks.shape[2] * masks.shape[3] / (6124 * 8165), int(peak.split()[1]) / 1024)
"""


@pytest.mark.slow
def test_a_click_on_fifty_megapixels_takes_little_memory(sam: Sam, files: dict[str, Path], tmp_path: Path) -> None:
    """Even where the object is the whole picture."""
    np.save(tmp_path / "embedding.npy", predictor_of(sam, 192, 256).features.numpy())
    command = [sys.executable, "-c", CLICK, str(files["cropped"]), str(tmp_path / "embedding.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    share, peak = map(float, done.stdout.split())
    assert share > 0.9
    assert peak < 600


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
