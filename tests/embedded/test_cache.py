"""Directories in the cache: built once, checked, built again when damaged."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from sglang_dflash.embedded import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sglang_dflash"


def build(directory: Path) -> None:
    (directory / "weights").write_bytes(b"\x01" * 4096)
    (directory / "config").write_text("{}")


def refuse(directory: Path) -> None:
    raise AssertionError(f"{directory} was built again")


def test_built_once(own_cache: Path) -> None:
    directory = cache.ensure("model", build)
    assert directory == own_cache / "model"
    assert (directory / "weights").read_bytes() == b"\x01" * 4096
    assert cache.ensure("model", refuse) == directory


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_named_with_the_cure(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    with pytest.raises(cache.CacheError, match=rf"the cache {home}/sglang_dflash cannot be written .*XDG_CACHE_HOME"):
        cache.ensure("model", refuse)


def flip_a_byte(directory: Path) -> None:
    data = bytearray((directory / "weights").read_bytes())
    data[1000] ^= 1
    (directory / "weights").write_bytes(data)


DAMAGES = {
    "flipped byte": (flip_a_byte, "weights does not match its checksum"),
    "truncated": (lambda d: os.truncate(d / "weights", 100), "weights does not match its checksum"),
    "file gone": (lambda d: (d / "config").unlink(), "config is missing"),
    "manifest gone": (lambda d: (d / cache.MANIFEST).unlink(), "manifest.json is missing"),
    "manifest unreadable": (lambda d: (d / cache.MANIFEST).write_text("{"), "manifest.json is unreadable"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_mended(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    hurt, message = DAMAGES[kind]
    directory = cache.ensure("model", build)
    hurt(directory)
    assert message in (cache.damage(directory) or "")
    cache.ensure("model", build)
    assert cache.damage(directory) is None
    assert message in caplog.text


def test_a_failing_build_leaves_nothing(own_cache: Path) -> None:
    def half(directory: Path) -> None:
        build(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.ensure("model", half)
    assert [p.name for p in own_cache.iterdir()] == ["model.lock"]


def test_a_failing_rebuild_keeps_what_others_have_open(own_cache: Path) -> None:
    directory = cache.ensure("model", build)
    with (directory / "weights").open("rb") as reader:
        (directory / "config").unlink()
        cache.ensure("model", build)
        assert reader.read() == b"\x01" * 4096


def count_and_build(directory: Path) -> None:
    (directory.parents[1] / f"built-by-{os.getpid()}").touch()
    time.sleep(0.5)  # long enough for the others to come by
    build(directory)


def ensure_in_process(start: float) -> None:
    time.sleep(max(0.0, start - time.time()))
    cache.ensure("model", count_and_build)


def test_processes_at_once_build_once(own_cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = time.time() + 2
    processes = [context.Process(target=ensure_in_process, args=(start,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(list(own_cache.glob("built-by-*"))) == 1
    assert cache.damage(own_cache / "model") is None
