"""Checkpoints as training code leaves them: wrapped, prefixed, in half precision, with other things beside."""

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from published import read_peer
from students import InputError, identify, load_checkpoint
from students.imagenet import load_from_file
from students.state_dicts import read_state_dict

State = dict[str, torch.Tensor]
ENCODER = "image_encoder."
TRAINING = {
    "epoch": 3,
    "name": "tuned",
    "best": 0.93,
    "loss": torch.tensor(0.2),
    "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
    "lr_scheduler": {"last_epoch": 3, "_last_lr": [1e-4]},
}
"""What training scripts save beside the weights."""


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def holds(path: Path, expected: State) -> bool:
    """Whether a checkpoint loads as the small SAM with these very weights."""
    sam = load_checkpoint(path)
    student = sam.image_encoder
    assert student.config.name == "repvit_m0_9"
    assert {parameter.dtype for parameter in sam.parameters()} == {torch.float32}
    neck = torch.equal(student.neck[0].weight, expected[f"{ENCODER}neck.0.weight"].float())
    decoder = sam.mask_decoder.state_dict()
    return neck and all(torch.equal(t, expected[f"mask_decoder.{name}"].float()) for name, t in decoder.items())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "sam.", "net.", "sam_model.", "a.b_c.d."]
)
def test_a_prefix_that_all_names_share(prefix: str, hollow_vit_b: State, tmp_path: Path) -> None:
    torch.save(prefixed(hollow_vit_b, prefix), tmp_path / "sam.pth")
    assert identify(tmp_path / "sam.pth") == ("vit_b", True)


def test_parts_that_were_compiled_or_sharded_by_themselves(hollow_vit_b: State, tmp_path: Path) -> None:
    compiled = {
        name.replace(ENCODER, f"sam.{ENCODER}_orig_mod._fsdp_wrapped_module.")
        if name.startswith(ENCODER)
        else f"sam.{name}": tensor
        for name, tensor in hollow_vit_b.items()
    }
    torch.save(compiled, tmp_path / "sam.pth")
    assert identify(tmp_path / "sam.pth") == ("vit_b", True)


@pytest.mark.parametrize(
    "wrap",
    [
        *(
            pytest.param(lambda state, name=name: {**TRAINING, name: state}, id=name)
            for name in ("model", "state_dict", "model_state_dict", "net", "sam_model", "weights", "ema", "my_network")
        ),
        pytest.param(lambda state: {"model": {"state_dict": state, "epoch": 1}, **TRAINING}, id="nested"),
        pytest.param(lambda state: {"ema": {"module": prefixed(state, "module."), "decay": 0.999}}, id="ema of DDP"),
        pytest.param(
            lambda state: {"state_dict": prefixed(state, "model."), "hyper_parameters": {"lr": 0.1}}, id="Lightning"
        ),
        pytest.param(lambda state: {**state, "epoch": 3, "name": "flat"}, id="numbers among the weights"),
        pytest.param(OrderedDict, id="OrderedDict"),
    ],
)
def test_wrapped_with_what_else_training_saves(
    wrap: Callable[[State], dict], hollow_vit_b: State, tmp_path: Path
) -> None:
    torch.save(wrap(hollow_vit_b), tmp_path / "sam.pth")
    assert identify(tmp_path / "sam.pth") == ("vit_b", True)


def test_of_weights_and_their_average_the_weights_are_taken(small_sam: State, tmp_path: Path) -> None:
    averaged = {name: torch.zeros_like(tensor) for name, tensor in small_sam.items()}
    torch.save({"ema": averaged, "model": prefixed(small_sam, "sam_model."), **TRAINING}, tmp_path / "sam.pth")
    assert holds(tmp_path / "sam.pth", small_sam)


