"""Make training data from a target alone: its own prompts, its own answers.

    python scripts/make_data.py TARGET data/ --chunks 4 --given questions.jsonl
    python scripts/make_data.py TARGET long/ --chunks 4 --given questions.jsonl --long 2048

Writes one shard a chunk beside a manifest.json. A chunk that is there is not made again, so that an interrupted run
goes on where it stopped; several processes may share the work with --part.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from sglang_dflash.training import long as longs
from sglang_dflash.training import synth
from sglang_dflash.training.data import Answers, Document, write_shard
from sglang_dflash.training.generate import MIN_P, Engine, Request, SGLangEngine, TorchEngine
from sglang_dflash.training.target import Target

LENGTHS, TURNS = [100, 1000, 2000, 4000, 7000], [1, 2, 4, 8, 10]  # of long conversations set aside
WIDTH = synth.LONGEST_PROMPT * 2 + synth.USER_TOKENS + synth.ANSWER_TOKENS + 32
console = Console(soft_wrap=True)


class Meter:
    """Tokens made, said every few seconds."""

    def __init__(self) -> None:
        self.start, self.said, self.tokens = time.monotonic(), 0.0, 0

    def __call__(self, tokens: int) -> None:
        self.tokens += tokens
        elapsed = time.monotonic() - self.start
        if elapsed - self.said > 10:
            self.said = elapsed
            console.print(f"{self.tokens:,} tokens, {self.tokens / elapsed:,.0f} a second", highlight=False)


def main(
    target: Annotated[Path, typer.Argument(help="the target's checkpoint directory")],
    out: Annotated[Path, typer.Argument(help="where shards and manifest go")],
    chunks: Annotated[int, typer.Option(help="shards to make")] = 4,
    chunk: Annotated[int, typer.Option(help="synthetic prompts tried a shard")] = 32768,
    given: Annotated[
        list[Path] | None, typer.Option(help=".jsonl with a prompt or question a line; repeatable")
    ] = None,
    repeats: Annotated[int, typer.Option(help="times each given prompt is answered: greedily, at 0.7, at 1, ...")] = 3,
    copies: Annotated[int, typer.Option(help="of each given prompt, with other numbers in it, answered greedily")] = 0,
    held_out: Annotated[list[Path] | None, typer.Option(help=".jsonl of prompts to keep out; repeatable")] = None,
    answers_only: Annotated[bool, typer.Option(help="answer the given prompts greedily, for evaluation")] = False,
    long: Annotated[
        int, typer.Option(help="so many conversations of up to --longest tokens a shard, and nothing else")
    ] = 0,
    longest: Annotated[int, typer.Option(help="tokens of a long conversation: train on contexts as you serve")] = 8192,
    sampled: Annotated[
        float, typer.Option(help="share of answers sampled at temperatures of 0.6 to 1, the rest being greedy")
    ] = synth.SAMPLED,
    min_p: Annotated[
        float, typer.Option(help="a sampled token is so probable at least, as a part of the most probable one")
    ] = MIN_P,
    engine: Annotated[str, typer.Option(help="sglang, or torch: small targets, hosts without SGLang")] = "sglang",
    slots: Annotated[int, typer.Option(help="prompts answered at once by the torch engine")] = 2048,
    part: Annotated[str, typer.Option(help="I/N: make only chunks I, I + N, ...")] = "0/1",
    minutes: Annotated[float, typer.Option(help="begin no chunk that would end later if like the last")] = math.inf,
    seed: int = 0,
) -> None:
    """Prompts and answers by TARGET into OUT."""
    from transformers import AutoTokenizer

    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(target)
    chat = synth.ChatFormat(tokenizer)
    kept_out = synth.HeldOut(p for file in held_out or [] for p in synth.read_prompts(file))
    running = start(engine, target, slots, longest if long else WIDTH)
    # The meter's clock begins when the engine is there.
    making = synth.Synthesis(running, chat, kept_out, seed, Meter(), sampled, min_p)
    out.mkdir(parents=True, exist_ok=True)
    once = [p for file in given or [] for p in synth.read_prompts(file)]
    sources = synth.SOURCES
    if long:
        pool = longs.pool(making, 0, once, max(long // 4, 256))
    if answers_only and long:
        documents, sources = longs.held_out(making, pool, [n for n in LENGTHS if n < longest], TURNS, long, longest)
        write_shard(out / "shard-00000.npz", documents)
    elif answers_only:
        files = given or []
        write_shard(out / "shard-00000.npz", answered(making, files))
        sources = [file.stem for file in files]
    else:
        prompts = [(p, synth.TEMPERATURES[i % 3]) for i in range(repeats) for p in once]
        prompts += [(p, 0.0) for p in synth.varied(once, copies, seed)]
        first, step = map(int, part.split("/"))
        last = 0.0
        for number in range(first, chunks, step):
            shard, begin = out / f"shard-{number:05d}.npz", time.monotonic()
            if begin + last > started + 60 * minutes:
                break
            if not shard.exists():
                if long:
                    write_shard(shard, longs.long_chunk(making, number + 1, long, pool, longest))
                else:
                    write_shard(shard, making.chunk(number, chunk, prompts[number::chunks]))
                last = time.monotonic() - begin
                console.print(f"{shard} done in {last:.0f} s", highlight=False)
    run = {"seed": seed, "engine": engine, "chunk": chunk, "repeats": repeats, "copies": copies, "greedy": answers_only}
    run |= {"sampled": sampled, "sampled_at": synth.SAMPLED_AT, "min_p": min_p}
    if long:
        run |= {"long": long, "longest": longest}
    manifest(out, target, sources, run)


def start(name: str, target: Path, slots: int, width: int) -> Engine:
    if name == "sglang":
        return SGLangEngine(target, width)
    if name != "torch":
        raise typer.BadParameter(f"engine {name!r} is neither sglang nor torch")
    cuda = torch.cuda.is_available()
    model = Target.load(target, "cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
    return TorchEngine(model, slots, width)


def answered(making: synth.Synthesis, files: list[Path]) -> list[Document]:
    """Greedy answers to the prompts of files, the file's number as source."""
    chat = making.chat
    head, middle, _ = chat.cut(None)
    prompts = [(p, i) for i, file in enumerate(files) for p in synth.read_prompts(file)]
    ids = chat.encode([head + p + middle for p, _ in prompts])
    requests = [Request(i, 0.0, synth.ANSWER_TOKENS) for i in ids]
    answers = making.engine.generate(requests, chat.stop, making.seed, making.progress)
    return [
        Document(p + a, [(len(p), len(p) + len(a))], source)
        for p, a, (_, source) in zip(ids, answers, prompts, strict=True)
    ]


def manifest(out: Path, target: Path, sources: list[str], run: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    for file in sorted(target.glob("*.safetensors")):
        digest.update(file.read_bytes())
    facts: dict[str, Any] = {
        "target_sha256": digest.hexdigest(),
        "sources": sources,
        **run,
        "max_answer_tokens": synth.ANSWER_TOKENS,
    }
    path = out / "manifest.json"
    path.write_text(json.dumps(facts, indent=2) + "\n")  # Answers reads the sources' names
    answers = Answers(out)
    counts = {name: int((answers.source == i).sum()) for i, name in enumerate(sources)}
    facts |= {"documents": counts, "tokens": len(answers.tokens), "answer_tokens": int(answers.answer.sum())}
    path.write_text(json.dumps(facts, indent=2) + "\n")
    console.print_json(json.dumps(facts))


if __name__ == "__main__":
    typer.run(main)
