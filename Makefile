# Everything there is to do, from a clean clone: `make` lists it.

.DEFAULT_GOAL := help
.PHONY: help build ui wheel test-boards test test-full lint format sanitize bench reproduce demo bindings reference patch-apply patch-rebase patch-export clean

PYTHON ?= python3
BIN    := .venv/bin
ENGINE := ci/engine

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## *\(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

build:  ## .venv with the patched engine, the plugin and the Python packages, from one wheel
	@$(PYTHON) $(ENGINE)/build.py

# not a part of `build`: it takes as long as half of that, and npm
ui: build  ## the page of `llama-flash serve` for chats, from the engine's sources, into .venv (needs npm, once; 5 minutes)
	@$(BIN)/python $(ENGINE)/ui.py
	@$(PYTHON) $(ENGINE)/build.py

wheel:  ## dist/: a manylinux wheel for every x86-64 CPU with AVX2, not only for this one (ARCH=aarch64: for boards)
	@$(PYTHON) $(ENGINE)/wheel.py $(if $(ARCH),--arch $(ARCH)) $(if $(MARCH),--march $(MARCH))

test-boards:  ## the wheel for aarch64 and the plugin's tests on it, by qemu-user (10 minutes; says what it needs)
	@$(PYTHON) $(ENGINE)/emulate.py

# two at once: half of the time is programs that start. What is left of one queue is taken from the other
JOBS ?= 2

test: build lint  ## what is checked before every change (15 minutes at most with a built engine; JOBS=2 at once)
	$(BIN)/pytest -m "not full" -n $(JOBS) --dist worksteal $(ARGS)

test-full: build lint integrations  ## the whole matrix
	$(BIN)/pytest $(ARGS)

.PHONY: integrations
integrations: build
	@$(BIN)/python -c "import langchain_community, llama_index.llms.llama_cpp" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet "llama_cpp_python[integrations]"

lint: build  ## ruff and mypy on Python, clang-format and clang-tidy on the plugin
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(BIN)/python $(ENGINE)/lint.py

format: build  ## all code as ruff and clang-format write it
	$(BIN)/ruff format .
	@$(BIN)/python $(ENGINE)/lint.py --write

sanitize: build  ## engine and plugin under ASan, UBSan and TSan (ARGS="--kind address", and pytest's)
	@$(BIN)/python $(ENGINE)/sanitize.py $(ARGS)

bench: build  ## the speed table, as JSON and text (ARGS="--help" for its options)
	$(BIN)/python ci/bench/bench.py $(ARGS)

reproduce: build  ## the paper's figures and tables on this machine, in build/reproduce (ARGS="--help" for its options)
	@$(BIN)/python -c "import matplotlib" 2>/dev/null || $(BIN)/python -m pip install --quiet "matplotlib>=3.8"
	$(BIN)/python ci/bench/reproduce.py $(ARGS)

demo: build  ## flash offload at work: a chat, and a model twice as large as its memory (ARGS="--help" for its options)
	$(BIN)/python ci/tools/demo.py $(ARGS)

bindings: build  ## python/llama_flash/native/bindings.py from the plugin's header
	$(BIN)/python ci/tools/generate_bindings.py

reference: build  ## docs/reference/api.md from the docstrings, docs/reference/cli.md from the commands
	$(BIN)/python ci/tools/api_reference.py
	$(BIN)/python ci/tools/generate_cli_reference.py

patch-apply: build  ## build/engine-work: the engine as a git repository, one commit per patch (FORCE=1: anew)
	@$(BIN)/python $(ENGINE)/worktree.py apply $(if $(FORCE),--force)

# not after `build`: with another engine the patches may not apply yet
patch-rebase:  ## build/engine-work onto another engine, after the pin was changed
	@$(BIN)/python $(ENGINE)/worktree.py rebase

patch-export:  ## patches/ from the commits in build/engine-work
	@$(BIN)/python $(ENGINE)/worktree.py export

clean:  ## removes build/ and .venv
	rm -rf build .venv
