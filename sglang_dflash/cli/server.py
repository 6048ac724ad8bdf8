"""A real SGLang server as a child process, for demo and bench."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import httpx
from rich.console import Console

START_LIMIT = 900.0  # seconds until a server must answer; a large model loads for minutes
STOP_LIMIT = 15.0
LOG_TAIL = 30  # lines shown of a server that failed


class ServerError(RuntimeError):
    """A server that did not start; the message ends with its log, and is what the command line shows."""


@contextmanager
def serving(
    title: str, args: list[str], console: Console, env: dict[str, str] | None = None
) -> Iterator[str]:
    """Run `python -m sglang.launch_server` with `args` on a free port; gives its URL once it answers.

    Whatever happens inside, the server and all its processes are gone afterwards.
    """
    # A plain kill would leave the server running: turn it into an exception, which unwinds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    port = _free_port()
    # An idle server must not take a core from the one that is being timed.
    command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port), "--sleep-on-idle", *args]
    with tempfile.TemporaryDirectory(prefix="sglang-dflash-") as scratch:
        log = Path(scratch, "server.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **(env or {})}
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(title, process, url, log, console)
            yield url
        finally:
            _stop(process)


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow what SGLang prints about other machines' kernels while it is imported into this process."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait(title: str, process: subprocess.Popen[bytes], url: str, log: Path, console: Console) -> None:
    begin = time.monotonic()
    with console.status(f"starting {title}") as status:
        while not _healthy(url):
            seconds = time.monotonic() - begin
            if process.poll() is not None:
                raise ServerError(f"{title} ended with code {process.returncode}:\n{_tail(log, LOG_TAIL)}")
            if seconds > START_LIMIT:
                raise ServerError(f"{title} did not answer in {seconds:.0f} s:\n{_tail(log, LOG_TAIL)}")
            status.update(f"starting {title}: {seconds:.0f} s  [dim]{_escape(_tail(log, 1))[:100]}[/]")
            time.sleep(0.5)
    console.print(f"[dim]{title} ready in {time.monotonic() - begin:.0f} s[/]")


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:  # not listening yet
        return False


def _tail(log: Path, lines: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group: its scheduler and detokenizer are processes of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            continue
