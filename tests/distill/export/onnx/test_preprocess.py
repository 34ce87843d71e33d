from functools import cache
from itertools import product

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide

from distill.export.encoder import pad_with_mean_colour
from distill.export.onnx.file import open_session
from distill.export.onnx.preprocess import prepend_preprocessing
from embeddings_cache.images.preprocessing import resize_longest_side
from embeddings_cache.images.scenes import generate_scene
from exports import SIZE, onnx_of

SIZES = (
    (1, 1), (2, 3), (31, 977), (977, 31), (1, 300), (480, 640), (683, 1024), (684, 1024), (1023, 1025), (1365, 2048),
    (1080, 1920), (2250, 1500),
)  # fmt: skip
"""Heights and widths, enlarged and reduced; by whole factors, where halves are to be rounded, and by others."""


def identity(size: int, batch: int | str = 1, opset: int = 17) -> onnx.ModelProto:
    """An encoder that gives back what it takes."""
    image, embeddings = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3, size, size])
        for name in ("image", "image_embeddings")
    )
    node = helper.make_node("Identity", ["image"], ["image_embeddings"])
    graph = helper.make_graph([node], "identity", [image], [embeddings])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@cache
def preprocessing(size: int, uint8: bool = True) -> onnxruntime.InferenceSession:
    return open_session(prepend_preprocessing(identity(size), size, uint8).SerializeToString())


def run(session: onnxruntime.InferenceSession, picture: np.ndarray) -> np.ndarray:
    return session.run(None, {"input_image": picture})[0]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def columns_first(picture: np.ndarray, size: int) -> np.ndarray:
    """Pillow's two passes one by one, for which of them it takes first depends on its version and the picture."""
    height, width = ResizeLongestSide.get_preprocess_shape(*picture.shape[:2], size)
    narrow = Image.fromarray(picture).resize((max(width, 1), picture.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(narrow.resize((max(width, 1), max(height, 1)), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("size", [1024, 128])
def test_it_is_pillows_filter_bit_for_bit(size: int) -> None:
    for height, width in SIZES:
        picture = noise(height, width)
        expected = pad_with_mean_colour(columns_first(picture, size), size)
        np.testing.assert_array_equal(run(preprocessing(size), picture), expected, err_msg=f"{height} × {width}")


def test_random_sizes() -> None:
    sizes = np.exp(np.random.default_rng(0).uniform(0, np.log(2500), (40, 2))).astype(int)
    for (height, width), size in product(sizes, (64, 96)):
        picture = noise(height, width)
        if ties(height, width, size):
            continue
        expected = pad_with_mean_colour(columns_first(picture, size), size)
        np.testing.assert_array_equal(run(preprocessing(size), picture), expected, err_msg=f"{height} × {width}")


def ties(height: int, width: int, size: int) -> bool:
    """Whether a side comes to a half pixel, which float64 may round down where S is no power of two."""
    return size & (size - 1) != 0 and any(
        (2 * side * size) % (2 * max(height, width)) == max(height, width) for side in (height, width)
    )


def test_it_is_segment_anythings_resizing_within_a_grey_level() -> None:
    for height, width in SIZES:
        if round(128 * min(height, width) / max(height, width)) < 1:
            continue  # segment-anything has no picture of no rows
        picture = noise(height, width)
        made = run(preprocessing(128), picture)
        padded = pad_with_mean_colour(resize_longest_side(picture, 128), 128)
        apply_image = pad_with_mean_colour(ResizeLongestSide(128).apply_image(picture), 128)
        np.testing.assert_array_equal(padded, apply_image)
        difference = np.abs(made - padded)
        assert difference.max() <= 1, (height, width)
        if height < 2 * width:
            assert not difference.any(), (height, width)


def test_a_picture_of_12_megapixels() -> None:
    picture = noise(3000, 4000)
    expected = pad_with_mean_colour(resize_longest_side(picture, 1024), 1024)
    np.testing.assert_array_equal(run(preprocessing(1024), picture), expected)


def test_floats_are_whole_numbers() -> None:
    picture = noise(200, 150)
    floats = run(preprocessing(128, uint8=False), picture.astype(np.float32))
    np.testing.assert_array_equal(floats, run(preprocessing(128), picture))


def test_the_embedding_is_the_encoders_of_the_preprocessed_picture() -> None:
    encoder = open_session(onnx_of().SerializeToString())
    models = [prepend_preprocessing(onnx_of(), SIZE, uint8) for uint8 in (False, True)]
    sessions = [open_session(model.SerializeToString()) for model in models]
    for height, width in ((150, 209), (190, 60), (1, 1), (31, 977)):
        picture = generate_scene(np.random.default_rng(1), 1000)[0][:height, :width]
        expected = encoder.run(None, {"image": pad_with_mean_colour(columns_first(picture, SIZE), SIZE)})[0]
        for session, kind in zip(sessions, (np.float32, np.uint8), strict=True):
            np.testing.assert_allclose(run(session, picture.astype(kind)), expected, atol=1e-5)


@pytest.mark.parametrize(("uint8", "kind"), [(False, "tensor(float)"), (True, "tensor(uint8)")])
def test_one_input_and_nothing_that_older_runtimes_lack(uint8: bool, kind: str) -> None:
    before = onnx_of().SerializeToString()
    model = prepend_preprocessing(onnx_of(), SIZE, uint8)
    assert onnx_of().SerializeToString() == before
    session = open_session(model.SerializeToString())
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("input_image", kind, ["image_height", "image_width", 3])
    assert (made.name, made.shape) == ("image_embeddings", [1, 128, 8, 8])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [
        (entry.domain, entry.version) for entry in onnx_of().opset_import
    ]
    inferred = onnx.shape_inference.infer_shapes(model)
    doubles = [
        value.name for value in inferred.graph.value_info if value.type.tensor_type.elem_type == TensorProto.DOUBLE
    ]
    assert not doubles


def test_an_encoder_of_batches_takes_a_picture() -> None:
    session = open_session(prepend_preprocessing(identity(64, "N"), 64, uint8=True).SerializeToString())
    np.testing.assert_array_equal(run(session, noise(50, 70)), run(preprocessing(64), noise(50, 70)))


def test_encoders_of_newer_opsets() -> None:
    for opset in (18, 20):
        session = open_session(prepend_preprocessing(identity(64, opset=opset), 64, uint8=True).SerializeToString())
        np.testing.assert_array_equal(run(session, noise(50, 70)), run(preprocessing(64), noise(50, 70)))


def test_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the encoder takes image \[1, 3, 64, 64\], not image \[1, 3, 128, 128\]"):
        prepend_preprocessing(identity(64), 128)