def test_what_is_no_state_dict_says_what_it_has(tmp_path: Path) -> None:
    torch.save(TRAINING["optimizer"], tmp_path / "optimizer.pth")
    with pytest.raises(InputError, match=r"holds no state dict .*, but a dict of 2 entries \(state, param_groups\)"):
        load_checkpoint(tmp_path / "optimizer.pth")


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.backbone.", "sam.image_encoder."])
def test_an_encoder_alone(prefix: str, hollow_vit_b: State, tmp_path: Path) -> None:
    encoder = {prefix + key.removeprefix(ENCODER): t for key, t in hollow_vit_b.items() if key.startswith(ENCODER)}
    torch.save({"model": encoder, "epoch": 3}, tmp_path / "encoder.pth")
    assert identify(tmp_path / "encoder.pth") == ("vit_b", False)


@pytest.mark.parametrize("peer", ["mobile_sam", "repvit_sam", "edge_sam"])
def test_a_published_encoder_without_its_prefix(peer: str, tmp_path: Path) -> None:
    layout = read_peer(peer)["layout"]
    encoder = {name.removeprefix(ENCODER): torch.tensor(0.0).expand(shape) for name, shape in layout.items()}
    torch.save(encoder, tmp_path / "encoder.pth")
    assert identify(tmp_path / "encoder.pth") == (peer, False)


def test_an_encoder_without_its_prefix_has_its_weights(small_sam: State, tmp_path: Path) -> None:
    encoder = {key.removeprefix(ENCODER): t for key, t in small_sam.items() if key.startswith(ENCODER)}
    torch.save(encoder, tmp_path / "encoder.pth")
    sam = load_checkpoint(tmp_path / "encoder.pth")
    torch.save(small_sam, tmp_path / "whole.pth")
    expected = load_checkpoint(tmp_path / "whole.pth").image_encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sam.image_encoder.state_dict().items())


def test_of_two_encoders_neither_is_guessed(hollow_vit_b: State, tmp_path: Path) -> None:
    torch.save({**prefixed(hollow_vit_b, "teacher."), **prefixed(hollow_vit_b, "student.")}, tmp_path / "both.pth")
    expected = r"holds 2 image encoders \(teacher\.image_encoder\., student\.image_encoder\.\): save the one"
    with pytest.raises(InputError, match=expected):
        load_checkpoint(tmp_path / "both.pth")


MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@pytest.mark.parametrize(
    ("prefix", "mean", "std"),
    [
        ("", MEAN.view(-1, 1, 1), STD.view(-1, 1, 1)),
        ("module.sam.", MEAN.view(1, 3, 1, 1).bfloat16(), STD.view(1, 3, 1, 1).half()),
        ("", torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])),
    ],
)
def test_sams_own_statistics_of_pixels_are_nothing_new(
    prefix: str, mean: torch.Tensor, std: torch.Tensor, hollow_vit_b: State, tmp_path: Path
) -> None:
    torch.save(prefixed({**hollow_vit_b, "pixel_mean": mean, "pixel_std": std}, prefix), tmp_path / "sam.pth")
    assert identify(tmp_path / "sam.pth") == ("vit_b", True)


def test_other_statistics_of_pixels_are_refused(hollow_vit_b: State, tmp_path: Path) -> None:
    torch.save({"model": {**hollow_vit_b, "pixel_mean": torch.full((3, 1, 1), 127.5)}}, tmp_path / "sam.pth")
    expected = (
        r"sam\.pth normalises images by pixel_mean \[127\.5, 127\.5, 127\.5\]; "
        r"here they are normalised by SAM's, \[123\.675, 116\.28, 103\.53\]$"
    )
    with pytest.raises(InputError, match=expected):
        load_checkpoint(tmp_path / "sam.pth")


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".pth", torch.float16), (".safetensors", torch.bfloat16), (".pth", torch.float64)]
)
def test_other_precisions_load_as_float32(suffix: str, dtype: torch.dtype, small_sam: State, tmp_path: Path) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in small_sam.items()}
    path = tmp_path / f"sam{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    assert holds(path, state)


