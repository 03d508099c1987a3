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
from .figures import COUNTERS, EVENTS, GAUGES, TEXTS, TOKENS
from .models import Models

__all__ = ["Metrics"]


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

        yield gauge("model_loaded", TEXTS["model_loaded"], {name: name == models.loaded for name in now})
        for name, text, key in GAUGES:
            yield gauge(name, text, {model: stats[key] for model, stats in now.items() if stats})

        for name, text, part, key in COUNTERS:
            family = CounterMetricFamily(f"llama_flash_{name}", text, labels=["model"])
            for model, tally in models.tallies.items():
                family.add_metric([model], tally.count(part, key, now[model]))
            yield family

        tokens = CounterMetricFamily("llama_flash_tokens", TEXTS["tokens"], labels=["model", "kind"])
        events = CounterMetricFamily("llama_flash_events", TEXTS["events"], labels=["model", "kind"])
        loads = CounterMetricFamily("llama_flash_loads", TEXTS["loads"], labels=["model"])
        for model, tally in models.tallies.items():
            for kind, part in TOKENS:
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
        yield CounterMetricFamily("llama_flash_throttled", TEXTS["throttled"], times)
        yield CounterMetricFamily("llama_flash_throttled_seconds", TEXTS["throttled_seconds"], seconds)
        yield GaugeMetricFamily(
            "llama_flash_requests_in_flight", "POST requests that run or wait.", self._clients.in_flight
        )
