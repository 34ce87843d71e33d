import time
from pathlib import Path

from heartbeat import heartbeat


def test_what_takes_long_is_told_now_and_then(tmp_path: Path) -> None:
    with (tmp_path / "terminal").open("wb") as terminal:
        with heartbeat("quick", terminal.fileno(), every=60):
            pass
        with heartbeat("slow", terminal.fileno(), every=0.05):
            time.sleep(0.3)
    lines = (tmp_path / "terminal").read_text().splitlines()
    assert not any("quick" in line for line in lines)
    assert sum(line.endswith(" s in slow]") for line in lines) >= 2
