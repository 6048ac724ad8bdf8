"""Which compiled ops are loaded, what is said where none can be, and what a wheel that holds them is called."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tvm_ffi
from loading import load

from sglang_dflash.kernels import compiled


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with sources and kernels of its own, nothing compiled."""
    shutil.copytree(compiled.sources()[0].parent, tmp_path / "csrc")
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    monkeypatch.setattr(tvm_ffi, "load_module", lambda path: path)
    monkeypatch.setattr("tvm_ffi.cpp.load", lambda name, cuda_files: "compiled on first use")
    monkeypatch.setattr(compiled, "library", compiled.library.__wrapped__)  # without its memory
    return tmp_path


def give_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(folder))


def test_ops_compiled_ahead_are_loaded_while_their_sources_are_the_same(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_nvcc(package / "cuda", monkeypatch)
    assert compiled.library() == "compiled on first use"
    ops = compiled.ahead()
    ops.touch()
    assert compiled.library() == str(ops)
    for source in ("grow.cu", "common.cuh"):
        text = (package / "csrc" / source).read_text()
        (package / "csrc" / source).write_text(text + "// changed\n")
        assert compiled.library() == "compiled on first use"
        (package / "csrc" / source).write_text(text)
    assert compiled.library() == str(ops)
    monkeypatch.setattr(compiled, "version", lambda name: "0.9.9")  # another tvm-ffi
    assert compiled.library() == "compiled on first use"


def test_sources_that_are_not_there_are_named(package: Path) -> None:
    shutil.rmtree(package / "csrc")
    with pytest.raises(FileNotFoundError, match=r"no CUDA sources in .*csrc: install the package"):
        compiled.library()


def test_compiling_ahead_leaves_no_stale_library(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_FFI_CUDA_ARCH_LIST", "")
    (package / "kernels" / "ops.so").touch()
    (package / "kernels" / "ops-0123456789abcdef.so").touch()

    def build(name: str, cuda_files: list[str], build_directory: str) -> str:
        (made := Path(build_directory, "made.so")).touch()
        return str(made)

    monkeypatch.setattr("tvm_ffi.cpp.build", build)
    compiled.build_ahead()
    assert list((package / "kernels").iterdir()) == [compiled.ahead()]
    assert os.environ["TVM_FFI_CUDA_ARCH_LIST"] == compiled.ARCHITECTURES


def test_without_a_compiler_the_cure_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(package / "nowhere"))
    with pytest.raises(RuntimeError, match=r"there is no nvcc .*: install CUDA's toolkit or set CUDA_HOME"):
        compiled.library()
    compiled.ahead().touch()  # needs none
    assert compiled.library() == str(compiled.ahead())


@pytest.mark.parametrize(("ops", "pure"), [("ops-0123456789abcdef.so", False), ("", True)])
def test_a_wheel_with_ops_is_of_its_platform(
    ops: str, pure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = "hatchling.builders.hooks.plugin.interface"
    for part in range(1, interface.count(".") + 2):
        name = ".".join(interface.split(".")[:part])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[interface], "BuildHookInterface", object, raising=False)
    hatch_build = load("hatch_build.py")
    kernels = tmp_path / "sglang_dflash" / "kernels"
    kernels.mkdir(parents=True)
    if ops:
        (kernels / ops).touch()
    data: dict[str, Any] = {"pure_python": True}
    hatch_build.PlatformTag.initialize(SimpleNamespace(root=str(tmp_path)), "standard", data)
    assert data["pure_python"] is pure
    assert data.get("tag", "py3-none-any").startswith("py3-none-any" if pure else "py3-none-linux_")
