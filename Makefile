# Every target makes its own virtual environment; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
TPU_VENV ?= .venv-tpu
BIN := $(VENV)/bin

.PHONY: help demo test test-long test-all check smoke-newest soak benchmark benchmark-fisher benchmark-inputs benchmark-pretrained experiments tpu-check tpu-check-small clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /	/'

# A stamp file per set of extras, remade when pyproject.toml changes.
$(VENV)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.full: $(VENV)/.base
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[data,test,dev]'
	touch $@

demo: $(VENV)/.base ## install, train on the digits, forget class 0, report; then by the paper's method
	$(BIN)/mnemonic run digits --out runs/demo
	@echo; echo "The paper's method, on a model of its own that was trained with codes:"
	$(BIN)/mnemonic train digits_paper --out runs/demo_paper >/dev/null
	$(BIN)/mnemonic forget runs/demo_paper --classes 0

test: $(VENV)/.full ## install and run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-long: $(VENV)/.full ## install and run the tests that the suite leaves out
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long

test-all: $(VENV)/.full ## install and run all tests, compiled as users' programs are
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

check: $(VENV)/.full ## lint, format check, type check, architecture test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

smoke-newest: ## a plain install, the doctests and the demo on the newest Python at hand
	bash tests/smoke_newest.sh

soak: $(VENV)/.full ## kill -9 training 50 times, forgetting 20 times
	$(BIN)/python tests/soak_kill.py

benchmark: $(VENV)/.full ## time whole epochs per call against steps from Python
	$(BIN)/python benchmarks/training.py

benchmark-fisher: $(VENV)/.full ## time the Fisher against a batch gradient, vmap(grad) and a loop
	$(BIN)/python benchmarks/fisher.py

benchmark-inputs: $(VENV)/.full ## time the loaders, and mixing codes, beside training steps
	$(BIN)/python benchmarks/inputs.py

benchmark-pretrained: $(VENV)/.full ## time the import of a ViT-B/16, and the host memory it takes
	$(BIN)/python benchmarks/pretrained.py

experiments: $(VENV)/.full ## the digits studies (minutes); MNIST: see BUILD.md
	$(BIN)/python experiments/digits_strength.py
	$(BIN)/python experiments/digits_all_classes.py
	$(BIN)/python experiments/digits_mixing_rate.py

# jax[tpu] brings the TPU compiler, 1.5 GB; no TPU is needed.
$(TPU_VENV)/.tpu: pyproject.toml
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[tpu]'
	touch $@

tpu-check: $(TPU_VENV)/.tpu ## compile training, learning codes and forgetting of a ViT-S/16 for 16 chips of TPU v5e
	$(TPU_VENV)/bin/python experiments/imagenet_vit/scaling/compile_check.py --topology v5e:4x4 --model vit_s16

tpu-check-small: $(TPU_VENV)/.tpu ## the same for a ViT-Ti/16, small pictures and 16 classes on 4 chips (some minutes, once installed)
	$(TPU_VENV)/bin/python experiments/imagenet_vit/scaling/compile_check.py --topology v5e:2x2 --model vit_ti16 --data.side 64 --batch 64 --classes 16

clean: ## remove the virtual environments and caches; runs/ stays
	rm -rf $(VENV) $(TPU_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
