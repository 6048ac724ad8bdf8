"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_dflash import cli, embedded
from sglang_dflash.cli import app
from sglang_dflash.cli.server import ServerError
from sglang_dflash.embedded import cache, target

runner = CliRunner()


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_dflash.cli", *args]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("command", ["demo", "explain", "watch", "bench", "doctor", "embedded"])
def test_help_of_each_command(command: str) -> None:
    assert command in runner.invoke(app, ["--help"]).output
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.output


def test_embedded_json() -> None:
    result = run("embedded", "--json")
    assert json.loads(result.stdout) == {
        "target": str(embedded.target_path()),
        "draft": str(embedded.DRAFT),
    }
    assert cache.damage(embedded.target_path()) is None


def test_doctor_finds_all_well() -> None:
    embedded.ensure()
    result = run("doctor", COLUMNS="200")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all well\n")
    assert "sglang_dflash.worker.DFlashWorker" in result.stdout
    assert "PlainCpuPlatform" in result.stdout


def test_doctor_names_a_plugin_list_without_us() -> None:
    result = run("doctor", SGLANG_PLUGINS="other", COLUMNS="200")
    assert result.returncode == 1
    assert "keeps this package out: unset it, or add sglang_dflash,sglang_dflash_cpu" in result.stdout
    assert result.stdout.endswith("1 wrong\n")


def test_doctor_names_a_damaged_target(tmp_path: Path) -> None:
    directory = tmp_path / "sglang_dflash" / target.DIRECTORY
    directory.mkdir(parents=True)
    (directory / cache.MANIFEST).write_text(json.dumps({"files": {"model.safetensors": "00"}}))
    result = runner.invoke(app, ["doctor"], env={"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "300"})
    assert result.exit_code == 1
    assert "model.safetensors is missing" in result.output
    assert "sglang-dflash embedded" in result.output


def test_doctor_names_another_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_dflash.cli import doctor

    versions = {"sglang": "0.5.22"}
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: versions.get(name) or real(name))
    result = runner.invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "0.5.22" in result.output
    assert "pip install 'sglang==0.5.23'" in result.output


@pytest.mark.parametrize(
    ("gpu", "compiler", "found", "cure"),
    [
        (False, None, None, None),
        (True, "/usr/local/cuda/bin/nvcc", "compiled on first use by /usr/local/cuda/bin/nvcc", ""),
        (True, None, "not compiled", "install CUDA's toolkit or set CUDA_HOME"),
    ],
)
def test_doctor_names_a_gpu_without_a_compiler(
    gpu: bool, compiler: str | None, found: str | None, cure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_dflash.cli import doctor
    from sglang_dflash.kernels import compiled

    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(compiled, "nvcc", lambda: compiler)
    findings = list(doctor._cuda_ops())
    assert [f.found for f in findings] == ([found] if found else [])
    assert all(f.cure == "" if cure == "" else str(cure) in f.cure for f in findings)


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_target_without_draft_is_refused(command: str) -> None:
    result = runner.invoke(app, [command, "--model", "some/model"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "no draft for the target 'some/model': give one with --draft" in result.output


def test_a_server_that_does_not_start_is_shown_as_its_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(prog_name: str) -> None:
        raise ServerError("it ended with code 3:\n[the log]")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "it ended with code 3:\n[the log]\n"
