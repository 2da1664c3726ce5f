# Everything a user or a developer does, by name. Needs python3 (>= 3.11, with venv) and make; `make` alone lists the targets.

PYTHON ?= python3
PORT ?= 7777
SEED ?= 1
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DONE := .venv/installed
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PYTHON_FILES := server worker clients/python benchmark tests demo.py
SOURCES := pyproject.toml constraints.txt

.PHONY: help install demo smoke test test-gpu faults chaos soak check format bench side-by-side clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

install: $(DONE)/run  ## create .venv with server, worker, client and benchmark

demo: $(DONE)/run  ## start everything on this machine: Redis, server, CPU worker, demo model (PORT=7777)
	@exec $(PY) demo.py --port $(PORT)

smoke: $(DONE)/test  ## the demo on a free port: one chat by the openai package, one in a headless browser
	@PYTHONPATH=.:tests $(PY) tests/system/smoke.py

test: $(DONE)/test  ## every test: Python, JavaScript, browser, system
	@$(PY) -m pytest -q --durations=10

test-gpu: $(DONE)/test  ## what only an NVIDIA card can show: exactness, memory, torchrun on all cards
	@MIXTRAL_TEST_GPU=1 $(PY) -m pytest -q --durations=10 tests/gpu

faults: $(DONE)/test  ## every row of the fault matrix (docs/reliability.md): real kills, stops and broken networks
	@$(PY) -m pytest -q --durations=10 tests/faults $$(grep -o 'tests/[a-z_/]*/test_[a-z_]*\.py::test_[a-z_0-9]*' docs/reliability.md | grep -v ^tests/faults/ | sort -u)

chaos: SECONDS ?= 40
chaos: $(DONE)/test  ## random faults under load, every chat checked to the token (SEED=1 SECONDS=40)
	@PYTHONPATH=tests $(PY) -m faults.chaos --seed $(SEED) --seconds $(SECONDS)

soak: SECONDS ?= 300
soak: $(DONE)/test  ## even load for a long time, the memory of every process watched (SECONDS=300)
	@PYTHONPATH=tests $(PY) -m faults.soak --seconds $(SECONDS)

check: $(DONE)/check  ## ruff, mypy --strict, import rules, node --check
	@.venv/bin/ruff check $(PYTHON_FILES)
	@.venv/bin/ruff format --check $(PYTHON_FILES)
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@PYTHONPATH=tests $(PY) -m support.node --check $$(git ls-files 'frontend/*.js' 'clients/javascript/*.js' 'tests/*.mjs')

format: $(DONE)/check  ## rewrite Python files to the house's format
	@.venv/bin/ruff check --fix $(PYTHON_FILES)
	@.venv/bin/ruff format $(PYTHON_FILES)

bench: $(DONE)/run  ## 64 chats, 16 at once, against a demo started for it
	@$(PY) demo.py --port 0 --data_dir "$$(mktemp -d)" --then "$(PY) -m benchmark --total_requests 64 --concurrent_requests 16"

side-by-side: $(DONE)/peers  ## our whole stack, transformers serve and llama.cpp's server on the same weights (FLAGS="--rounds 1")
	@$(PY) -m benchmark side_by_side $(FLAGS)

bench-server: $(DONE)/run  ## what one server process does per CPU second, by streams, jobs, depth and memory (Linux)
	@$(PY) -m mixtral_server.bench

clean:  ## remove .venv and caches; data/ (keys, chats) stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# ---- installation, once per change of pyproject.toml or constraints.txt

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "python3 has no venv module; on Debian: apt-get install python3-venv" >&2; rm -rf .venv; exit 1; }

# Without an NVIDIA driver PyTorch's CPU build saves gigabytes; where its index cannot be reached the ordinary one serves.
$(DONE)/torch: .venv/bin/python constraints.txt
	@echo "installing torch $(TORCH_VERSION)"
	@if [ "$$(uname -s)" = Linux ] && ! [ -e /proc/driver/nvidia/version ] \
	    && timeout 10 $(PY) -c "import urllib.request as u; u.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	  then $(PIP) install -c constraints.txt torch==$(TORCH_VERSION) --index-url $(TORCH_CPU_INDEX); \
	  else $(PIP) install -c constraints.txt torch==$(TORCH_VERSION); fi
	@mkdir -p $(DONE) && touch $@

$(DONE)/run: $(DONE)/torch $(SOURCES)
	@echo "installing server, worker, client and benchmark"
	@$(PIP) install -c constraints.txt -e '.[server,worker]'
	@touch $@

$(DONE)/test: $(DONE)/run
	@echo "installing what the tests need"
	@$(PIP) install -c constraints.txt -e '.[server,worker,postgresql,test]'
	@PYTHONPATH=tests $(PY) -m support.node --install clients/javascript tests/clients/foreign || echo "npm could not install: the tests of TypeScript and of openai for Node will say so"
	@touch $@

$(DONE)/peers: $(DONE)/run
	@echo "installing transformers' server and compiling llama.cpp, which takes minutes"
	@$(PIP) install -c constraints.txt -e '.[server,worker,peers]'
	@touch $@

$(DONE)/check: $(DONE)/test
	@$(PIP) install -c constraints.txt -e '.[server,worker,postgresql,test,check]'
	@touch $@
