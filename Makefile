# Each command below is a line or two that you could type yourself.

PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
CHAPTERS ?=
BIN = .venv/bin

# More threads than cores would slow the tests down; two chapters run at once.
test execute: export OMP_NUM_THREADS ?= 2

.PHONY: help sample test book export execute lint bench

help:
	@echo "make sample    draw pictures with the model that ships with the book"
	@echo "make test      everything: lint, export, tests, chapters, book (about ten minutes)"
	@echo "make book      build the pages of the book into _build/html"
	@echo "make export    write sdbook/ from the chapters; fill in Colab's cell and figures"
	@echo "make execute   run the chapters and keep their outputs"
	@echo "               (one of them: make execute CHAPTERS=chapters/01_attention.ipynb)"
	@echo "make lint      check style, and that sdbook/ is what the chapters say"
	@echo "make bench     how fast the parts are, and beside diffusers"
	@echo "make help      this list"
	@echo
	@echo "The first one makes .venv and installs requirements.txt into it; it needs"
	@echo "Python 3.10 or newer (another Python: make sample PYTHON=python3.12)."

sample: .venv/.installed
	$(BIN)/sdbook sample --grid true --output_path sample.png --prompt \
	    "a pink heart" "two blue fish" "three yellow flowers" "an orange house" \
	    "a red star above a blue house" "a yellow moon and a blue boat" \
	    "a purple boat" "a green tree on a meadow"

test: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/python tools/book/export.py --check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout=300 tests chapters
	@echo "passed: lint; export check; unit, parity, fault and book tests;" \
	    "every cell of $(words $(wildcard chapters/*.ipynb)) chapters"

book: .venv/.installed
	$(BIN)/jupyter-book build . -W -n --keep-going
	@echo "the book is in _build/html/index.html"

export: .venv/.installed
	$(BIN)/python tools/book/export.py
	$(BIN)/python tools/book/colab.py
	$(BIN)/python tools/book/records.py

execute: .venv/.installed
	$(BIN)/python tools/book/execute.py $(CHAPTERS)

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/python tools/book/export.py --check
	$(BIN)/python tools/book/colab.py --check
	$(BIN)/python tools/book/records.py --check

bench: .venv/.installed
	$(BIN)/python tools/benchmarks/bench.py

.venv/.installed: $(REQUIREMENTS) pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed, and $(PYTHON) is not:" \
	    "name another, as in  make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing PyTorch and the rest, about 5 GB; this takes some minutes"
	$(BIN)/python -m pip install --quiet --requirement $(REQUIREMENTS) --editable .
	@touch $@
