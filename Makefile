# Two entry points: `make demo` and `make test`. Both make .venv once and reuse it until pyproject.toml changes.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installing into an environment made for other pins would leave a mixture, so the stamp carries a hash of the pins.
PINS := $(shell $(PYTHON) -c "import hashlib; print(hashlib.sha256(open('pyproject.toml', 'rb').read()).hexdigest()[:16])")
STAMP := $(VENV)/.installed-$(PINS)
DOCS_VENV ?= .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed-$(PINS)
DEMO_DIR := bundles/demo
# Pictures that pocket never saw in its training.
SCENES := export/models/pocket-questions

# The authors' vectors of Qwen2-VL, where they lie beside the checkout: in PyTorch, because each case is a graph of its own.
QWEN_GOLDEN ?= ../shared/golden-qwen2-vl

# Float32 sums in another order, as another processor makes them: PyTorch's products on CPUs are MKL's, which takes these.
ARITHMETIC := MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: help venv demo eval test test-slow test-golden test-arithmetic lint docs clean

help:
	@echo "make demo         export the pocket model, pruned and unpruned, check both, print the table"
	@echo "make eval         what pruning costs pocket in answers, method by method"
	@echo "make test         the test suite"
	@echo "make test-slow    the tests marked slow"
	@echo "make test-golden  the golden vectors in \$$PRUNEPORT_GOLDEN, in every engine; Qwen2-VL's in PyTorch"
	@echo "make test-arithmetic  the pruner and the golden vectors in PyTorch, with sums in other orders"
	@echo "make lint         ruff and mypy --strict"
	@echo "make docs         the pages of docs/ as a site in build/site, strictly"

venv: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[export,test]'
	@touch $@

# The demo writes into a folder of its own, and only that folder is cleared: other bundles are never overwritten.
demo: $(STAMP)
	@rm -rf $(DEMO_DIR)
	@$(BIN)/python export.py --model pocket --keep 64 --target android --twin --image $(SCENES)/035.webp --output-dir $(DEMO_DIR)
	@$(BIN)/python -m pruneport ask --compare $(DEMO_DIR)/pocket-keep64-android-xnnpack $(SCENES)/035.webp \
	"Read the word on the sign." "Which number is printed?" "Which colour is the triangle?" \
	"Which shape is the white thing?" "Tell me in which corner the purple square is." \
	"Tell me, is the white cross above the orange circle?" "Yes or no, is there a yellow circle?"

# Goes on where it was stopped; EVAL="--method vlm-pruner --photos 40" is shorter.
eval: $(STAMP)
	@$(BIN)/python -m pruneport eval --model pocket --keep 192,128,64,32,16 --method all $(EVAL)

# Tests and converters keep one core busy each: they run side by side. Files stay whole, because their tests share exports.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not golden and not full" -n auto --dist loadfile

test-golden: $(STAMP)
	$(BIN)/python -m pytest -q -m "golden and not full" -n auto --dist loadgroup
	@if [ -d "$(QWEN_GOLDEN)" ]; then echo "$(QWEN_GOLDEN)"; \
	PRUNEPORT_GOLDEN="$(QWEN_GOLDEN)" $(BIN)/python -m pytest -q -m "golden and not slow and not full" -n auto \
	--dist loadgroup -k "test_eager or test_reference or test_positions" \
	tests/pruning/test_pruner_golden.py tests/export/test_decoder_golden.py; fi

test-arithmetic: $(STAMP)
	set -e; for setting in $(ARITHMETIC); do echo "$$setting"; \
	env "$$setting" $(BIN)/python -m pytest -q -m "not slow and not full" -n auto --dist loadgroup \
	-k "test_reference or test_eager or decisions_hold or test_recovery" \
	tests/pruning/test_pruner_golden.py tests/runtime/test_recovery.py; done

# export.py shares its module name with the package export/, so mypy reads it as a script of its own.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pruneport export pruning runtime training optimum benchmarks docs tests
	$(BIN)/mypy --follow-imports=silent -c "$$(cat export.py)"

# An environment of its own: the pages are made from the code without torch.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "build/site/index.html"

$(DOCS_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; run: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
