"""What crosses between a client and its workers: counted on the way, no weight among it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from workers import DENSE, MOE, Proxy, WorkerProcess, open_model, workers_of

from llama_flash.model.shape import ContextShape
from llama_flash.workers.division import Offer, Part
from llama_flash.workers.planned import traffic_of


@pytest.fixture(scope="module", params=[MOE, DENSE], ids=["mixture", "dense"])
def model(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerProcess]]:
    with workers_of(model, tmp_path_factory.mktemp("workers")) as workers:
        yield workers


def test_a_load_sends_names_and_no_weights(model: Path, two: list[WorkerProcess]) -> None:
    proxies = [Proxy(worker.endpoint) for worker in two]
    with contextlib.closing(open_model(model, [proxy.endpoint for proxy in proxies])):
        for proxy in proxies:
            control, data = sum(proxy.up[:1]), sum(proxy.up[1:])
            # the graph of the longest prompt is asked about, node by node
            assert 0 < control < 16_000 and 0 < data < 150_000
            assert sum(proxy.down) < 16_000
    n_weights = model.stat().st_size
    assert sum(sum(proxy.up) for proxy in proxies) < n_weights / 50
    for proxy in proxies:
        proxy.close()


def test_a_token_costs_what_the_plan_says(model: Path, two: list[WorkerProcess]) -> None:
    proxies = [Proxy(worker.endpoint) for worker in two]
    with contextlib.closing(open_model(model, [proxy.endpoint for proxy in proxies])) as llm:
        llm.eval([1, 2, 3])
        for _ in range(4):
            llm.eval([4])
        before = [(sum(proxy.up), sum(proxy.down)) for proxy in proxies]
        n = 40
        for i in range(n):
            llm.eval([5 + i])
        after = [(sum(proxy.up), sum(proxy.down)) for proxy in proxies]
        meta = llm.flash.meta
    shape = ContextShape(
        n_ctx=512, n_batch=512, n_ubatch=512, n_outputs=1, n_scores=0, type_k=1, type_v=1, flash_attn=False
    )
    parts = [Part(Offer(proxy.endpoint, 0, 0, 0), range(0), {}, 0, 0, 0, 0) for proxy in proxies]
    for was, now, planned in zip(before, after, traffic_of(meta, parts, shape, 256), strict=True):
        up, down = (now[0] - was[0]) / n, (now[1] - was[1]) / n
        # signs of life come once a second, whatever the tokens do
        assert planned.up * 0.95 < up < planned.up * 1.15
        assert planned.down * 0.95 < down < planned.down * 1.15
    for proxy in proxies:
        proxy.close()
