"""Requests and their measures, against a server that streams what SGLang streams."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import AutoTokenizer

from sglang_dflash import embedded
from sglang_dflash.cli import bench, demo, load
from sglang_dflash.cli.models import Models

STEPS = [1, 3, 1, 4]  # the prefill's token, then three verify steps that accepted 2, 0 and 3


class Handler(BaseHTTPRequestHandler):
    """Answers any prompt p with tokens p0, p0+1, …: chunks carry all ids so far, as SGLang's do."""

    busy, most_busy, flushed = 0, 0, 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
        if self.path == "/flush_cache":
            Handler.flushed += 1
            return
        Handler.busy += 1
        Handler.most_busy = max(Handler.most_busy, Handler.busy)
        first = json.loads(body)["input_ids"][0]
        for i in range(len(STEPS)):
            ids = list(range(first, first + sum(STEPS[: i + 1])))
            meta = {"spec_verify_ct": 3, "spec_num_correct_drafts": 5} if i == len(STEPS) - 1 else {}
            self._send({"output_ids": ids, "meta_info": meta})
        Handler.busy -= 1
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_ask_measures_steps_and_keeps_the_order(url: str) -> None:
    before = Handler.flushed
    result = load.ask(url, [[10], [500], [90]], max_tokens=9, concurrency=2)
    assert [a.ids[0] for a in result.answers] == [10, 500, 90]
    for answer in result.answers:
        assert answer.steps == STEPS
        assert answer.ids == list(range(answer.ids[0], answer.ids[0] + 9))
        assert 0 < answer.ttft <= answer.seconds <= result.seconds
    assert result.tok_s == pytest.approx(27 / result.seconds)
    assert load.accept_length(result.answers) == pytest.approx(1 + 5 / 3)
    assert Handler.most_busy <= 2
    assert Handler.flushed == before + 1


def test_no_accept_length_without_speculation() -> None:
    assert load.accept_length([answer([1, 2], [1, 1])]) is None


def test_shipped_questions() -> None:
    questions = load.gsm8k(400)
    assert len(set(questions)) == 400
    assert questions[0].startswith("Janet’s ducks lay 16 eggs per day")
    with pytest.raises(ValueError, match="401 prompts asked for, 400 shipped"):
        load.gsm8k(401)


def answer(ids: list[int], steps: list[int], verify_steps: int = 0, accepted: int = 0) -> load.Answer:
    return load.Answer(ids, steps, 0.1, 1.0, verify_steps, accepted)


def test_pieces_colour_what_was_drafted() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.ensure().target)
    text = "It is 日本, at 9."  # 日 and 本 are several tokens each
    ids = tokenizer.encode(text)
    steps = [1, 3, 1, len(ids) - 5]
    got = list(demo.pieces(tokenizer, answer(ids, steps)))
    assert "".join(piece for piece, _ in got) == text
    own = [i for i, (_, accepted) in enumerate(got) if not accepted]
    assert own == [0, 3, 4, len(ids) - 1]
    assert not any("\ufffd" in piece for piece, _ in got)


def test_rows_of_the_bench() -> None:
    models = Models("smollm2-135m", "smollm2-135m", "/target", "/draft")
    fast = load.Round([answer([1, 2, 3, 4], [1, 3], verify_steps=1, accepted=2)], 0.5)
    row = bench.Row("ours", 15, 8, 1, [fast, fast], [2.0, 2.0], [True, True])
    got = bench._json_row(row, models, 0.0)
    assert got.pop("device")
    assert got == {
        "server": "ours", "model": "smollm2-135m", "draft": "smollm2-135m", "tree": 15, "depth": 8,
        "concurrency": 1, "temperature": 0.0, "tok_s": [8.0, 8.0], "accept_length": 3.0, "ttft_ms": 100.0,
        "same_text": True,
    }  # fmt: skip
    row.same[0] = False
    assert bench._json_row(row, models, 0.0)["same_text"] is False
    assert bench._json_row(row, models, 0.7)["same_text"] is None


def test_arguments_for_the_server() -> None:
    models = Models("a", "b", "/target", "/draft")
    speculative = ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", "/draft"]
    assert models.plain_args() == ["--model-path", "/target"]
    assert models.dflash_args(None) == ["--model-path", "/target", *speculative]
    assert models.dflash_args(7)[-2:] == ["--speculative-num-draft-tokens", "7"]
