import pytest

from students.table import students_table
from support import ROOT


def figures(table: str) -> dict[str, tuple[float, float]]:
    """Millions of parameters and GMACs of each line, by its first cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {
        f"{name} {way}".strip(): (float(cells[0][:-2]), float(cells[2].replace(",", ""))) for name, way, *cells in lines
    }


@pytest.mark.slow
def test_the_page_has_the_table_and_the_table_the_published_figures() -> None:
    table = students_table()
    assert table in (ROOT / "docs" / "students.md").read_text(encoding="utf-8")
    found = figures(table)
    decoder = found["prompt encoder, mask decoder"]
    assert found["repvit_m2_3 stride1"][0] == 23.16
    assert found["repvit_m1 fuse"][0] + decoder[0] == pytest.approx(9.6, abs=0.05)
    assert found["repvit_m1 fuse"][1] + decoder[1] == pytest.approx(22.1, abs=0.4)
    assert found["vit_h"][0] + decoder[0] == pytest.approx(641, abs=0.5)
