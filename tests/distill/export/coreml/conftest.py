import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _few_objects_to_collect() -> Iterator[None]:
    """`ct.convert` ends with a whole garbage collection, a quarter of a second with all of torch loaded."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
