# make train [DATASET=mnist] [ARGS="--steps 20000"]    make sample [ARGS="--n 64"]    make evaluate    make gallery
# make test [ARGS="-k eq7"]    make lint
# The first of them sets everything up: a virtual environment, the pinned packages and, if tinygrad needs one, a compiler.
DATASET ?= glyphs
ARGS ?=
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python3.14; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY = .venv/bin/python
INSTALL = $(PY) -m pip install -qq --disable-pip-version-check -r

.PHONY: train sample evaluate bench gpu-report test lint table2 gallery setup clean
train: setup
	@$(PY) train.py --dataset $(DATASET) $(ARGS)
sample: setup
	@$(PY) sample.py $(ARGS)
evaluate: setup
	@$(PY) evaluate.py $(ARGS)
bench: setup
	@$(PY) -m tools.bench $(ARGS)
gpu-report: setup .venv/pytest
	@$(PY) -m tools.report $(ARGS)
test: setup .venv/pytest
	@POCL_EXTRA_BUILD_FLAGS=-w $(PY) -m pytest -q -n 2 $(ARGS)
lint: .venv/pytest
	@$(PY) -m ruff check -q && $(PY) -m mypy --no-error-summary

# Table 2 of the paper on a small budget: what is predicted, with which variance and loss (see README.md)
table2: setup
	@for row in "mu vlb beta" "mu vlb beta_tilde" "mu simple beta" "eps vlb beta" "eps vlb beta_tilde" "eps simple beta"; do set -- $$row; \
	  $(PY) train.py --dataset $(DATASET) --no-class-conditional --min-snr 0 --predict $$1 --loss $$2 --sigma $$3 --out runs/table2/$(DATASET)-$$1-$$2-$$3 $(ARGS) && \
	  $(PY) evaluate.py --checkpoint runs/table2/$(DATASET)-$$1-$$2-$$3/ema.safetensors --n 500 --json runs/table2/$(DATASET)-$$1-$$2-$$3/bound.json || exit 1; done
	@for f in runs/table2/$(DATASET)-*/bound.json; do echo "$$(basename $$(dirname $$f)): $$($(PY) -c 'import json, sys; b = json.load(open(sys.argv[1])); print("%.3f +- %.3f bits/dim" % (b["bits_per_dim"], b["standard_error"]))' $$f)"; done

# the pictures of README.md, from the model in the box (needs MNIST: two of them begin with test images)
CHECKPOINT ?= checkpoints/mnist.safetensors
STEPS ?= 1000
DRAW = $(PY) sample.py --checkpoint $(CHECKPOINT)
gallery: setup
	@mkdir -p assets
	@$(DRAW) --steps $(STEPS) --n 64 --out assets/samples.png
	@$(DRAW) --steps $(STEPS) --n 9 --out assets/reverse.png --gif assets/reverse.gif
	@$(DRAW) --steps $(STEPS) --progressive --n 6 --out assets/progressive.png
	@$(DRAW) --steps $(STEPS) --interpolate 500 --n 4 --out assets/interpolation.png
	@$(DRAW) --sampler ddim --steps $$(($(STEPS)/10)) --classes --guidance 2 --out assets/classes.png
	@$(PY) evaluate.py --checkpoint $(CHECKPOINT) --n 64 --samples-t 200 --rate-distortion assets/rate-distortion.csv
	@$(PY) -c 'import json, sys; from files import pictures; log = [json.loads(line) for line in open(sys.argv[1])]; \
	  pictures.loss_curve("assets/loss.png", *([e[k] for e in log] for k in ("step", "loss", "smooth")))' $(CHECKPOINT:.safetensors=.jsonl)
	@rm -f assets/reverse.png assets/rate-distortion.csv; du -ch assets/* | tail -n 1

setup: .venv/ready
	@sh ./setup.sh $(PY)

.venv/ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python)" >&2; exit 1; }
	@echo "setting up .venv with $$($(PYTHON) --version)" >&2
	@$(PYTHON) -m venv .venv && $(INSTALL) requirements.txt
	@touch $@

.venv/pytest: .venv/ready requirements-test.txt
	@$(INSTALL) requirements-test.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache __pycache__ */__pycache__
