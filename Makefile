# `make demo` and `make test` need Python 3.11 or newer with pip, and PyPI; they set up .venv by themselves.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never
export UV_HTTP_TIMEOUT := 600
READY := .venv/.ready

.PHONY: demo test lint ops clean

demo: $(READY)
	.venv/bin/sglang-dflash demo

# Servers have the machine to themselves; of what starts none, two at a time.
test: $(READY)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --ignore tests/e2e --numprocesses 2
	.venv/bin/python -m pytest tests/e2e

lint: $(READY)
	.venv/bin/ruff check
	.venv/bin/mypy

# The CUDA ops, compiled ahead for every GPU into the package and so into a wheel built next. Needs CUDA's nvcc.
ops: $(READY)
	.venv/bin/python -m sglang_dflash.kernels.compiled

$(READY): pyproject.toml uv.lock | $(UV)
	$(UV) sync --locked --python python3
	touch $@

# Into a folder of its own: Debian lets pip install nowhere else, and uv makes virtual environments by itself.
.uv/bin/uv:
	python3 -m pip install --quiet --root-user-action=ignore --target .uv uv

clean:
	rm -rf .venv .uv
