"""The bench's command line, and in which order its servers are asked; the servers are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sglang_dflash import embedded
from sglang_dflash.cli import app, bench, load
from sglang_dflash.cli.load import Answer, Round
from sglang_dflash.cli.models import Models
from sglang_dflash.cli.server import ServerError

MODELS = Models("target", "draft", "/target", "/draft")
NODES, STEPS, TOPK = (
    "--speculative-num-draft-tokens",
    "--speculative-num-steps",
    "--speculative-eagle-topk",
)


class Log(list[tuple[str, ...]]):
    """What was done to the servers that `fake` puts in the place of real ones."""

    broken = ""  # a server that fails in its first round; "start NAME": one that does not start


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    class Started:
        def __init__(self, name: str) -> None:
            self.name = name

        def ready(self, console: object) -> str:
            if log.broken == f"start {self.name}":
                raise ServerError(f"{self.name} ended with code 1")
            log.append(("ready", self.name))
            return self.name

    @contextmanager
    def starting(title: str, args: list[str], env: object, *, gated: bool) -> Iterator[Started]:
        name = title.split(",")[0]
        log.append(("start gated" if gated else "start", name))
        yield Started(name)
        log.append(("stop", name))

    def ask(url: str, prompts: list[list[int]], *, max_tokens: int, **settings: Any) -> Round:
        warm = max_tokens == bench.WARM_UP_TOKENS
        if log.broken == url and not warm:
            raise RuntimeError("the server answered 500")
        setting = f"{settings['concurrency']} at {settings['temperature']:g}"
        log.append(("warm up" if warm else "ask", url, setting, f"{len(prompts)} prompts"))
        answers = [Answer([1, 2, 3], [1, 2], 0.1, 0.2, 0, 0) for _ in prompts]
        return Round(answers, 1.0 if url == "ours" else 2.0)

    monkeypatch.setattr(bench, "starting", starting)
    monkeypatch.setattr(load, "ask", ask)
    monkeypatch.setattr(load, "memory_gb", lambda url: None)
    return log


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["bench", *args], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    "tree, args",
    [
        ("", []),
        ("7", [NODES, "7"]),
        ("0", [NODES, "0"]),
        ("31:10", [NODES, "31", STEPS, "10"]),
        ("chain:8", [NODES, "8", STEPS, "8", TOPK, "1"]),
    ],
)
def test_what_a_tree_means_to_sglang(tree: str, args: list[str]) -> None:
    assert bench.tree_args(tree) == args


@pytest.mark.parametrize("tree", ["x", "7:", ":7", "chain", "chain:", "7:8:9", "-1", "7.5"])
def test_a_tree_that_is_none(tree: str) -> None:
    with pytest.raises(ValueError, match=rf"--tree '{tree}': give nodes"):
        bench.tree_args(tree)


@pytest.mark.parametrize(
    "tree, nodes, depth, chain", [("7", 7, 0, False), ("15:4", 15, 4, False), ("chain:5", 5, 5, True)]
)
def test_our_servers(tree: str, nodes: int, depth: int, chain: bool) -> None:
    server = bench._ours(Models.of(embedded.NAME, None), tree, ["--dtype", "float32"])
    assert (server.nodes, server.depth, server.chain) == (nodes, depth, chain)
    assert server.args[-2:] == ["--dtype", "float32"]
    assert not server.env


def test_opponents_have_their_configs_block_or_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_on_cpu", lambda: False)
    draft = str(embedded.DRAFT)
    (server,) = bench._opponents(MODELS, [draft], None, ["--tp", "2"])
    block = json.loads((embedded.DRAFT / "config.json").read_text())["block_size"]
    assert server.args == [*MODELS.dflash_args(block, draft), "--tp", "2"]
    assert (server.draft, server.nodes, server.depth) == (draft, block - 1, block - 1)
    assert server.env == {"SGLANG_PLUGINS": "none"}
    for server in bench._opponents(MODELS, [draft, "/no/such/draft"], 8, []):
        assert server.args[-2:] == [NODES, "8"]


def test_no_server_runs_fewer_at_once_than_are_sent() -> None:
    assert bench.for_every_server(["--tp", "2"], [1, 48]) == ["--tp", "2"]
    assert bench.for_every_server([], [1, 128]) == ["--max-running-requests", "128"]
    assert bench.for_every_server(["--max-running-requests=64"], [128]) == ["--max-running-requests=64"]


def test_servers_take_turns_round_by_round(log: Log) -> None:
    result = run("--rounds", "2", "--concurrency", "1", "--concurrency", "3", "--prompts", "2", "--temperature", "0.5")
    assert result.exit_code == 0, result.output
    names = ("SGLang", "ours")
    rounds = [
        [("warm up", n, f"{width} at 0.5", f"{width} prompts") for n in names]
        + [("ask", n, f"{width} at 0.5", f"{max(2, width)} prompts") for _ in range(2) for n in names]
        for width in (1, 3)
    ]
    starts = [(what, n) for n in names for what in ("start", "ready")]
    stops = [("stop", n) for n in reversed(names)]
    assert log == [*starts, *rounds[0], *rounds[1], *stops]


def test_with_an_accelerator_all_start_at_once_and_take_memory_in_turn(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_on_cpu", lambda: False)
    result = run("--rounds", "1", "--tree", "7", "--tree", "chain:7", "--per-slot", "1")
    assert result.exit_code == 0, result.output
    names = ("SGLang", "ours", "ours")
    assert log[:6] == [(what, n) for what in ("start gated", "ready") for n in names]
    assert log[-3:] == [("stop", n) for n in reversed(names)]


def test_one_server_after_the_other(log: Log) -> None:
    result = run("--one-at-a-time", "--rounds", "2", "--per-slot", "4", "--prompts", "1")
    assert result.exit_code == 0, result.output
    assert "not alternating" in result.output
    assert log == [
        entry
        for name in ("SGLang", "ours")
        for entry in (
            ("start", name),
            ("ready", name),
            ("warm up", name, "1 at 0", "1 prompts"),
            *[("ask", name, "1 at 0", "4 prompts")] * 2,
            ("stop", name),
        )
    ]


def test_json_and_file(log: Log, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = run("--rounds", "1", "--benchmark", "code", "--tree", "7", "--json", "--out", str(out))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])
    assert [(r["server"], r["tree"], r["tok_s"], r["same_text"]) for r in rows] == [
        ("none", 0, [12.0], None), ("ours", 7, [24.0], True)
    ]  # fmt: skip
    assert rows[1]["benchmark"] == "code" and rows[1]["model"] == rows[1]["draft"] == embedded.NAME
    content = json.loads(out.read_text())
    assert content["rows"] == rows
    assert set(content) == {"command", "date", "device", "versions", "rows"}
    assert out.with_suffix(".png").is_file()


def test_long_prompts_say_how_long(log: Log, tmp_path: Path) -> None:
    result = run("--rounds", "1", "--prompt-tokens", "700", "--prompts", "2", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])
    assert all((row["benchmark"], row["prompt_tokens"]) == ("gsm8k", 700) for row in rows)


def test_rounds_before_a_failure_are_not_lost(log: Log, tmp_path: Path) -> None:
    log.broken = "ours"
    out = tmp_path / "bench.json"
    result = run("--rounds", "1", "--out", str(out))
    assert isinstance(result.exception, RuntimeError)
    assert [row["server"] for row in json.loads(out.read_text())["rows"]] == ["none"]


def test_a_server_that_finds_no_room(log: Log) -> None:
    log.broken = "start ours"
    result = run("--rounds", "1")
    assert result.exit_code == 1
    assert isinstance(result.exception, ServerError)
    assert "ended with code 1\nIf it lacks memory beside SGLang" in str(result.exception)
    assert "--one-at-a-time" in str(result.exception)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--tree", "x"], "--tree 'x': give nodes (15)"),
        (["--tree", "15:8", "--tree", "15:8"], "two of the servers are 'ours, 15 nodes, 8 deep'"),
        (["--opponent", "draft"], "SGLang's own DFLASH needs an accelerator"),
        (["--opponent-block", "8"], "--opponent-block 8 is for --opponent: name one"),
        (["--prompt-tokens", "90"], "a prompt of 90 tokens has no room for two problems: ask for 300 or more"),
        (["--benchmark", "chat", "--per-slot", "200"], "200 prompts are wanted, but chat has 150"),
        (["--no-such", "3"], "neither bench nor SGLang's server takes all of --no-such 3"),
        (["--out", "x.txt"], "'x.txt' does not end in .json"),
    ],
)
def test_refused_before_a_server_starts(log: Log, args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert not log
