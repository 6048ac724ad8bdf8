"""The embedded pair, and the ops of csrc/ built for this machine's CPU, to compare them with their plain meaning."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi
import tvm_ffi.cpp

from sglang_dflash import embedded, kernels
from sglang_dflash.kernels import compiled
from sglang_dflash.platforms.cpu import vector_math

HERE = Path(__file__).parent
vector_math.settle()


@pytest.fixture(scope="session")
def pair() -> embedded.Pair:
    return embedded.ensure()


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All CUDA sources in one library of which the kernels run on the CPU (kernels/cuda_on_cpu.h)."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler here to build the CUDA sources for a CPU")
    import nvidia.cu13

    build = tmp_path_factory.mktemp("cuda_on_cpu")
    unit = build / "ops.cpp"
    unit.write_text("\n".join(f'#include "{path}"' for path in ["cuda_on_cpu.h", *compiled.sources()]))
    return tvm_ffi.cpp.load(
        "dflash_ops_on_cpu",
        cpp_files=[str(unit)],
        extra_include_paths=[str(HERE / "kernels"), str(Path(nvidia.cu13.__path__[0]) / "include")],
        extra_cflags=["-O1"],
        build_directory=str(build),
    )


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What `torch.empty` gives is NaN or the highest integer, so an output left out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["plain", "compiled"])
def either_ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs twice: with the plain ops, and with the compiled ones."""
    if request.param == "plain":
        yield
        return
    library = request.getfixturevalue("cpu_library")
    monkeypatch.setattr(compiled, "library", lambda: library)
    monkeypatch.setattr(kernels, "_ops", compiled)
    request.getfixturevalue("poisoned_memory")
    yield
