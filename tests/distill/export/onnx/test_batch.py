"""Many prompts on one image in a pass."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from segment_anything import SamPredictor

from distill.export.onnx.batch import batch_decoder_model, batch_feeds, export_batch_decoder
from distill.export.onnx.file import open_session
from distill.export.prompts import place_embedding, predicted, prompts_of
from distill.export.proof import ParityError
from exports import SIZE, reference_of, toy


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    path = tmp_path_factory.mktemp("batch") / "decoder_batch.onnx"
    return path, export_batch_decoder(batch_decoder_model(toy()), reference_of(), path)


def test_a_grid_of_points_gives_segment_anythings_masks(made: tuple[Path, dict]) -> None:
    path, entry = made
    reference = reference_of()
    row, embedding = reference.rows[0], reference.embeddings[0]
    predictor = SamPredictor(reference.decoder)
    place_embedding(predictor, embedding, row)
    height, width = row.original_size
    points = np.stack(np.meshgrid(np.linspace(5, width - 5, 5), np.linspace(5, height - 5, 5)), -1).reshape(-1, 1, 2)
    prompts = [{"point_coords": each, "point_labels": np.ones(1)} for each in points]
    low_res, iou = open_session(path).run(["low_res_masks", "iou_predictions"], batch_feeds(predictor, prompts))
    assert low_res.shape == (25, 4, SIZE // 4, SIZE // 4)
    assert iou.shape == (25, 4)
    coords = predictor.transform.apply_coords(points[:, 0], row.original_size)[:, None]
    expected = predictor.predict_torch(torch.as_tensor(coords), torch.ones(25, 1), multimask_output=True)
    np.testing.assert_allclose(iou[:, 1:], expected[1].numpy(), atol=1e-4)
    np.testing.assert_allclose(low_res[:, 1:], expected[2].numpy(), atol=1e-3)
    assert entry["parity"]["masks"] >= 40


def test_earlier_masks_are_heeded_prompt_by_prompt(made: tuple[Path, dict]) -> None:
    path, _ = made
    reference = reference_of()
    predictor = SamPredictor(reference.decoder)
    place_embedding(predictor, reference.embeddings[0], reference.rows[0])
    height, width = reference.rows[0].original_size
    click = {"point_coords": np.array([[width / 2, height / 2]]), "point_labels": np.ones(1)}
    _, _, first = predictor.predict(**click)
    again = {**click, "mask_input": first[1:2]}
    session = open_session(path)
    both, _ = session.run(["low_res_masks", "iou_predictions"], batch_feeds(predictor, [click, again]))
    for place, prompt in enumerate((click, again)):
        _, _, expected = predictor.predict(**prompt, multimask_output=True)
        np.testing.assert_allclose(both[place, 1:], expected, atol=1e-3)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_a_decoder_that_ignores_earlier_masks_is_not_kept(tmp_path: Path) -> None:
    model = batch_decoder_model(toy())
    for node in model.graph.node:
        if node.op_type == "Greater":  # has_mask_input > 0
            node.op_type = "Less"
    onnx.checker.check_model(model)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export_batch_decoder(model, reference_of(), tmp_path / "decoder_batch.onnx")
    assert not list(tmp_path.iterdir())


def test_points_that_are_not_there_change_nothing(made: tuple[Path, dict]) -> None:
    """A padding point of SAM's own is a token, and one more changes a box's mask."""
    path, _ = made
    reference = reference_of()
    predictor = SamPredictor(reference.decoder)
    place_embedding(predictor, reference.embeddings[0], reference.rows[0])
    session = open_session(path)
    for prompt in prompts_of(reference.rows[0]):
        feeds = batch_feeds(predictor, [prompt])
        alone = session.run(["low_res_masks"], feeds)[0]
        filler = np.full((1, 7, 2), 50, np.float32)  # wherever they lie
        feeds["point_coords"] = np.concatenate([feeds["point_coords"], filler], axis=1)
        feeds["point_labels"] = np.concatenate([feeds["point_labels"], np.full((1, 7), -1, np.float32)], axis=1)
        np.testing.assert_allclose(session.run(["low_res_masks"], feeds)[0], alone, atol=1e-3)
        np.testing.assert_allclose(alone, predicted(predictor, prompt, False)[2], atol=1e-3)


def test_a_mask_alone_is_a_prompt(made: tuple[Path, dict]) -> None:
    path, _ = made
    reference = reference_of()
    predictor = SamPredictor(reference.decoder)
    place_embedding(predictor, reference.embeddings[0], reference.rows[0])
    click = next(prompts_of(reference.rows[0]))
    earlier = predictor.predict(**click)[2][:1]
    feeds = batch_feeds(predictor, [{**click, "mask_input": earlier}])
    feeds["point_labels"][:] = -1
    found = open_session(path).run(["low_res_masks"], feeds)[0]
    expected = predictor.predict(mask_input=earlier, multimask_output=True)[2]
    np.testing.assert_allclose(found[0, 1:], expected, atol=1e-3)
