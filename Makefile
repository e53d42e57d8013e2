# make run     set up, write the real sample, run the pipeline on it, recommend for one household
# make run TUNE=1   the same, with parameters that are searched first, for MINUTES=5
# make serve   set up, train on the small sample if no model is live, serve on http://127.0.0.1:8000
# make test    set up, run the checks; make test-slow runs whole jobs, kills and builds as well
# make lab     JupyterLab on the notebooks
# make docs    the documentation site, with search, in build/site/; make docs-serve shows it on http://127.0.0.1:8080
# make data    write the real sample to data/complete_journey
# make kernels   compile the C of the trainer and of the search again, where it has changed
# make bench   training, ranking, ingest, serving and all models beside their peers, and a page about it: benchmarks/results/README.md (35 minutes)
# make bench QUICK=1   the same with small sizes, in some minutes; the page goes to build/bench
# make bench-quality DATA=folder   our models on a public train/test pair (train.parquet, test.parquet), beside published figures
# make bench-defaults   which parameters do well on logs of many shapes, chosen on validation (DATA="folder folder" adds public logs)
# make bench-sequence DATA=folder   what comes next, on a public log of sequences, beside published figures
# make bench-spark   ALS over Spark beside MLlib and one process, by size, and with a killed worker (extra `spark`, Java 17)
# make bench-cold DATA=folder   products without buyers, people without a past: the groceries, and a public log beside published figures

PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help run serve test test-slow lab data kernels export exports workspace notebooks readme docs docs-serve docs-run mutants bench bench-page bench-ranking bench-overhead bench-serving bench-models bench-endurance bench-scale bench-batch bench-gpu bench-training bench-quality bench-cold bench-spark bench-ingest bench-index bench-experiments daily-kills quarter bench-defaults bench-sequence clean

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

# the environment is made again only when what it is made from has changed; pyproject.toml follows settings.ini, and
# each export writes it again
.venv/.ready: settings.ini setup.py
	@echo "Setting up .venv (a minute or two, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "product_recs needs Python 3.10 or newer; name one with make PYTHON=python3.11")'
	@$(PYTHON) -m venv .venv
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[index,jobs,sample,docs,dev]'
	@touch $@

# the installation compiles the kernels; again, when they are not what the C files say (without a compiler NumPy does it)
.venv/.kernels: .venv/.ready product_recs/_als.c product_recs/_search.c
	@$(BIN)/python -W ignore -c "import sys; from product_recs.core.kernels import compiled; \
	  sys.exit(not (compiled('_als') and compiled('_search')))" \
	  || $(BIN)/python -W ignore setup.py --quiet build_ext --inplace --force
	@touch $@

kernels: .venv/.kernels

data/complete_journey/interactions.csv: .venv/.ready nbs/data/sample.ipynb
	@$(BIN)/product-recs data

data: data/complete_journey/interactions.csv

MINUTES ?= 5
run: data
ifdef TUNE
	@$(BIN)/product-recs tune --name complete_journey --file examples/complete_journey.yaml --minutes $(MINUTES)
endif
	@$(BIN)/product-recs run --name complete_journey --file examples/complete_journey.yaml $(if $(TUNE),--file data/processed/complete_journey/best_discovery.yaml)
	@echo
	@$(BIN)/product-recs recommend 1

models/current:
	@$(MAKE) --no-print-directory .venv/.kernels
	@$(BIN)/product-recs run --name sample

serve: .venv/.kernels models/current
	@$(BIN)/product-recs serve

lab: .venv/.kernels
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

export: .venv/.kernels
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

# the committed notebooks carry their outputs, so that they can be read without running them
notebooks: .venv/.kernels
	@$(BIN)/python tools/run_notebooks.py
	@$(MAKE) --no-print-directory export readme

readme: .venv/.kernels
	@$(BIN)/python tools/make_readme.py

