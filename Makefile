# What a newcomer needs: `make demo`, `make test`. Everything happens in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the compiled extension is made from. Python files are not listed: the install is editable.
SOURCES := pyproject.toml CMakeLists.txt tools/setup_venv.py \
	$(shell find src csrc cuda -type f 2>/dev/null)

.PHONY: help demo test check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   build camelid in $(VENV) and let the built-in model write something"
	@echo "make test   build camelid in $(VENV) and run the tests"
	@echo "make check  formatters, linters, types, structure and the fast tests"
	@echo "make clean  remove $(VENV) and build/"

demo: $(VENV)/.installed
	@echo "[demo] $(BIN)/camelid demo"
	@$(BIN)/camelid demo

test: $(VENV)/.installed-test
	@echo "[test] $(BIN)/python -m pytest $(PYTEST_ARGS)"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	@tools/check

clean:
	rm -rf $(VENV) build

# Each stamp is newer than all sources when .venv holds a current build with that many extras.
$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) tools/setup_venv.py --venv $(VENV)
	@touch $@

$(VENV)/.installed-test: $(SOURCES)
	@$(PYTHON) tools/setup_venv.py --venv $(VENV) --extras test
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(SOURCES)
	@$(PYTHON) tools/setup_venv.py --venv $(VENV) --extras dev
	@touch $(VENV)/.installed $(VENV)/.installed-test $@
