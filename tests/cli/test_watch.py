"""Readings of a server's /metrics, as two looks at a real one were recorded: 8 chats of 48 tokens lie between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sglang_dflash.cli import app
from sglang_dflash.cli.watch import Poll, poll, reading

BEFORE, AFTER = ((Path(__file__).parent / "metrics" / f"{name}.txt").read_text() for name in ("before", "after"))
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(*texts, status=200): a server whose /metrics answers with one text after the other; gives its URL."""
    servers = []

    def start(*texts: str, status: int = 200) -> str:
        left = iter(texts)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert self.path == "/metrics"
                text = next(left, None)
                self.send_response(503 if text is None else status)
                self.end_headers()
                self.wfile.write((text or "going down").encode())

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def watch(url: str) -> Result:
    return CliRunner().invoke(app, ["watch", url, "--once", "--every", "0.1"], env={"COLUMNS": "160"})


def test_one_reading_of_two_looks(serve: Serve) -> None:
    result = watch(serve(BEFORE, AFTER) + "/")  # a slash too many
    assert result.exit_code == 0, result.output
    assert "accept length 3.96" in result.output
    assert "of 95 steps" in result.output
    assert "15 nodes" in result.output
    assert [line.split()[:2] for line in result.output.splitlines() if "█" in line][:2] == [["1", "91%"], ["2", "64%"]]
    assert [line.split()[0] for line in result.output.splitlines() if " ms " in line] == ["draft", "verify", "other"]


def test_what_was_emitted_between_two_looks(serve: Serve) -> None:
    url = serve(BEFORE, AFTER)
    first, second = poll(url), poll(url)
    now = reading(Poll(0.0, first.values), Poll(7.0, second.values))
    emitted = second.total("generation_tokens_total") - first.total("generation_tokens_total")
    assert now.tok_s * 7 == pytest.approx(emitted - 8), "of each chat but the token of its prefill"
    assert now.accept_length == pytest.approx((emitted - 8) / now.steps)
    assert now.accept_length == pytest.approx(1 + sum(now.by_depth))


def test_an_idle_server_has_no_accept_length(serve: Serve) -> None:
    result = watch(serve(AFTER, AFTER))
    assert result.exit_code == 0, result.output
    assert "0.0 tok/s" in result.output
    assert "no step ended" in result.output


def test_counters_of_a_restarted_server_begin_anew(serve: Serve) -> None:
    url = serve(AFTER, BEFORE)
    last, now = poll(url), poll(url)
    assert reading(last, now).steps == now.total("dflash_steps_total") > 0


@pytest.mark.parametrize(
    ("texts", "status", "said"),
    [
        (["Not Found"], 404, "--enable-metrics"),
        (["sglang:token_usage 0.5\n"], 200, "--speculative-algorithm DFLASH"),
    ],
)
def test_a_server_without_metrics(serve: Serve, texts: list[str], status: int, said: str) -> None:
    result = watch(serve(*texts, status=status))
    assert result.exit_code == 2
    assert said in result.output


def test_a_server_that_ends_while_it_is_watched(serve: Serve) -> None:
    result = CliRunner().invoke(app, ["watch", serve(BEFORE, AFTER), "--every", "0.1"], env={"COLUMNS": "160"})
    assert result.exit_code == 2
    assert "of 95 steps" in result.output, "the last reading stays"
    assert "answers 503: going down" in result.output


def test_no_server() -> None:
    result = watch("http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "no server answers at http://127.0.0.1:9" in result.output