# the pages of docs/, every notebook and the reference; nothing is run and nothing is fetched (a minute, the first time)
docs: .venv/.kernels
	@$(BIN)/python tools/make_docs.py

docs-serve: docs
	@$(BIN)/python -m http.server 8080 --bind 127.0.0.1 --directory build/site

# type the commands of the pages again and write what they print below them (some minutes; OPTIONS="docs/tutorial.md")
docs-run: .venv/.kernels
	@$(BIN)/python tools/run_docs.py $(OPTIONS)

test: .venv/.kernels
	@$(BIN)/python tools/check_export.py
	@$(BIN)/python tools/check_notebooks.py
	@$(BIN)/python tools/make_readme.py --check
	@$(BIN)/python tools/check_links.py
	@$(BIN)/ruff check product_recs nbs tools tests benchmarks setup.py
	@$(BIN)/lint-imports --no-cache > /dev/null 2>&1 || $(BIN)/lint-imports --no-cache
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 2
	@$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" tests

# whole jobs, kills and builds: what `make test` leaves out for its time (a quarter of an hour; OPTIONS="tests/test_daily.py")
test-slow: .venv/.kernels
	@$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m slow $(or $(OPTIONS),tests)

# exports of a generated shop, from `init` to a list by the command alone: examples/exports/README.md (some minutes)
exports: .venv/.kernels
	@$(BIN)/python tools/run_exports.py $(OPTIONS)

# from a built package and an empty folder to lists and the next release: docs/how-to/alone-from-a-package.md (a quarter of an hour)
workspace: .venv/.kernels
	@$(BIN)/python tools/run_workspace.py

# every exported function in turn does nothing, and its notebook or a test must notice (some minutes; OPTIONS="nbs/models/als.ipynb")
mutants: .venv/.kernels
	@$(BIN)/python tools/mutants.py $(OPTIONS)

bench-overhead: .venv/.kernels
	@$(BIN)/python benchmarks/overhead.py

# the service under load while models are swapped, workers killed and the database stopped
MINUTES_OF_LOAD ?= 10
bench-endurance: .venv/.kernels
	@$(BIN)/python benchmarks/endurance.py --minutes $(MINUTES_OF_LOAD) $(OPTIONS)

# memory and time of the evaluation, at 20,000 and 100,000 users
bench-scale: .venv/.kernels
	@$(BIN)/python benchmarks/evaluate_scale.py

# a night killed at 20 random moments; each re-run must end as an undisturbed one (a quarter of an hour); OPTIONS="--moments 5"
daily-kills: .venv/.kernels
	@$(BIN)/python benchmarks/daily_kills.py $(OPTIONS)

# a quarter of nights with eight planted faults, and a page about it (an hour); OPTIONS="--days 30"
quarter: .venv/.kernels data
	@$(BIN)/python benchmarks/quarter.py $(OPTIONS)

# do the intervals of an experiment keep their promise? simulated ones, looked at daily (some seconds); OPTIONS="--runs 500"
bench-experiments: .venv/.kernels
	@$(BIN)/python benchmarks/experiments.py $(OPTIONS)

# lists for a million users beside the bare search (some minutes); OPTIONS="--users 100000 1000000 --items 50000"
bench-batch: .venv/.kernels
	@$(BIN)/python benchmarks/batch.py $(OPTIONS)

# training and lists on a card of NVIDIA beside our C, with checks first (8 minutes; without a card OPTIONS="--module numpy --quick")
bench-gpu: .venv/.kernels
	@benchmarks/gpu.sh $(OPTIONS)

# the libraries that are compared have an environment of their own; one that cannot be installed is left out
.venv-bench/.ready:
	@echo "Setting up .venv-bench (some minutes, once) ..."
	@$(PYTHON) -m venv .venv-bench
	@for library in numpy pandas threadpoolctl irspack pyspark usearch faiss-cpu voyager; do .venv-bench/bin/python -m pip install --quiet --disable-pip-version-check $$library || echo "$$library cannot be installed and is left out" >&2; done
	@touch $@

