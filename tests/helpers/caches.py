"""What the tests of the cache share by name."""

from collections.abc import Callable

from embeddings_cache.format import CacheInfo

SIZE = 128

Make = Callable[..., CacheInfo]
