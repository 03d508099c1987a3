"""Five minutes of clients that come, ask, and sometimes leave, below a real memory cap."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from caps import require_caps
from serving import Server, serving, smallest_budget
from test_server import LABEL, MIB, PROMPTS, SHIPPED, chat, eventually, streamed

SECONDS = 300.0
WARM = 30.0  # seconds after which memory must have stopped growing
N_CLIENTS = 4
MOST = 64  # tokens of an answer


def visit(server: Server, seed: int, end: float, answers: dict[str, str]) -> Counter[str]:
    """One client after the other until `end`; what became of them."""
    dice, seen = random.Random(seed), Counter[str]()
    while time.monotonic() < end:
        client, prompt, n = server.client(), dice.choice(list(answers)), dice.randint(4, MOST)
        kind = dice.choice(("chat", "stream", "stream", "leave"))
        try:
            if kind == "leave":
                message = {"role": "user", "content": prompt}
                stream = client.chat.completions.create(model="x", messages=[message], max_tokens=900, stream=True)
                for _ in range(dice.randint(1, 5)):
                    next(stream)
                stream.close()
            else:
                text = (streamed if kind == "stream" else chat)(client, prompt, n)
                if not answers[prompt].startswith(text):
                    kind = f"another answer: {prompt!r} {text!r}"
        except Exception as error:
            kind = f"error: {error!r}"
        finally:
            client.close()
        seen[kind] += 1
    return seen


@pytest.mark.full
def test_five_minutes_of_clients(tmp_path: Path) -> None:
    require_caps()
    model = Path(shutil.copy(SHIPPED, tmp_path / SHIPPED.name))
    cap = smallest_budget(model) + 12 * MIB
    with serving([model], tmp_path / "log", cap) as server:
        prompts = [f"{prompt}{more}" for prompt in PROMPTS for more in ("", "    pass\n", "# what it does\n")]
        answers = {prompt: chat(server.client(), prompt, MOST) for prompt in prompts}
        began = time.monotonic()
        with ThreadPoolExecutor(N_CLIENTS) as pool:
            visits = [pool.submit(visit, server, seed, began + SECONDS, answers) for seed in range(N_CLIENTS)]
            time.sleep(WARM)
            warm = server.metrics()["process_resident_memory_bytes"]
            seen = sum((one.result() for one in visits), Counter[str]())
        assert eventually(lambda: server.metrics()["llama_flash_requests_in_flight"] == 0)
        values = server.metrics()
        assert server.stop() == 143
    hits, misses = (values[f"llama_flash_{name}_total {LABEL}"] for name in ("hits", "misses"))
    grown = values["process_resident_memory_bytes"] - warm
    found = re.search(r"peak (\S+ \S+) of .* (\d+) OOM kills", server.text)
    print(
        f"\n{dict(seen)}; resident {warm / MIB:.1f} MiB after {WARM:.0f} s, {(warm + grown) / MIB:.1f} MiB at the end; "
        f"hit rate {hits / (hits + misses):.1%}; {found and found[0]}"
    )
    assert seen.keys() <= {"chat", "stream", "leave"}, seen
    assert all(seen[kind] > 20 for kind in ("chat", "stream", "leave"))
    assert grown < 8 * MIB
    assert found and found[2] == "0"
    assert misses > 0
