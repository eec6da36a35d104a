VENV := .venv
PY := $(VENV)/bin/python
LOWEST := .venv-lowest
FAST := -m "not slow"
# A worker on each core; every test uses one thread, or says so. A file stays with its worker, where its fixtures are.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile
# What computes with the transformer, and so may take a fast path: test_layout.py compares this list with the imports.
PLAIN := $(addprefix tests/test_,$(addsuffix .py,adding_an_objective aligned_states averages completion device_rules \
    drafter drafts encoder_states eval export fine_tuning forecast generate llamagen look_ahead_grid looking_ahead \
    made_before mutor nonfinite offsets other_processes parallel_heads plan preflight private_blocks registers \
    resume sample sharding show tokenizer_commands trackers train_loop transformer))

# Every case of the tests of promises (docs/reliability.md): crash points, damage, changed bytes, lost processes.
FAULTS := $(wildcard $(addprefix tests/test_,$(addsuffix .py,crash_points preemption nonfinite resume damage fuzz catalogue \
    catalogue_checkpoints catalogue_images catalogue_scores catalogue_settings hostile killed_jobs lost_process skip_bad multi_node)))

.PHONY: install check test test-slow test-plain test-lowest demo lint

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV) || { echo 'error: python3 cannot make a virtual environment; try: apt-get install python3-venv'; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

# While developing: all but the tests marked slow.
check: install
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PYTEST) $(FAST)

test: install
	$(PY) -m ruff check .
	$(PY) -m mypy
	@echo '=== all tests, with the fast paths of this processor'
	$(PYTEST)
	@$(MAKE) --no-print-directory test-plain

test-slow: install
	mkdir -p build && rm -f build/scores.jsonl
	MUTOR_FAULTS=all MUTOR_SCORE=$(CURDIR)/build/scores.jsonl $(PYTEST) $(FAULTS)
	MUTOR_SCORE=$(CURDIR)/build/scores.jsonl $(PYTEST) -m bad_input
	rm -rf build/long-run && MUTOR_SCORE=$(CURDIR)/build/scores.jsonl $(PY) tests/faults/long_run.py build/long-run
	$(PY) tests/faults/report.py build/scores.jsonl

# What other processors do, and other releases of PyTorch: no packed matrices, no merged kernel.
test-plain: install
	@echo '=== fast tests again, in plain PyTorch (MUTOR_NO_FAST_PATHS=1)'
	MUTOR_NO_FAST_PATHS=1 $(PYTEST) $(FAST) $(PLAIN)

# The lowest release of every requirement that pyproject.toml allows; call it with python3 as the lowest Python.
test-lowest:
	python3 -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	@echo '=== fast tests with the lowest releases'
	$(LOWEST)/bin/python -m pytest -q -n auto $(FAST)

lint: install
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m ruff format --check .

demo: install
	$(PY) train/demo.py
