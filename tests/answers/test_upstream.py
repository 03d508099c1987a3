"""llama-cpp-python's own tests pass with this build. They are run as the pinned sdist has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

from repository import ROOT

SDIST = ROOT / "build/sdist"
VOCABULARY = "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf"
# These download a model from Hugging Face, which tests here do not. What they look at (sampling, saved states, reuse
# of a prompt, embeddings) is compared with the resident run in test_llama_features.py.
NEED_A_DOWNLOAD = (
    "test_real_model",
    "test_real_llama",
    "test_real_llama_repeated_prompt_cache",
    "test_real_llama_embeddings",
    "test_recurrent_model_prompt_cache_reset",
    "test_hybrid_model_prompt_cache_reset",
    "test_exact_cached_prompt_reuse_matches_fresh",
    "test_loaded_exact_cached_prompt_reuse_matches_fresh",
    "test_ram_cache_exact_prompt_hit_matches_fresh",
    "test_shorter_prompt_prefix_reuse_matches_fresh",
)
RUN, LEFT_OUT = 8, 18  # with their parameters


def test_upstreams_tests_pass(tmp_path: Path) -> None:
    (archive,) = SDIST.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, path = member.name.partition("/")
            if member.isfile() and (path == VOCABULARY or re.fullmatch(r"tests/\w+\.py", path)):
                stream = tar.extractfile(member)
                assert stream is not None
                target = tmp_path / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(stream.read())
    # in a folder without llama_cpp/: it is the installed one
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "tests"),
            *(f"--deselect=tests/test_llama.py::{name}" for name in NEED_A_DOWNLOAD),
        ],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{RUN} passed, {LEFT_OUT} deselected\b", done.stdout, re.MULTILINE), done.stdout
