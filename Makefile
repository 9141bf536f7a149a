# make train [DATASET=mnist] [ARGS="--steps 20000"]    make sample [ARGS="--n 64"]    make evaluate    make gallery
# make page [CHECKPOINT=runs/mnist ARGS="--out digits.html"]    make test [ARGS="-k eq7"]    make lint
# The first of them sets everything up: a virtual environment, the pinned packages and, if tinygrad needs one, a compiler.
DATASET ?= glyphs
ARGS ?=
# The system's Python before another of its version, such as pyenv's: profile-guided optimization makes it quicker.
PYTHON ?= $(shell PATH=/usr/bin:$$PATH; for p in python3.13 python3.12 python3.11 python3 python3.14; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
PY = .venv/bin/python
INSTALL = $(PY) -m pip install -qq --disable-pip-version-check -r

.PHONY: train sample evaluate page bench gpu-report backends test lint table2 box density gallery setup clean
train: setup
	@$(PY) train.py --dataset "$(DATASET)" $(ARGS)
sample: setup
	@$(PY) sample.py $(ARGS)
evaluate: setup
	@$(PY) evaluate.py $(ARGS)
page: setup
	@$(PY) -m tools.page --checkpoint "$(CHECKPOINT)" $(ARGS)
bench: setup
	@$(PY) -m tools.bench $(ARGS)
gpu-report: .venv/pytest  # says what is wrong where the device does not open
	@$(PY) -m tools.report $(ARGS)
backends: setup .venv/pytest
	@$(PY) -m tools.backends $(ARGS)
test: setup .venv/pytest
	@POCL_EXTRA_BUILD_FLAGS=-w BEAM_MAX_TASKS_PER_CHILD=999 $(PY) -m pytest -q -n 2 --dist worksteal $(ARGS)
lint: .venv/pytest
	@$(PY) -m ruff check -q && $(PY) -m mypy --no-error-summary

# Table 2 of the paper on a small budget: six runs, each with its bound
table2: setup
	@$(PY) figures.py table2 --dataset "$(DATASET)" $(ARGS)

# Models as the two of checkpoints/, each from scratch by one run that goes on where it stopped, then in half precision.
# OUT=folder: not into runs/box or runs/density
box: OUT = runs/box
density: OUT = runs/density
box density: GIVEN = $(if $(filter --out --out=%,$(ARGS)),$(error --out is OUT=folder here),$(ARGS) --out "$(OUT)")
box: setup
	@$(PY) train.py --dataset mnist --channel-mult 1,4,6 --steps 40000 --lr 2e-3 --ema 0.9995 --times weighted --min-snr 3 $(GIVEN)
	@$(PY) -c "$(HALF)" "$(OUT)/ema.safetensors" "$(OUT)/mnist.safetensors"
density: setup
	@$(PY) train.py --dataset mnist --no-class-conditional --channels 32 --channel-mult 1,2,2 --steps 36000 --anneal 50000 \
	  --lr 1.5e-3 --ema 0.999 --schedule geometric --beta-1 4e-6 --beta-T 0.021 --sigma beta_tilde \
	  --times weighted --min-snr 0 --clip-x0 $(GIVEN)
	@$(PY) -c "$(HALF)" "$(OUT)/ema.safetensors" "$(OUT)/mnist-density.safetensors"
HALF = import sys, numpy; from files import checkpoint; net, meta = checkpoint.load(sys.argv[1]); \
  checkpoint.save(sys.argv[2], net, meta, numpy.float16); print('done:', sys.argv[2])

# the pictures of README.md, from the model in the box (needs MNIST: some begin with test images)
CHECKPOINT ?= checkpoints/mnist.safetensors
STEPS ?= 1000
DRAW = $(PY) sample.py --checkpoint "$(CHECKPOINT)"
FIGURE = $(PY) figures.py --checkpoint "$(CHECKPOINT)"
gallery: setup
	@mkdir -p assets
	@$(DRAW) --steps $(STEPS) --n 64 --out assets/samples.png
	@$(DRAW) --steps $(STEPS) --n 9 --out assets/reverse.png --gif assets/reverse.gif
	@$(DRAW) --sampler ddim --steps $$(($(STEPS)/10)) --classes --guidance 2 --out assets/classes.png
	@$(FIGURE) 5 --out assets/rate-distortion.png
	@$(FIGURE) 6 --steps $(STEPS) --n 6 --out assets/progressive.png
	@$(FIGURE) 8 --steps $(STEPS) --n 4 --out assets/interpolation.png
	@$(PY) -c 'import data; from files import pictures as p; x = data.read("mnist", "test").images; m = x[0] * 0; m[:, 14:] = 255; \
	  [p.save_png(f"runs/.gallery/{name}.png", p.picture(v)) for name, v in (("7", x[0]), ("2", x[1]), ("mask", m))]'
	@$(DRAW) --steps $$(($(STEPS)/4)) --inpaint runs/.gallery/7.png --mask runs/.gallery/mask.png --n 9 --out assets/inpaint.png
	@$(DRAW) --steps $(STEPS) --from runs/.gallery/7.png runs/.gallery/2.png --at $$(($(STEPS)/2)) --n 9 --out assets/from.png
	@$(DRAW) --steps $(STEPS) --encode runs/.gallery/7.png runs/.gallery/2.png --out assets/encode.png
	@rm -rf runs/.gallery assets/reverse.png assets/rate-distortion.csv; du -ch assets/* | tail -n 1

setup: .venv/ready
	@test -x $(PY) || { echo "the Python that .venv was made with is gone: make clean" >&2; exit 1; }
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