def test_weights_in_several_files(small_sam: State, tmp_path: Path) -> None:
    """As `save_pretrained` divides what is large; taken by their index or their directory."""
    names, index = sorted(small_sam), tmp_path / "model.safetensors.index.json"
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: small_sam[name].contiguous() for name in part}, tmp_path / file)
    weight_map = ", ".join(f'"{name}": "{file}"' for file, part in parts.items() for name in part)
    index.write_text(f'{{"metadata": {{"total_size": 1}}, "weight_map": {{{weight_map}}}}}')
    assert read_state_dict(tmp_path).keys() == small_sam.keys()
    assert holds(index, small_sam)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 missing \(model-00001-of-00002\.safetensors\)"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no index of weights"),
        ('{"weight_map": {"a": 3}}', "is no index of weights"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "is no index of weights"),
    ],
)
def test_a_damaged_index_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=said):
        load_checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a directory without model\.safetensors"):
        load_checkpoint(tmp_path)


def test_imagenet_weights_come_in_wrappers_as_well(tmp_path: Path) -> None:
    backbone = torch.nn.Sequential(torch.nn.Linear(2, 3))
    weights = {f"module.{name}": tensor + 1 for name, tensor in backbone.state_dict().items()}
    torch.save({"model_state_dict": weights, **TRAINING}, tmp_path / "imagenet.pth")
    load_from_file(backbone, tmp_path / "imagenet.pth", "a backbone", whole=())
    assert all(torch.equal(tensor, weights[f"module.{name}"]) for name, tensor in backbone.state_dict().items())


class Whole(torch.nn.Module):
    """A model that is saved with its class, and not by its state dict."""

    def __init__(self, state: State) -> None:
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", "-"), tensor)


ACCURACY = np.float64(0.93)
SETTINGS = argparse.Namespace(model="vit_b", lr=1e-4)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda state: {"model": state, "best": ACCURACY}, r"numpy\.\S+\.scalar"),
        (lambda state: {"args": SETTINGS, "state_dict": state}, r"1 of another kind \(argparse\.Namespace\)"),
        (lambda state: {"net": {"weights": state}, "args": SETTINGS}, r"argparse\.Namespace"),
        (lambda state: {"my_network": OrderedDict(state), "args": SETTINGS}, r"argparse\.Namespace"),
        (lambda state: {**state, "best": ACCURACY}, r"numpy\.\S+\.scalar"),
        (lambda state: {"epoch": 3, "model": Whole(state)}, r"\.Whole"),
        (Whole, r"\.Whole"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older format"])
def test_more_than_tensors_is_refused_with_the_lines_that_save_the_weights_alone(
    zipped: bool, content: Callable[[State], Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"neck.0.weight": torch.rand(2, 3), "neck.1.weight": torch.rand(2)}
    path = tmp_path / "it's tuned.pth"
    torch.save(content(state), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"it's tuned\.pth .*not loaded \(UnpicklingError\): .*{named}") as refused:
        load_checkpoint(path)
    message = str(refused.value)
    assert message.isprintable()
    assert "add_safe_globals" not in message
    assert "if you trust the file" in message
    lines = re.search(r"import torch; torch\.save\(.*\)$", message)
    assert lines
    monkeypatch.chdir(tmp_path)
    exec(lines[0], {})  # by the person whose file it is
    found = read_state_dict(tmp_path / "weights.pth")
    assert [torch.equal(a, b) for a, b in zip(found.values(), state.values(), strict=True)] == [True, True]
    assert {name.replace("-", ".") for name in found} == set(state)


def test_damaged_instructions_are_refused_without_advice(tmp_path: Path) -> None:
    content = {"model": {"a": torch.zeros(2)}, "args": SETTINGS}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"not loaded \(\w+\)$"):
        load_checkpoint(tmp_path / "x.pth")
