# On a fresh machine: `make niah` runs the main experiment, `make test` all the tests. Both set up a
# virtual environment with what the project's own files ask for.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

INTEROP := alternatives saelens transformerlens
TRANSFORMERS := 4.57 5.24

.PHONY: install test lint mutants niah docs interop $(INTEROP:%=interop-%) \
	transformers $(TRANSFORMERS:%=transformers-%) format clean
.SECONDARY:

install: $(VENV)/.installed

# What the experiments need; the tests need more.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	# The reference scan of mamba-ssm, without its CUDA kernels; kept where only its test looks.
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet \
		--no-deps --no-build-isolation --upgrade --target $(VENV)/reference mamba-ssm==2.3.2.post1
	touch $@

test: install lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Small faults in the code, one at a time, which the tests must notice: an hour on two cores.
mutants: install
	$(BIN)/python -m tests.mutation

# The main job: results/niah gets the table, the pictures and a report; a stopped run goes on.
niah: $(VENV)/.ready
	$(BIN)/hooked-hybrid niah --out results/niah --resume

# The site, in site/: guide, hook points and reference; a broken link or docstring is an error.
docs: .venv-docs/.installed
	.venv-docs/bin/python docs/generate_hooks.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/.installed: pyproject.toml constraints.txt docs/constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt \
		--constraint docs/constraints.txt --editable ".[docs]"
	touch $@

# Tests against other packages, each in an environment of its own: their pins exclude one another.
interop: $(INTEROP:%=interop-%)

$(INTEROP:%=interop-%): interop-%: .venv-interop-%/.installed
	.venv-interop-$*/bin/python -m pytest -c interop/pytest.ini interop/$*

# The parity and tokenizer tests against other versions of transformers than that of `make test`.
transformers: $(TRANSFORMERS:%=transformers-%)

$(TRANSFORMERS:%=transformers-%): transformers-%: .venv-interop-transformers-%/.installed
	.venv-interop-transformers-$*/bin/python -m pytest tests/parity \
		tests/text/test_reference_tokenizers.py tests/text/test_tokenizers.py

.venv-interop-%/.installed: pyproject.toml interop/%/requirements.txt interop/%/constraints.txt
	$(PYTHON) -m venv .venv-interop-$*
	.venv-interop-$*/bin/python -m pip install --quiet --constraint interop/$*/constraints.txt \
		--requirement interop/$*/requirements.txt --editable .
	touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-docs $(INTEROP:%=.venv-interop-%) $(TRANSFORMERS:%=.venv-interop-transformers-%) site .mypy_cache .pytest_cache .ruff_cache build *.egg-info
