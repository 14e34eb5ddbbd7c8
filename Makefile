# make demo: environment, then the whole path on real input.   make test: environment, then all tests.
# make test-fast: the tests that need no JVM, no Ray and no browser, for while one works.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PACKAGE := build/nextclick.zip
TEST_PROCESSES ?= 2
TEST := $(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadfile

.PHONY: setup demo test test-fast bench lint java package clean

setup: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: expected Python 3.11 or newer, got $$($(PYTHON) --version) (make PYTHON=python3.11)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Spark, which large logs and clusters take, needs a Java: install one where that is ours to do, else say how.
java: $(INSTALLED)
	@if $(RUN) -c 'import sys; from etl.engines.java import OLDEST_JAVA, java_version; sys.exit((java_version() or 0) < OLDEST_JAVA)'; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq openjdk-17-jre-headless; \
	else \
		echo "error: expected Java 17 or newer, got none (apt-get install openjdk-17-jre-headless, or set JAVA_HOME)"; exit 2; \
	fi

demo: setup
	@$(RUN) -m cluster pipeline=demo

# Tests of clusters start many processes of their own and wait for them: they run apart from the others. One that hangs
# takes its ten minutes, so three failures are enough.
test: setup
	@$(MAKE) --no-print-directory java || echo "tests of Spark will be skipped"
	$(TEST) -m "not cluster"
	$(TEST) -m cluster --maxfail=3

test-fast: $(INSTALLED)
	$(TEST) -m "not spark and not cluster and not browser"

bench: setup java
	$(RUN) -m tests.benchmarks

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# What spark-submit ships to its workers: --py-files build/nextclick.zip cluster/etl_job.py
package: $(INSTALLED)
	@mkdir -p $(dir $(PACKAGE))
	$(RUN) -m etl.package $(PACKAGE)

clean:
	rm -rf $(VENV) runs build *.egg-info
