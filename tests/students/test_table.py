import pytest

from students.table import students_table
from support import ROOT


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {f"{cells[0]} {cells[1]}".strip(" |"): cells for cells in lines}


@pytest.mark.slow
def test_the_page_has_the_table_and_the_table_the_published_figures() -> None:
    table = students_table()
    assert table in (ROOT / "docs" / "students.md").read_text(encoding="utf-8")
    found = rows(table)
    assert found["repvit_m2_3 stride1"][2] == "23.16 M"
    edge, decoder = found["repvit_m1 fuse"], next(cells for name, cells in found.items() if "decoder" in name)
    assert float(edge[2].split()[0]) + 4.06 == pytest.approx(9.6, abs=0.05)
    assert float(edge[4]) + 1.8 == pytest.approx(22.1, abs=0.4)
    assert decoder
