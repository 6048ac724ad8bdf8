"""Requests and their measures, against a server that streams what SGLang streams."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoTokenizer

from sglang_dflash import embedded
from sglang_dflash.cli import demo, load
from sglang_dflash.cli.models import Models

STEPS = [1, 3, 1, 4]  # the prefill's token, then three verify steps that accepted 2, 0 and 3


class Handler(BaseHTTPRequestHandler):
    """Answers any prompt p with tokens p0, p0+1, …: chunks carry all ids so far, as SGLang's do.

    A prompt that begins with -1 is answered when as many as its second id are being asked, one with -2 in chunks
    that carry new ids only, one with -3 with an error.
    """

    busy, most_busy, flushed = 0, 0, 0
    crowd = threading.Condition()

    def do_GET(self) -> None:
        graph = {"prefill": 0.5, "decode": 1.0}
        used = {"weight": 16.0, "kvcache": 20.5, "graph": graph}
        self._answer(json.dumps({"internal_states": [{"memory_usage": used}]}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/flush_cache"):
            Handler.flushed += 1
            return self._answer(b"")
        asked = json.loads(body)
        with Handler.crowd:
            Handler.busy += 1
            Handler.most_busy = max(Handler.most_busy, Handler.busy)
            Handler.crowd.notify_all()
            if asked["input_ids"][0] == -1:
                Handler.crowd.wait_for(lambda: Handler.most_busy >= asked["input_ids"][1], timeout=20)
        self._stream(asked["input_ids"][0], every=asked["sampling_params"]["stream_interval"] == 1)
        with Handler.crowd:
            Handler.busy -= 1

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, first: int, every: bool) -> None:
        self.send_response(200)
        self.end_headers()
        if first == -3:
            self._send({"error": {"message": "out of memory"}})
        for i in range(len(STEPS)):
            if not every and 0 < i < len(STEPS) - 1:
                continue
            done = sum(STEPS[: i + 1])
            ids = list(range(first + done - STEPS[i] if first == -2 else first, first + done))
            meta = {"spec_verify_ct": 3, "spec_num_correct_drafts": 5} if i == len(STEPS) - 1 else {}
            self._send({"output_ids": ids, "meta_info": {"completion_tokens": done, **meta}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_ask_measures_steps_and_keeps_the_order(url: str) -> None:
    before, Handler.most_busy = Handler.flushed, 0
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


def test_without_steps_the_first_tokens_and_the_end_are_streamed(url: str) -> None:
    (answer,) = load.ask(url, [[10]], max_tokens=9, stream_interval=9).answers
    assert answer.ids == list(range(10, 19))
    assert answer.steps == [1, 8]
    assert answer.tpot == pytest.approx((answer.seconds - answer.ttft) / 8)


def test_as_many_at_once_as_asked_for(url: str) -> None:
    Handler.most_busy = 0
    load.ask(url, [[-1, 128]] * 128, max_tokens=9, concurrency=128)
    assert Handler.most_busy == 128


def test_chunks_of_new_ids_only_are_refused(url: str) -> None:
    with pytest.raises(RuntimeError, match=r"4 ids .* of 9 tokens.*leave out --incremental-streaming-output"):
        load.ask(url, [[-2]], max_tokens=9)


def test_an_error_of_the_server_is_shown(url: str) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        load.ask(url, [[-3]], max_tokens=9)


def test_memory_that_a_server_tells(url: str) -> None:
    assert load.memory_gb(url) == {"weights": 16.0, "kv_cache": 20.5, "graphs": 1.5}


def test_no_time_per_token_of_a_single_chunk() -> None:
    assert answer([1, 2], [2]).tpot is None
    assert answer([1, 2, 3, 4], [1, 2, 1]).tpot == pytest.approx(0.3)


def test_no_accept_length_without_speculation() -> None:
    assert load.accept_length([answer([1, 2], [1, 1])]) is None


def test_shipped_questions() -> None:
    questions = load.gsm8k(1319)
    assert len(set(questions)) == 1319
    assert questions[0].startswith("Janet’s ducks lay 16 eggs per day")
    with pytest.raises(ValueError, match="1320 prompts are wanted, but gsm8k has 1319: ask for fewer"):
        load.gsm8k(1320)


@pytest.mark.parametrize("tokens", [300, 1000, 5000])
def test_long_chats_are_as_long_as_asked(tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.ensure().target)
    chats = load.long_chats(tokenizer, load.gsm8k(load.GSM8K), tokens, 5)
    assert len({tuple(ids[:80]) for ids in chats}) == 5  # no prefix of one is in another's cache
    assert all(tokens - 300 < len(ids) <= tokens for ids in chats)
    text = tokenizer.decode(chats[1])
    assert "\n2. " in text and re.search(r"Solve problem \d+\.<\|im_end\|>\n<\|im_start\|>assistant\n$", text)
    with pytest.raises(ValueError, match="a prompt of 120 tokens has no room for two problems"):
        load.long_chats(tokenizer, load.gsm8k(5), 120, 1)


@pytest.mark.parametrize("benchmark", ["gsm8k", "chat", "code"])
def test_every_benchmark_has_prompts(benchmark: str) -> None:
    assert len(set(load.questions(benchmark, 150))) == 150


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


def test_arguments_for_the_server() -> None:
    models = Models("a", "b", "/target", "/draft")
    speculative = ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", "/draft"]
    assert models.plain_args() == ["--model-path", "/target"]
    assert models.dflash_args(None) == ["--model-path", "/target", *speculative]
    assert models.dflash_args(7)[-2:] == ["--speculative-num-draft-tokens", "7"]
    assert "/other" in models.dflash_args(None, "/other")


def test_a_target_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    for name in (str(tmp_path), "/nowhere"):
        with pytest.raises(typer.BadParameter, match=f"--model '{name}' gives no tokenizer"):
            Models.of(name, "/draft").tokenizer()
