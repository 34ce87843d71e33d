from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from students import InputError, create_student, load_student, read_metadata, save_student

NUMBERS = {"widths": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def test_a_student_comes_back_from_its_file_alone(tmp_path: Path) -> None:
    student = create_student("repvit_m0_9", image_size=128, embed_dim=64, **NUMBERS)
    student(torch.randn(2, 3, 128, 128))  # moves the batch statistics away from their start
    save_student(tmp_path / "s.safetensors", student, {"recipe": "name: x"})
    loaded = load_student(tmp_path / "s.safetensors")
    assert loaded.config == student.config
    assert not loaded.training
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded(image), student.eval()(image))
    assert read_metadata(tmp_path / "s.safetensors")["recipe"] == "name: x"
    assert (tmp_path / "s.safetensors").stat().st_mode & 0o777 == 0o644  # for whoever it is handed to


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x80\x02}q\x00."])
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_student(tmp_path / "s.safetensors")


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a student of ours"):
        load_student(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no student at"):
        load_student(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "said", ["{", "[]", '{"size": 3}', '{"name": "repvit_m0_9", "overrides": {"checkpoint_path": "x"}}']
)
def test_a_config_that_makes_no_sense_is_refused(said: str, tmp_path: Path) -> None:
    metadata = {"format": "sam-distill student", "student": said}
    save_file({"weight": torch.zeros(2)}, tmp_path / "s.safetensors", metadata)
    with pytest.raises(InputError, match=r"does not say what student it holds|has no 'checkpoint_path'"):
        load_student(tmp_path / "s.safetensors")


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    student = create_student("repvit_m0_9", image_size=128, **NUMBERS)
    object.__setattr__(student.config, "embed_dim", 32)
    save_student(tmp_path / "s.safetensors", student, {})
    with pytest.raises(InputError, match="does not hold the weights of a repvit_m0_9"):
        load_student(tmp_path / "s.safetensors")
