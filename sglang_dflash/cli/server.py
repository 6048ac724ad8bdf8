"""A real SGLang server as a child process, for demo and bench."""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx
from rich.console import Console

START_LIMIT = 900.0  # seconds until a server must answer; a large model loads for minutes
STOP_LIMIT = 15.0
LOG_TAIL = 30  # lines shown of a server that failed
# Below what Linux (from 32768) and SGLang (from 22000) give to whoever asks for any port: a server binds its own only
# once its model is loaded, and one that finds it taken then waits 12 minutes for itself before it ends.
PORTS = range(10_000, 22_000)
_given: set[int] = set()  # of them, by this process: what starts next may not listen yet


class ServerError(RuntimeError):
    """A server that did not start; the message ends with its log, and is what the command line shows."""


@dataclass(frozen=True)
class Starting:
    """A server whose process runs, whether it answers yet or not."""

    title: str
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    gate: str | None
    """URL that opens the gate it waits at, if it does."""

    def ready(self, console: Console) -> str:
        """Open its gate and wait until it answers; gives its URL."""
        begin, shut = time.monotonic(), self.gate is not None
        with console.status(f"starting {self.title}") as status:
            while shut or not _healthy(self.url):
                seconds = time.monotonic() - begin
                if self.process.poll() is not None:
                    self._fail(f"ended with code {self.process.returncode}")
                if seconds > START_LIMIT:
                    self._fail(f"did not answer in {seconds:.0f} s")
                status.update(f"starting {self.title}: {seconds:.0f} s  [dim]{_escape(_tail(self.log, 1))[:100]}[/]")
                shut = shut and not _opened(self.gate or "")
                time.sleep(0.5)
        console.print(f"[dim]{self.title} ready in {time.monotonic() - begin:.0f} s[/]")
        return self.url

    def _fail(self, what: str) -> NoReturn:
        raise ServerError(f"{self.title} {what}:\n{_tail(self.log, LOG_TAIL)}")


@contextmanager
def starting(
    title: str, args: list[str], env: dict[str, str] | None = None, *, gated: bool = False
) -> Iterator[Starting]:
    """Run `python -m sglang.launch_server` with `args` on a free port.

    gated: it takes no sizable memory of its device until it is waited for. Whatever happens inside, the server and all
    its processes are gone afterwards.
    """
    # A plain kill would leave the server running: turn it into an exception, which unwinds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    port, gate = _free_port(), _free_port() if gated else None
    # An idle server must not take a core from the one that is being timed.
    command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port), "--sleep-on-idle", *args]
    if gate:
        command += ["--gated-launch-port", str(gate)]
    with tempfile.TemporaryDirectory(prefix="sglang-dflash-") as scratch:
        log = Path(scratch, "server.log")
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **(env or {})}
            )
        try:
            yield Starting(title, process, _local(port), log, f"{_local(gate)}/gate/activate" if gate else None)
        finally:
            _stop(process)


@contextmanager
def serving(title: str, args: list[str], console: Console, env: dict[str, str] | None = None) -> Iterator[str]:
    """A server as `starting` runs it; gives its URL once it answers."""
    with starting(title, args, env) as server:
        yield server.ready(console)


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow what SGLang prints about other machines' kernels while it is imported into this process."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as s:
            if port not in _given and s.connect_ex(("127.0.0.1", port)):  # nobody listens there
                _given.add(port)
                return port
    raise ServerError(f"every port from {PORTS.start} to {PORTS.stop - 1} is in use: end what listens there")


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:  # not listening yet
        return False


def _opened(gate: str) -> bool:
    try:
        httpx.post(gate, timeout=5).raise_for_status()
    except httpx.TransportError:  # not there yet
        return False
    return True


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
