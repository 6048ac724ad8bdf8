"""Real servers on this machine, and what plain decoding says: the truth that every other server is held to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from client import Body, generate
from prompts import CONTEXT, PENALTIES, SEEDED, SETTINGS, SHORT_ANSWER, chats, chats_below, long_chats
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sglang_dflash import embedded
from sglang_dflash.cli.load import chat_ids
from sglang_dflash.cli.server import serving

SHORT_TOKENS, LONG_TOKENS = 64, 24
PLANT = Path(__file__).with_name("plant")
ON_GPU = torch.cuda.is_available()

Serve = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def tokenizer(pair: embedded.Pair) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pair.target)


@pytest.fixture(scope="session")
def target_model(pair: embedded.Pair) -> Any:
    """The target in transformers, for second implementations."""
    return AutoModelForCausalLM.from_pretrained(pair.target, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def serve(pair: embedded.Pair) -> Serve:
    """serve(*args, env=None): a server of the embedded target with these arguments; gives its URL.

    It serves in float32 unless told otherwise: by default on a CPU, asked for on a GPU.
    """

    @contextmanager
    def run(*args: str, env: dict[str, str] | None = None) -> Iterator[str]:
        base = ["--model-path", str(pair.target), "--log-level", "warning"]
        if ON_GPU:
            base += ["--mem-fraction-static", "0.8", "--max-total-tokens", "65536"]  # others may start meanwhile
            base += ["--cuda-graph-max-bs-prefill", "512"]  # capturing them all takes a minute
        if ON_GPU and "--dtype" not in args:
            base += ["--dtype", "float32"]
            if "--speculative-algorithm" not in args:  # SGLang's own kernels are made for 16 bits
                base += ["--attention-backend", "torch_native"]
                env = {**(env or {}), "SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}
        with serving(" ".join(args), [*base, *args], Console(stderr=True, quiet=True), env) as url:
            yield url

    return run


@pytest.fixture(scope="session")
def default_server(serve: Serve) -> Iterator[str]:
    """A server as a user starts it, for all modules that ask single requests of it."""
    # Name and draft as a user gives them; --enable-metrics is what serves /metrics.
    with serve(
        "--speculative-algorithm", "DFLASH", "--model-path", "smollm2-135m",
        "--enable-metrics", "--enable-custom-logit-processor", "--enable-streaming-session",
    ) as url:  # fmt: skip
        yield url


def planted(what: str) -> dict[str, str]:
    """The environment of a server with plant/dflash_plant.py in it; what: its DFLASH_PLANT."""
    path = os.pathsep.join(filter(None, [str(PLANT), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "DFLASH_PLANT": what}


@dataclass(frozen=True)
class Plain:
    """Greedy answers of a server without speculation, asked for when they are first needed: to 48 short and 4 long
    prompts, to one prompt in many settings, and to two prompts that leave little of a small context.
    """

    url: str
    short_bodies: list[Body]
    long_bodies: list[Body]
    bodies_to_the_end: list[Body]

    @cached_property
    def short(self) -> list[Body]:
        return self._answers(self.short_bodies)

    @cached_property
    def long(self) -> list[Body]:
        return self._answers(self.long_bodies[:4])  # no case asks more

    @cached_property
    def settings(self) -> list[Body]:
        return generate(self.url, [{**self.short_bodies[0], **setting} for setting in SETTINGS.values()], 4)

    @cached_property
    def to_the_end(self) -> list[Body]:
        return self._answers(self.bodies_to_the_end)

    def _answers(self, bodies: list[Body]) -> list[Body]:
        """Logprobs come along, to tell a tie from an error."""
        return generate(self.url, [{**body, "return_logprob": True, "top_logprobs_num": 2} for body in bodies], 32)


@pytest.fixture(scope="session")
def short_bodies(tokenizer: PreTrainedTokenizerBase) -> list[Body]:
    return [_greedy(ids, SHORT_TOKENS) for ids in chats(tokenizer)]


@pytest.fixture(scope="session")
def long_bodies(tokenizer: PreTrainedTokenizerBase) -> list[Body]:
    return [_greedy(ids, LONG_TOKENS) for ids in long_chats(tokenizer)]


@pytest.fixture(scope="session")
def to_the_end(tokenizer: PreTrainedTokenizerBase) -> list[Body]:
    """Two prompts that all but fill a context of CONTEXT tokens, each answered to its very end."""
    prompts = [ids[-(CONTEXT - left) :] for ids, left in zip(chats_below(tokenizer, 4000, 2), (50, 41), strict=True)]
    bodies = [_greedy(ids, CONTEXT - 2 - len(ids)) for ids in prompts]
    return [{**b, "sampling_params": {**b["sampling_params"], "ignore_eos": True}} for b in bodies]


@pytest.fixture(scope="session")
def plain(
    serve: Serve, short_bodies: list[Body], long_bodies: list[Body], to_the_end: list[Body]
) -> Iterator[Plain]:
    with serve("--enable-custom-logit-processor") as url:
        yield Plain(url, short_bodies, long_bodies, to_the_end)


@pytest.fixture(scope="session")
def known_answers(plain: Plain, short_bodies: list[Body], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short prompts' greedy answers as a file: [{"prompt": ids, "answer": ids}]."""
    file = tmp_path_factory.mktemp("known") / "answers.json"
    rows = [
        {"prompt": b["input_ids"], "answer": a["output_ids"]}
        for b, a in zip(short_bodies, plain.short, strict=True)
    ]
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="session")
def seeded_bodies(short_bodies: list[Body]) -> list[Body]:
    """Two prompts in every setting."""
    several = [(setting, body["input_ids"]) for setting in SEEDED for body in short_bodies[:2]]
    common = {"max_new_tokens": LONG_TOKENS, "ignore_eos": True}
    return [
        {"input_ids": ids, "sampling_params": {**setting, **common, "sampling_seed": 1000 + i}}
        for i, (setting, ids) in enumerate(several)
    ]


@pytest.fixture(scope="session")
def seeded_texts(default_server: str, seeded_bodies: list[Body]) -> list[list[int]]:
    """What a request with a seed says: all at once in a server that chooses its trees, or none."""
    return [answer["output_ids"] for answer in generate(default_server, seeded_bodies, len(seeded_bodies))]


@pytest.fixture(scope="session")
def penalised_bodies(tokenizer: PreTrainedTokenizerBase, short_bodies: list[Body]) -> list[Body]:
    """A prompt in every setting that looks back at what was emitted."""
    brief = chat_ids(tokenizer, SHORT_ANSWER)
    common = {"temperature": 0, "max_new_tokens": LONG_TOKENS}
    prompts = [brief if "min_new_tokens" in setting else None for setting in PENALTIES.values()]
    return [
        {"input_ids": prompt or body["input_ids"], "sampling_params": {**common, **setting}}
        for prompt, body, setting in zip(prompts, short_bodies, PENALTIES.values(), strict=False)
    ]


def _greedy(ids: list[int], tokens: int) -> Body:
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}}