bench: .venv/.kernels .venv-bench/.ready data
	@$(BIN)/python benchmarks/bench.py $(if $(QUICK),--quick)

# the page alone, from the files of figures
bench-page: .venv/.kernels
	@$(BIN)/python benchmarks/bench.py page

# training beside implicit, and irspack and Spark where .venv-bench has them; OPTIONS="--sizes cj,1 --factors 64"
bench-training: .venv/.kernels data
	@$(BIN)/python benchmarks/bench.py training $(OPTIONS)

# the best ten beside implicit and the bare matrix product; OPTIONS="--sizes 23000x64 --rounds 5"
bench-ranking: .venv/.kernels
	@$(BIN)/python benchmarks/bench.py ranking $(OPTIONS)

# CSV to matrices beside bare DuckDB; OPTIONS="--rows 1000000 --ids text --bad 100"
bench-ingest: .venv/.kernels
	@$(BIN)/python benchmarks/bench.py ingest $(OPTIONS)

# requests a second and memory beside an empty route; OPTIONS="--models-dir models" takes the live model
bench-serving: .venv/.kernels
	@$(BIN)/python benchmarks/bench.py serving $(OPTIONS)

# every model served from a bundle, beside ALS; OPTIONS='--models "ALS,EASE" --users 100000 --items 20000'
bench-models: .venv/.kernels
	@$(BIN)/python benchmarks/bench.py models $(OPTIONS)

# one user of a million items: exact search, and the indexes of three libraries (an hour; OPTIONS="--items 100000 --arms ours,faiss-cells-8bit")
bench-index: .venv/.kernels .venv-bench/.ready
	@$(BIN)/python benchmarks/index.py --write $(OPTIONS)

# ALS over Spark beside MLlib and one process, and with a killed worker; it needs the extra `spark` and Java 17 (an hour);
# OPTIONS="--sizes 1,5"
bench-spark: .venv/.kernels
	@$(BIN)/python benchmarks/spark.py --write $(OPTIONS)
	@$(BIN)/python benchmarks/spark.py --kill --sizes 5 --write

# OPTIONS go to the script, such as OPTIONS="--models als,blend --factors 256"
bench-quality: .venv/.kernels
	@test -n "$(DATA)" || { echo "name the folder with train.parquet and test.parquet: make bench-quality DATA=folder" >&2; exit 2; }
	@$(BIN)/python benchmarks/quality.py "$(DATA)" $(OPTIONS)

# one parameter set for logs of many shapes; goes on where it ended; OPTIONS="--minutes 60 --families als,bm25 --write"
bench-defaults: .venv/.kernels data
	@$(BIN)/python benchmarks/defaults.py $(DATA) $(OPTIONS)

# the order of the histories; OPTIONS="--served" also asks a running service with each history as a session
bench-sequence: .venv/.kernels
	@test -n "$(DATA)" || { echo "name the folder with interactions.parquet: make bench-sequence DATA=folder" >&2; exit 2; }
	@$(BIN)/python benchmarks/sequence.py "$(DATA)" $(OPTIONS)

# few or no buyers, no past: the sample of groceries, and with DATA a folder of a cold protocol (files: head of benchmarks/cold.py);
# VECTORS=file.npy adds a dense column to its titles; OPTIONS="--quick" searches no parameters
bench-cold: .venv/.kernels data
	@test -z "$(DATA)" || $(BIN)/python benchmarks/cold.py citeulike "$(DATA)" $(if $(VECTORS),--vectors "$(VECTORS)") $(OPTIONS)
	@$(BIN)/python benchmarks/cold.py groceries $(OPTIONS)
	@$(BIN)/python benchmarks/cold.py cost

clean:
	rm -rf .venv .venv-bench build dist *.egg-info models data/processed data/complete_journey
	@find reports -mindepth 1 ! -name README.md -delete
