"""Server processes: what is shown when one fails, and that none is left behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from sglang_dflash.cli import server


def fake_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Put `code` in the place of `python -m sglang.launch_server`."""
    script = tmp_path / "fake-python"
    script.write_text(f"#!{sys.executable}\nimport os, sys, time\nargs = sys.argv\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


SERVE = """
import http.server, subprocess
child = subprocess.Popen(["sleep", "1000"])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(args[args.index("--port") + 1])), Handler).serve_forever()
"""


GATED = """
import http.server
class Gate(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        open(os.environ["LOG"], "a").write(self.path + " ")
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(args[args.index("--gated-launch-port") + 1])), Gate).handle_request()
"""


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_whole_process_group_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_server(monkeypatch, tmp_path, SERVE)
    pids = tmp_path / "pids"
    with (
        pytest.raises(KeyError, match="inside"),
        server.serving("fake", [], Console(file=io.StringIO()), {"PIDS": str(pids)}) as url,
    ):
        assert url.startswith("http://127.0.0.1:")
        running = [int(pid) for pid in pids.read_text().split()]
        assert not any(gone(pid) for pid in running)
        raise KeyError("inside")
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in running):
        assert time.monotonic() < deadline, "a process of the server is still there"
        time.sleep(0.05)


def test_gates_open_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_server(monkeypatch, tmp_path, GATED + SERVE)
    logs = [tmp_path / "first", tmp_path / "second"]
    envs = [{"PIDS": str(tmp_path / f"pids of {log.name}"), "LOG": str(log)} for log in logs]
    console = Console(file=io.StringIO())
    with (
        server.starting("first", [], envs[0], gated=True) as first,
        server.starting("second", [], envs[1], gated=True) as second,
    ):
        first.ready(console)
        assert logs[0].read_text() == "/gate/activate " and not logs[1].exists()
        assert second.process.poll() is None
        second.ready(console)
        assert logs[1].read_text() == "/gate/activate "


def test_a_failing_server_shows_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_server(monkeypatch, tmp_path, "print('no such model: x', flush=True); sys.exit(3)")
    with (
        pytest.raises(server.ServerError, match=r"(?s)fake ended with code 3:.*no such model: x"),
        server.serving("fake", [], Console(file=io.StringIO())),
    ):
        pass


def test_a_killed_client_takes_its_server_along(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    fake = tmp_path / "fake-python"
    fake.write_text(f"#!{sys.executable}\nimport os, sys\nargs = sys.argv\n{SERVE}\n")
    fake.chmod(0o755)
    client = (
        "import sys, time\nfrom rich.console import Console\nfrom sglang_dflash.cli.server import serving\n"
        f"sys.executable = {str(fake)!r}\nwith serving('fake', [], Console()):\n    time.sleep(1000)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", client], env={**os.environ, "PIDS": str(pids)}, stdout=subprocess.PIPE
    )
    assert process.stdout and b"ready" in process.stdout.readline()
    running = [int(pid) for pid in pids.read_text().split()]
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    time.sleep(0.5)
    assert all(gone(pid) for pid in running)


def test_a_port_is_free_and_nobody_is_given_it_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    given_by_chance = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [server._free_port() for _ in range(100)]
    assert all(port < given_by_chance for port in ports)
    assert len({*ports}) == 100, "who was given one may not listen yet"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "PORTS", range(port, port + 1))
        with pytest.raises(server.ServerError, match=f"from {port} to {port} is in use"):
            server._free_port()
