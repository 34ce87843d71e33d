"""What the publishers' own code computed, and a reading of RepViT's layout that shares no code with ours."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PEERS = Path(__file__).parent.parent / "data" / "peer_encoders"
ONE_BY_ONE = "token_mixer.2.c.weight"
"""Only a downsampling block of `features` has it."""


def read_peer(name: str) -> dict[str, Any]:
    """Layout, and 512 sampled outputs that the publisher's code made of weights and an image drawn by a rule."""
    return json.loads((PEERS / f"{name}.json").read_text())


def weights_by_rule(peer: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that those outputs were made with."""
    weights = {}
    for name, shape in peer["layout"].items():
        digest = sha256(f"{peer['seed']}:{name}".encode()).digest()
        drawn = np.random.RandomState(int.from_bytes(digest[:4], "little")).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        if name.endswith("running_var"):
            drawn = 0.75 + 0.25 * np.tanh(drawn)
        elif name.endswith(("running_mean", "bias", "attention_biases")):
            drawn = 0.1 * drawn
        elif len(shape) <= 1:
            drawn = 1 + 0.1 * drawn
        else:
            drawn = drawn * np.sqrt(peer.get("gain", 1) / np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(drawn, dtype=np.float32))
    return weights


def image_by_rule(peer: Mapping[str, Any]) -> torch.Tensor:
    """The image that those outputs were made of."""
    drawn = np.random.RandomState(peer["seed"]).standard_normal(peer["input_shape"])
    return torch.from_numpy(drawn.astype(np.float32))


def repvit_of_the_paper(weights: Mapping[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """RepViT-SAM's encoder, written down from the papers (arXiv:2307.09283, section 3; arXiv:2312.05760, section 2)."""
    blocks = sorted({int(name.split(".")[2]) for name in weights if ".features." in name})
    last_stride2 = [number for number in blocks if f"image_encoder.features.{number}.{ONE_BY_ONE}" in weights][-1]

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = weights[f"image_encoder.{name}.c.weight"]
        depthwise = weight.shape[1] == 1 and x.shape[1] > 1
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] if depthwise else 1)
        return norm(x, f"{name}.bn")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (
            weights[f"image_encoder.{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def squeeze_excite(x: torch.Tensor, name: str) -> torch.Tensor:
        gate = x.mean((2, 3), keepdim=True)
        for layer, activation in (("fc1", torch.relu), ("fc2", torch.sigmoid)):
            weight, bias = (weights[f"image_encoder.{name}.{layer}.{part}"] for part in ("weight", "bias"))
            gate = activation(F.conv2d(gate, weight, bias))
        return x * gate

    def mix_channels(x: torch.Tensor, name: str) -> torch.Tensor:
        return x + conv(F.gelu(conv(x, f"{name}.channel_mixer.m.0")), f"{name}.channel_mixer.m.2")

    x = conv(F.gelu(conv(image, "features.0.0", 2)), "features.0.2", 2)
    for number in blocks[1:]:
        name = f"features.{number}"
        if f"image_encoder.{name}.{ONE_BY_ONE}" in weights:
            x = conv(x, f"{name}.token_mixer.0", 1 if number == last_stride2 else 2)
            x = conv(x, f"{name}.token_mixer.2")
        else:
            small, bias = (weights[f"image_encoder.{name}.token_mixer.0.conv1.{part}"] for part in ("weight", "bias"))
            mixed = conv(x, f"{name}.token_mixer.0.conv") + F.conv2d(x, small, bias, groups=x.shape[1]) + x
            x = norm(mixed, f"{name}.token_mixer.0.bn")
            if f"image_encoder.{name}.token_mixer.1.fc1.weight" in weights:
                x = squeeze_excite(x, f"{name}.token_mixer.1")
        x = mix_channels(x, name)
    for place in (0, 2):
        weight = weights[f"image_encoder.neck.{place}.weight"]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2).permute(0, 2, 3, 1)
        scale, bias = (weights[f"image_encoder.neck.{place + 1}.{part}"] for part in ("weight", "bias"))
        x = F.layer_norm(x, x.shape[-1:], scale, bias, 1e-6).permute(0, 3, 1, 2)
    return x
