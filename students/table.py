"""`python -m students.table`: what students are, in parameters and multiply-accumulates, for docs/students.md."""

from collections.abc import Iterable

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from students.architectures import PUBLISHED, VITS, architecture_name, other_sizes
from students.backbones import list_students
from students.encoder import StudentConfig, build_encoder
from students.macs import count_macs
from students.sam import untrained_sam

SIDE = 1024


EXPORTED = {
    "efficientvit_b1", "efficientvit_l1", "efficientvit_xl0", "fastvit_t8", "fastvit_sa12", "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium", "convnext_atto", "convnextv2_atto", "ghostnetv3_100", "repvit_m0_9", "tiny_vit_5m",
}  # fmt: skip
"""Those that are tested through all exports (tests/distill/export), made narrow; RepViT-SAM's as it is besides."""


def students_table(configs: Iterable[StudentConfig], vits: Iterable[str] = VITS) -> str:
    """Markdown: a line for each of some students, for SAM's own encoders, and for the decoder."""
    lines = [
        "| encoder | neck | pixels | parameters | fused | GMACs fused | embedding | published as | exports tested |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    with torch.device("meta"), torch.no_grad():
        for config in configs:
            student = build_encoder(config)
            fused = student.fused().requires_grad_(False)
            published = architecture_name(config)
            neck = config.neck if config.neck == "pyramid" else config.downsample
            tested = config.name in EXPORTED or published == "repvit_sam"
            known = f"{published if published in PUBLISHED else ''} | {'yes' if tested else ''}"
            lines.append(_line(f"{config.name} | {neck} | {config.side}", student, fused, known))
        for name in vits:
            encoder = sam_model_registry[name]().image_encoder.requires_grad_(False)
            lines.append(_line(f"{name} | | {SIDE}", encoder, encoder, f"SAM {name[-1].upper()} |"))
    decoder = untrained_sam(nn.Identity()).requires_grad_(False)
    macs = count_macs(lambda: _one_point(decoder)) / 1e9
    lines.append(
        f"| prompt encoder, mask decoder | | | {_millions(decoder)} | | {macs:.1f} | for one point | all | yes |"
    )
    return "\n".join(lines)


def listed_students() -> list[StudentConfig]:
    """Every student and way to the embedding."""
    return [*other_sizes(), *pyramids()]


def pyramids() -> list[StudentConfig]:
    """Every listed backbone under a pyramid, at half the side, or at all of it where its stages lie at 16, 32 and 64
    px; the published ones as they are."""
    published = {config.name: config for config in PUBLISHED.values() if config.neck == "pyramid"}
    names = [name for name in list_students() if not name.endswith(("_224", "_384", "_512"))]
    return [published.get(name) or StudentConfig(name, neck="pyramid", input_size=SIDE // 2) for name in names]


def _line(name: str, encoder: nn.Module, fused: nn.Module, published: str) -> str:
    image = torch.zeros(1, 3, SIDE, SIDE, device="meta")
    shape = " × ".join(str(size) for size in fused(image).shape[1:])
    macs = count_macs(lambda: fused(image)) / 1e9
    return f"| {name} | {_millions(encoder)} | {_millions(fused)} | {macs:,.1f} | {shape} | {published} |"


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def _one_point(sam: Sam) -> None:
    sparse, dense = sam.prompt_encoder((torch.zeros(1, 1, 2), torch.ones(1, 1)), None, None)
    sam.mask_decoder(torch.zeros(1, 256, 64, 64), sam.prompt_encoder.get_dense_pe(), sparse, dense, True)


if __name__ == "__main__":
    print(students_table(listed_students()))
