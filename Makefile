# Two commands matter: `make demo` (first table and figure on the embedded model) and `make test`.
# Both create .venv on first use; later calls install nothing until pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST ?= .venv-lowest
TORCH_BACKEND ?= cpu
MODEL ?= scenes-sd3
DEVICE ?= auto
PYTEST_ARGS ?=

# Idle OpenMP threads sleep instead of spinning: on a busy machine spinning halves the speed.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-lowest lint format figures notebooks bench docs train install clean

demo: $(VENV)/.stamp
	$(BIN)/mmdit-probe attention-budget --layers all --model $(MODEL) --device $(DEVICE)

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

# The tests with the lowest versions that pyproject.toml declares, Python's too: 3.13 has no wheels of the lowest
# numpy. TORCH_BACKEND= takes the package index's build of torch.
test-lowest: PYTHON = python3.11
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --compile-bytecode \
		$(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND)) -e ".[dev]"
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(VENV)/.stamp
	$(BIN)/python figures/make.py --model $(MODEL) --device $(DEVICE) $(foreach name,DATASET LORA IMAGES CLIP DINO JOBS,\
		$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) $($(name)))) $(if $(FRESH),--fresh)

notebooks: $(VENV)/.stamp-notebooks
	for notebook in $(wildcard notebooks/*.ipynb); do \
		$(BIN)/jupyter nbconvert --to notebook --execute --inplace $$notebook || exit 1; done

# The site, strictly: a broken link, reference or page ends it. Code blocks of docs and README are run by the tests.
docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet --site-dir site

# The embedded checkpoints, into .training: STAGE=vae for one stage, MINUTES=60 to stop in time; the same again goes on.
train: $(VENV)/.stamp
	$(BIN)/python -m training $(STAGE) --device $(DEVICE) $(if $(MINUTES),--minutes $(MINUTES))

bench: $(VENV)/.stamp
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/magnet_memory.py

install: $(VENV)/.stamp

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned: resolved together with the rest, a resolver may choose another build of several GB.
$(VENV)/.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.stamp-notebooks: $(VENV)/.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[notebooks]"
	touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) dist build site .pytest_cache .mypy_cache .ruff_cache
