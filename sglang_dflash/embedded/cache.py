"""Directories built once in the user's cache: checksummed, atomic, safe between processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"


class CacheError(RuntimeError):
    """The cache cannot be written to; the message ends with the cure."""


def root() -> Path:
    """`$XDG_CACHE_HOME/sglang_dflash`, by default `~/.cache/sglang_dflash`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang_dflash"


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage(directory: Path) -> str | None:
    """What is wrong with a built directory, or None where every file is as it was written."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return f"{manifest} is missing"
    try:
        files: dict[str, str] = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return f"{manifest} is unreadable"
    for name, digest in files.items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if sha256(file) != digest:
            return f"{file} does not match its checksum"
    return None


def ensure(name: str, build: Callable[[Path], None]) -> Path:
    """The directory `name` in the cache. `build` fills an empty one where there is none or it is damaged.

    Raises `CacheError` where that cannot be written.
    """
    directory = root() / name
    if damage(directory) is None:
        return directory
    try:
        root().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root()).close()
    except OSError as error:
        raise CacheError(
            f"the cache {root()} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a directory that can"
        ) from error
    with FileLock(root() / f"{name}.lock"):
        wrong = damage(directory)  # again: another process may have built it while we waited
        if wrong is not None:
            if directory.exists():
                logger.warning("%s: building %s again", wrong, directory)
            _build(directory, build)
    return directory


def _build(directory: Path, build: Callable[[Path], None]) -> None:
    """Build beside `directory`, then swap: whoever has the old files open keeps them."""
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        build(new)
        files = {f.name: sha256(f) for f in sorted(new.iterdir())}
        (new / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
        if directory.exists():
            shutil.move(directory, old)
        new.rename(directory)
