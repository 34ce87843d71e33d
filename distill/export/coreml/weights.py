"""How the packages of an export keep their weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Of one package.

    Attributes:
        bits: of each; None: float16. 8 are linear in each output channel, fewer are places in a palette.
        group: so many output channels share a palette, which iOS 18 and macOS 15 know; None: all of a tensor.
    """

    bits: int | None = None
    group: int | None = None

    @property
    def grouped(self) -> bool:
        """Whether the package needs iOS 18."""
        return self.group is not None

    @property
    def target(self) -> str:
        """The oldest systems that run it."""
        return "iOS 18, macOS 15" if self.grouped else "iOS 16, macOS 13"

    @property
    def precision(self) -> str:
        """In words, for the manifest."""
        if self.bits is None:
            return "float16"
        palettes = f", a palette for each {self.group} channels" if self.grouped else ""
        return f"float16, weights in {self.bits} bits{palettes}"


FULL = Weights()

ENCODER, DECODER = "Encoder.mlpackage", "Decoder.mlpackage"

PACKAGES = {
    ENCODER: FULL,
    "Encoder_8bit.mlpackage": Weights(8),
    "Encoder_6bit.mlpackage": Weights(6),
    "Encoder_6bit_grouped.mlpackage": Weights(6, 8),
    "Encoder_4bit.mlpackage": Weights(4, 8),
    DECODER: FULL,
    "Decoder_8bit.mlpackage": Weights(8),
}
"""By name, without the student's."""
