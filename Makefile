VENV := .venv
PY := $(VENV)/bin/python

.PHONY: install test demo lint

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	python3 -m venv $(VENV) || { echo 'error: python3 cannot make a virtual environment; try: apt-get install python3-venv'; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

test: install
	$(PY) -m ruff check .
	$(PY) -m pytest -q

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

demo: install
	$(PY) train/demo.py
