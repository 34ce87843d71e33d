"""Checkpoints by addresses on the hub: real requests to a hub on the loopback, with a cache of the test's own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hub import COMMIT, TOKEN, Hub, hub
from support import ROOT

Ask = Callable[..., Any]

FETCH = """
import json, sys, types

package = types.ModuleType("students")  # without what else it imports, which takes seconds
package.__path__ = [sys.argv[2]]
sys.modules["students"] = package
from students.errors import InputError
from students.hub import fetch_from_hub, hub_address

found = []
for address in json.loads(sys.argv[1]):
    try:
        path = fetch_from_hub(address)
        found.append([open(path).read(), hub_address(path)])
    except InputError as error:
        found.append(str(error))
print(json.dumps(found))
"""


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as found:
        found.files["me/tiny", "weights/a.txt"] = b"first"
        found.files["me/closed", "a.txt"] = b"secret"
        found.gated.add("me/closed")
        yield found


@pytest.fixture
def ask(there: Hub, tmp_path: Path) -> Ask:
    """What comes of some addresses: content and address with its commit, or what was said."""

    def fetch(*addresses: str, **environment: str) -> Any:
        own = {"HF_ENDPOINT": there.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-c", FETCH, json.dumps(addresses), str(ROOT / "students")]
        done = subprocess.run(command, env={**kept, **own, **environment}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return fetch


def test_a_file_is_fetched_once_and_known_by_its_commit(ask: Ask, there: Hub) -> None:
    at = f"hf://me/tiny/weights/a.txt@{COMMIT}"
    plain, behind_name = "hf://me/tiny/weights/a.txt", f"hf://me/tiny@{COMMIT}/weights/a.txt"
    assert ask(plain, "hf://me/tiny/weights/a.txt@main", behind_name) == [["first", at]] * 3
    assert sum(request.startswith("GET") for request in there.requests) == 1
    there.requests.clear()
    assert ask(at) == [["first", at]]
    assert there.requests == []


def test_what_was_fetched_is_there_without_a_network(ask: Ask) -> None:
    plain = "hf://me/tiny/weights/a.txt"
    at = f"{plain}@{COMMIT}"
    assert ask(plain) == [["first", at]]
    assert ask(plain, at, HF_HUB_OFFLINE="1") == [["first", at]] * 2
    assert ask(plain, at, HF_ENDPOINT="http://127.0.0.1:9") == [["first", at]] * 2


def test_what_cannot_be_had_is_a_line(ask: Ask) -> None:
    log_in = "log in (hf auth login), or set HF_TOKEN"
    no_address = "is not hf://OWNER/NAME/FILE, with @REVISION or without"
    expected = {
        "hf://me/none/a.txt": f": there is no me/none on the hub; where it is private, {log_in}",
        "hf://me/tiny/b.txt": ": me/tiny has no file b.txt",
        "hf://me/tiny/weights/a.txt@v2": ": me/tiny has no revision v2",
        "hf://me/closed/a.txt": f": me/closed is gated: ask for access on its page, and {log_in}",
        "hf://me": f" {no_address}",
        f"hf://me/tiny/../../../etc/passwd@{'0' * 40}": f" {no_address}",
        "hf://datasets/me/tiny/a.txt": f" {no_address}",
        "hf://me/tiny/m.index.json": " names the parts of a checkpoint: download the repository, and give its folder",
    }
    assert ask(*expected) == [f"{address}{said}" for address, said in expected.items()]
    assert ask("hf://me/closed/a.txt", HF_TOKEN=TOKEN)[0][0] == "secret"
    address = "hf://me/tiny/weights/a.txt"
    (offline,) = ask(address, HF_HUB_OFFLINE="1")
    assert offline == f"{address} is not in the hub's cache, and HF_HUB_OFFLINE is set"
    (far,) = ask(address, HF_ENDPOINT="http://127.0.0.1:9")
    assert far.startswith(f"{address} is not in the hub's cache, and http://127.0.0.1:9 does not answer")
