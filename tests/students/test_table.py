from itertools import takewhile

import pytest

from students.architectures import PUBLISHED, VITS, architecture_name
from students.table import listed_students, students_table
from support import ROOT


def figures(table: str) -> dict[str, tuple[float, float]]:
    """Millions of parameters and GMACs of each line, by its first three cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {
        " ".join(cell for cell in cells[:3] if cell): (float(cells[3][:-2]), float(cells[5].replace(",", "")))
        for cells in lines
    }


@pytest.mark.slow
def test_the_page_has_the_table_and_the_table_the_published_figures() -> None:
    published = [config for config in listed_students() if architecture_name(config) in PUBLISHED]
    table = students_table(published, ["vit_h"])
    page = (ROOT / "docs" / "students.md").read_text(encoding="utf-8").splitlines()
    assert set(table.splitlines()) <= set(page)
    header = page.index(table.splitlines()[0])
    assert len(list(takewhile(bool, page[header + 2 :]))) == len(listed_students()) + len(VITS) + 1
    found = figures(table)
    decoder = found["prompt encoder, mask decoder"]
    assert found["repvit_m2_3 stride1 1024"][0] == 23.16
    assert found["repvit_m1 fuse 1024"][0] + decoder[0] == pytest.approx(9.6, abs=0.05)
    assert found["repvit_m1 fuse 1024"][1] + decoder[1] == pytest.approx(22.1, abs=0.4)
    assert found["vit_h 1024"][0] + decoder[0] == pytest.approx(641, abs=0.5)
    # EfficientViT-SAM (arXiv:2402.05008, table 1), with the decoder's parameters.
    for name, parameters, macs in (
        ("efficientvit_l0 pyramid 512", 34.8, 35), ("efficientvit_l1 pyramid 512", 47.7, 49),
        ("efficientvit_l2 pyramid 512", 61.3, 69), ("efficientvit_xl0 pyramid 1024", 117.0, 185),
        ("efficientvit_xl1 pyramid 1024", 203.3, 322),
    ):  # fmt: skip
        assert found[name][0] + decoder[0] == pytest.approx(parameters, abs=0.06)
        assert found[name][1] == pytest.approx(macs, abs=0.5)
