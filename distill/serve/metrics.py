"""What `/metrics` says, for Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
BATCHES = (1, 2, 4, 8, 16, 32)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The numbers of one server.

    Args:
        routes: which requests are told apart; all others are `other`, whatever they are called.
    """

    def __init__(self, routes: tuple[str, ...]) -> None:
        self.routes = routes
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.requests = Counter("sam_requests", "Requests, by answer", ["route", "status"], registry=registry)
        self.seconds = Histogram("sam_request_seconds", "Until answered", ["route"], buckets=SECONDS, registry=registry)
        self.queue = Gauge("sam_queue", "Requests at work or waiting", ["kind"], registry=registry)
        self.hits = Counter("sam_embedding_hits", "Pictures whose embedding was there", registry=registry)
        self.joined = Counter("sam_embedding_joined", "Pictures that were being encoded already", registry=registry)
        self.misses = Counter("sam_embedding_misses", "Pictures that had to be encoded", registry=registry)
        self.kept = Gauge("sam_embeddings", "Embeddings that are kept", registry=registry)
        self.kept_bytes = Gauge("sam_embeddings_bytes", "And what they take", registry=registry)
        self.held_bytes = Gauge("sam_bodies_bytes", "Bodies of requests in memory", registry=registry)
        self.batch = Histogram("sam_batch_size", "Pictures encoded at once", buckets=BATCHES, registry=registry)
        self.encode = Histogram("sam_encode_seconds", "A batch", buckets=SECONDS, registry=registry)
        self.decode = Histogram("sam_decode_seconds", "A request's masks", buckets=SECONDS, registry=registry)

    def watch(self, kept: Callable[[], int], kept_bytes: Callable[[], int], held_bytes: Callable[[], int]) -> None:
        """Take these numbers from elsewhere whenever they are asked for."""
        for gauge, read in ((self.kept, kept), (self.kept_bytes, kept_bytes), (self.held_bytes, held_bytes)):
            gauge.set_function(read)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        route = path if path in self.routes else "other"
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def page(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
