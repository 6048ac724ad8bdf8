"""Every file of examples/ run: against a fake server that answers as SGLang does, and with a fake engine."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import sglang

EXAMPLES = Path(__file__).parents[1] / "examples"
METRICS = """\
# TYPE sglang:dflash_tree_nodes gauge
sglang:dflash_tree_nodes{model_name="m"} 15.0
# TYPE sglang:dflash_steps counter
sglang:dflash_steps_total{model_name="m"} 10.0
# TYPE sglang:dflash_accepted_drafts counter
sglang:dflash_accepted_drafts_total{depth="1",model_name="m"} 8.0
sglang:dflash_accepted_drafts_total{depth="2",model_name="m"} 5.0
# TYPE sglang:dflash_step_seconds counter
sglang:dflash_step_seconds_total{model_name="m",part="draft"} 1.0
sglang:dflash_step_seconds_total{model_name="m",part="verify"} 3.0
"""


class Handler(BaseHTTPRequestHandler):
    """The routes that examples ask; a request that bounds no tokens is an error."""

    def do_GET(self) -> None:
        self._answer(METRICS, "text/plain")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["max_tokens"] <= 64
        if self.path == "/v1/completions":
            choices = [{"index": i, "text": f" sample {i}"} for i in range(len(body["prompt"]) * body["n"])]
            self._answer(json.dumps({"choices": choices[::-1]}))
        elif body.get("stream"):
            pieces = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("Par", "is", None)]
            lines = [json.dumps(piece) for piece in [*pieces, {"choices": []}]] + ["[DONE]"]
            self._answer("".join(f"data: {line}\n\n" for line in lines), "text/event-stream")
        else:
            schema = body["response_format"]["json_schema"]["schema"]
            content = json.dumps(dict.fromkeys(schema["required"], "x"))
            self._answer(json.dumps({"choices": [{"index": 0, "message": {"content": content}}]}))

    def _answer(self, text: str, kind: str = "application/json") -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing on the test's output."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


SHOWN = {
    "chat.py": ["Paris\n"],
    "sampled.py": ["the sea is …' sample 2'", "people will …' sample 3'"],
    "json_schema.py": ["{'city': 'x', 'inhabitants': 'x'}"],
    "metrics.py": ["trees of 15 nodes, 10 steps", "accept length 2.30", "depth  2: accepted in  50%", "verify 75%"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_asks_a_server(
    name: str, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, url])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    for text in SHOWN[name]:
        assert text in out


def test_the_offline_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Engine:
        def __init__(self, **settings: str) -> None:
            assert settings == {"model_path": "smollm2-135m", "speculative_algorithm": "DFLASH"}

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def generate(self, prompts: list[str], params: dict[str, int]) -> list[dict[str, Any]]:
            return [
                {"text": " …", "meta_info": {"completion_tokens": params["max_new_tokens"], "spec_verify_ct": 7}}
                for _ in prompts
            ]

    monkeypatch.setattr(sglang, "Engine", Engine)
    runpy.run_path(str(EXAMPLES / "engine.py"), run_name="__main__")
    assert capsys.readouterr().out.count("32 tokens in 7 verify steps") == 3


def test_each_example_is_run_and_listed() -> None:
    names = {file.name for file in EXAMPLES.glob("*.py")}
    assert names == {*SHOWN, "engine.py"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in names)
