"""`python -m students.table`: what every student is, in parameters and multiply-accumulates, for docs/students.md."""

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from torch import nn

from students.architectures import PUBLISHED, VITS, architecture_name, every_student
from students.encoder import build_encoder
from students.macs import count_macs
from students.sam import untrained_sam

SIDE = 1024


def students_table() -> str:
    """Markdown: a line for each student and way of downsampling, for SAM's own encoders, and for the decoder."""
    lines = [
        "| encoder | downsample | parameters | fused | GMACs fused | embedding | published as |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with torch.device("meta"), torch.no_grad():
        for config in every_student():
            student = build_encoder(config)
            fused = student.fused().requires_grad_(False)
            published = architecture_name(config)
            known = published if published in PUBLISHED else ""
            lines.append(_line(f"{config.name} | {config.downsample}", student, fused, known))
        for name in VITS:
            encoder = sam_model_registry[name]().image_encoder.requires_grad_(False)
            lines.append(_line(f"{name} |", encoder, encoder, f"SAM {name[-1].upper()}"))
    decoder = untrained_sam(nn.Identity()).requires_grad_(False)
    macs = count_macs(lambda: _one_point(decoder)) / 1e9
    lines.append(f"| prompt encoder, mask decoder | | {_millions(decoder)} | | {macs:.1f} | for one point | all |")
    return "\n".join(lines)


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
    print(students_table())
