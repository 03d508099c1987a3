"""/metrics: what Prometheus collects. docs/reference/server.md has the table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..budget.cores import Throttling
from .clients import Clients
from .models import EVENTS, Models

__all__ = ["Metrics"]

# of the model that is loaded: name, help, key of FlashSession.describe
_GAUGES = (
    ("budget_bytes", "DRAM budget of the process.", "budget"),
    ("granted_bytes", "Flash memory (slots, pins, rings) granted to the model.", "granted"),
    ("slots_in_use_bytes", "Flash memory in use.", "slots_in_use"),
    ("resident_weights_bytes", "Weights that stay in memory.", "resident_weights"),
    ("flash_weights_bytes", "Weights that stay on flash.", "flash_weights"),
)
# of all models since the start: name, help, name in stats.Counters
_COUNTERS = (
    ("hits", "Experts and neurons found in slots.", "hits"),
    ("misses", "Experts and neurons that had to be read.", "misses"),
    ("read_bytes", "Bytes read from flash.", "bytes_read"),
    ("reads", "Reads from flash.", "reads"),
    ("wait_seconds", "Time that compute threads waited for reads.", "wait_seconds"),
    ("evictions", "Records that gave way to others.", "evictions"),
    ("read_retries", "Reads that were made again.", "retries"),
    ("read_errors", "Reads that failed.", "errors"),
)


class Metrics(Collector):
    def __init__(self, models: Models, clients: Clients) -> None:
        self._models, self._clients = models, clients
        self._throttling = Throttling()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Text and content type, in the format that a client accepts."""
        for acceptable in (accept, ""):
            # a version that is none is compared with numbers
            with contextlib.suppress(TypeError, ValueError):
                encode, content_type = choose_encoder(acceptable)
                return encode(self._registry), content_type
        raise AssertionError("there is always a format")

    def collect(self) -> Iterator[Metric]:
        models = self._models
        now = {name: models.stats(name) for name in models.tallies}

        def gauge(name: str, text: str, values: dict[str, Any]) -> Metric:
            family = GaugeMetricFamily(f"llama_flash_{name}", text, labels=["model"])
            for model, value in values.items():
                family.add_metric([model], value)
            return family

        yield gauge("model_loaded", "1 if it is loaded.", {name: name == models.loaded for name in now})
        for name, text, key in _GAUGES:
            yield gauge(name, text, {model: stats[key] for model, stats in now.items() if stats})

        for name, text, key in _COUNTERS:
            family = CounterMetricFamily(f"llama_flash_{name}", text, labels=["model"])
            for model, tally in models.tallies.items():
                family.add_metric([model], tally.count("total", key, now[model]))
            yield family

        tokens = CounterMetricFamily("llama_flash_tokens", "Tokens computed.", labels=["model", "kind"])
        events = CounterMetricFamily(
            "llama_flash_events",
            "Flash memory given back or taken, and signs of memory pressure.",
            labels=["model", "kind"],
        )
        loads = CounterMetricFamily("llama_flash_loads", "Times that the model was loaded.", labels=["model"])
        for model, tally in models.tallies.items():
            for kind, part in (("prompt", "prompt"), ("generated", "decode")):
                tokens.add_metric([model, kind], tally.count(part, "tokens", now[model]))
            for kind in EVENTS:
                events.add_metric([model, kind], tally.events[kind])
            loads.add_metric([model], tally.loads)
        yield from (tokens, events, loads)

        requests = CounterMetricFamily("llama_flash_requests", "Requests answered.", labels=["path", "status"])
        for (path, status), n in sorted(self._clients.answered.items()):
            requests.add_metric([path, str(status)], n)
        yield requests

        times, seconds = self._throttling.since()
        hint = "use fewer threads, or raise the quota."
        yield CounterMetricFamily("llama_flash_throttled", f"Periods in which a CPU quota stopped it: {hint}", times)
        yield CounterMetricFamily(
            "llama_flash_throttled_seconds", "Time for which a CPU quota stopped it, of all cores together.", seconds
        )
        yield GaugeMetricFamily(
            "llama_flash_requests_in_flight", "POST requests that run or wait.", self._clients.in_flight
        )
