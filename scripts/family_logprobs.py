"""How far verified tokens' log-probabilities are from those of the same server's prefill, by family and backend.

    python scripts/family_logprobs.py docs/results/gpu/families.json              # all cases of one GPU
    python scripts/family_logprobs.py out.json "gpt-oss" "gpt-oss, no DFLASH"     # some
    python scripts/family_logprobs.py --together 6 out.json                       # no more servers at once

Servers of tiny random targets (tiny_models.py), with heads as SGLang's kernels for a GPU ask for, start all at once.
Greedy answers to prompts of random words, then to these with their answers, which the prefix cache knows; each text
again as a prompt alone. Random models have near-ties, so that texts tell little; log-probabilities differ by rounding,
or by a fault. In float32 where there is no GPU.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import tiny_models
import torch
from PIL import Image
from rich.console import Console
from schema_lengths import asked

from sglang_dflash.cli.bench import device_name
from sglang_dflash.cli.server import ServerError, Starting, starting

Body = dict[str, Any]
TOKENS = 40
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
ONCE = {"temperature": 0, "max_new_tokens": 1}
LENS = 1, 40, 120, 127, 130, 300, 700, 1100  # of prompts; about the sliding window, and far beyond it
BESIDE_IMAGES = 1, 48, 65, 98, 300
IMAGE = [tiny_models.PLACES[f"{place}_token_id"] for place in ("vision_start", "image", "vision_end")]
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 128, "intermediate_size": 256}
STATES = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}

TREE = ["--speculative-num-draft-tokens", "15", "--speculative-num-steps", "4"]
BUDGET = ["--speculative-num-draft-tokens", "15"]
CHAIN = ["--speculative-eagle-topk", "1"]
FLASHINFER, TRITON = ["--attention-backend", "flashinfer"], ["--attention-backend", "triton"]
FP8_CACHE = ["--kv-cache-dtype", "fp8_e4m3"]
STATE_CACHE = [
    "--max-mamba-cache-size", "100", "--mamba-track-interval", "64", "--linear-attn-prefill-backend", "triton",
]  # fmt: skip
# By name: the family, whether DFLASH drafts, and a server's own arguments.
CASES: dict[str, tuple[str, bool, list[str]]] = {
    "no nodes": ("qwen3", True, ["--speculative-num-draft-tokens", "0"]),
    "fa4": ("qwen3", True, [*TREE, "--attention-backend", "fa4"]),
    "triton": ("qwen3", True, [*BUDGET, "--page-size", "16", *TRITON]),
    "eight bits": ("qwen3", True, [*TREE, *TRITON, *FP8_CACHE]),
    "eight bits, no DFLASH": ("qwen3", False, [*TRITON, *FP8_CACHE]),
    "eight bits, fa3": ("qwen3", True, [*TREE, *FP8_CACHE]),
    "eight bits, fa3, no DFLASH": ("qwen3", False, FP8_CACHE),
    "eight bits, flashinfer": ("qwen3", True, [*BUDGET, "--page-size", "16", *FLASHINFER, *FP8_CACHE]),
    "eight bits, flashinfer, no DFLASH": ("qwen3", False, [*FLASHINFER, *FP8_CACHE]),
    "ModelOpt": ("llama-modelopt", True, TREE),
    "ModelOpt, no DFLASH": ("llama-modelopt", False, []),
    "ModelOpt, flashinfer": ("llama-modelopt", True, [*BUDGET, *FLASHINFER]),
    "ModelOpt, flashinfer, no DFLASH": ("llama-modelopt", False, FLASHINFER),
    "eight bits of weights": ("qwen3", True, [*TREE, "--quantization", "fp8"]),
    "eight bits of weights, no DFLASH": ("qwen3", False, ["--quantization", "fp8"]),
    "AWQ": ("qwen3-awq", True, TREE),
    "AWQ, no DFLASH": ("qwen3-awq", False, []),
    "GPTQ": ("qwen3-gptq", True, BUDGET),
    "GPTQ, no DFLASH": ("qwen3-gptq", False, []),
    "gpt-oss": ("gpt-oss", True, TREE),
    "gpt-oss, pages": ("gpt-oss", True, [*BUDGET, "--page-size", "16", "--swa-full-tokens-ratio", "0.4"]),
    "gpt-oss, one pool": ("gpt-oss", True, [*TREE, "--disable-hybrid-swa-memory"]),
    "gpt-oss, no DFLASH": ("gpt-oss", False, []),
    "gpt-oss, eight bits": ("gpt-oss", True, [*TREE, *FP8_CACHE]),
    "gpt-oss, triton": ("gpt-oss", True, [*TREE, *TRITON]),
    "gpt-oss, triton, no DFLASH": ("gpt-oss", False, TRITON),
    "gpt-oss, four bits": ("gpt-oss-mxfp4", True, TREE),
    "gpt-oss, four bits, no DFLASH": ("gpt-oss-mxfp4", False, []),
    "delta nets, fa4": ("qwen3.5", True, [*TREE, *STATE_CACHE, "--attention-backend", "fa4"]),
    "images": ("qwen3.5-vl", True, [*BUDGET, *STATE_CACHE]),
    "images, triton": ("qwen3.5-vl", True, [*BUDGET, *STATE_CACHE, *TRITON]),
    "images, no DFLASH": ("qwen3.5-vl", False, STATE_CACHE),
    "images, flashinfer, eight bits": ("qwen3.5-vl", True, [*BUDGET, *STATE_CACHE, *FLASHINFER, *FP8_CACHE]),
    "images, flashinfer, eight bits, no DFLASH": ("qwen3.5-vl", False, [*STATE_CACHE, *FLASHINFER, *FP8_CACHE]),
    "qwen3, no DFLASH": ("qwen3", False, []),
    "qwen3.5, no DFLASH": ("qwen3.5", False, STATE_CACHE),
}
# Without CUDA graphs; and with them, but without overlap and without a prefix cache.
WAYS = {
    "eager": [*TREE, "--disable-cuda-graph"],
    "in turn": [*CHAIN, "--disable-overlap-schedule", "--disable-radix-cache"],
}
CASES |= {
    f"{family}, {backend}, {way}": (family, True, [*states, *own, "--attention-backend", backend])
    for family, states in (("qwen3", []), ("qwen3.5", STATE_CACHE))
    for backend in ("fa3", "flashinfer", "triton")
    for way, own in WAYS.items()
}
# Of two GPUs; asked for by name.
SHARED = {
    "two GPUs": ("qwen3", True, [*BUDGET, "--tp-size", "2"]),
    "two GPUs, no DFLASH": ("qwen3", False, ["--tp-size", "2"]),
}


def made(family: str, folder: Path, dtype: str) -> tuple[Path, Path]:
    """A family's target and draft, the target of a type."""
    target, draft = folder / family / "target", folder / family / "draft"
    if not target.exists():
        tiny_models.main(tiny_models.Family(family), target, draft)
        config = target / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float32"', f'"dtype": "{dtype}"'))
    return target, draft


def arguments(target: Path, draft: Path, dtype: str, drafts: bool, own: list[str]) -> list[str]:
    speculative = ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", str(draft)]
    return [
        "--model-path", str(target), "--dtype", dtype, "--skip-tokenizer-init", "--context-length", "2048",
        "--max-total-tokens", "16384", "--max-running-requests", "8", "--mem-fraction-static", "0.5", "--random-seed",
        "0", *(speculative if drafts else []), *own,
    ]  # fmt: skip


def words(count: int) -> list[int]:
    return torch.randint(3, 90, (count,)).tolist()


def picture(width: int, height: int) -> str:
    pixels, file = torch.randint(256, (height, width, 3), dtype=torch.uint8), io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def prompts(with_images: bool) -> list[Body]:
    """The same in every run."""
    torch.manual_seed(0)
    if not with_images:
        return [{"input_ids": words(n)} for n in LENS]
    return [
        *({"input_ids": words(n)} for n in BESIDE_IMAGES),
        {"input_ids": words(5) + IMAGE + words(3), "image_data": [picture(96, 64)]},
        {
            "input_ids": IMAGE + words(60) + IMAGE + words(3),
            "image_data": [picture(128, 160), picture(64, 64)],
        },
    ]


def row(answer: Body, again: Body) -> dict[str, Any]:
    """How far an answer's log-probabilities are from those of the same text as a prompt."""
    said = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    read = torch.tensor([entry[0] for entry in again["meta_info"]["input_token_logprobs"][-len(said) :]])
    apart, meta = (said - read).abs(), answer["meta_info"]
    return {
        "prompt": meta["prompt_tokens"],
        "cached": meta["cached_tokens"],
        "accepted": meta.get("spec_num_correct_drafts", 0),
        "mean": apart.mean().item(),
        "largest": apart.max().item(),
        "ids": answer["output_ids"],
    }


def summary(found: list[dict[str, Any]]) -> str:
    mean, largest = fmean(each["mean"] for each in found), max(each["largest"] for each in found)
    return f"{mean:.4f} on average, {largest:.3f} at most"


def rows(url: str, with_images: bool) -> list[dict[str, Any]]:
    asks = [{**body, "sampling_params": GREEDY, "return_logprob": True} for body in prompts(with_images)]
    first = asked(url, asks, 8)[0]
    longer = [
        {**ask, "input_ids": [*ask["input_ids"], *answer["output_ids"], 5, 6]}
        for ask, answer in zip(asks, first, strict=True)
    ]
    asks, answers = asks + longer, first + asked(url, longer, 8)[0]
    whole = [
        {**ask, "input_ids": ask["input_ids"] + answer["output_ids"], "sampling_params": ONCE, "logprob_start_len": 0}
        for ask, answer in zip(asks, answers, strict=True)
    ]
    return [row(*pair) for pair in zip(answers, asked(url, whole, 4)[0], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    cases = CASES | SHARED
    parser.add_argument("cases", nargs="*", help=f"of: {'; '.join(cases)}")
    parser.add_argument("--together", type=int, help="the most servers at once; without it, all of them")
    asks = parser.parse_args()
    names = asks.cases or list(CASES)
    if unknown := set(names) - set(cases):
        parser.error(f"there is no case {sorted(unknown)}: give some of {list(cases)}")
    on_gpu = torch.cuda.is_available()
    dtype, found = "bfloat16" if on_gpu else "float32", {}
    about = {"device": device_name(), "versions": {name: version(name) for name in ("sglang", "torch")}}
    if on_gpu:
        tiny_models.SHAPE.update(HEADS)
        tiny_models.GPT_OSS.update(WINDOW)
        tiny_models.DELTA_NETS.update(STATES)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers: dict[str, tuple[ExitStack, Starting]] = {}
        for done, name in enumerate(names):
            for other in names[len(servers) : done + (asks.together or len(names))]:
                family, drafts, own = cases[other]
                server = arguments(*made(family, Path(folder), dtype), dtype, drafts, own)
                running = stack.enter_context(ExitStack())
                servers[other] = running, running.enter_context(starting(other, server))
            running, started = servers[name]
            with running:  # it makes room for another when it has answered
                try:
                    found[name] = rows(started.ready(Console()), cases[name][0] in tiny_models.WITH_IMAGES)
                except (ServerError, httpx.HTTPError) as error:  # told; the others may start and answer
                    print(name, str(error) or repr(error), flush=True)
                    continue
            print(name, summary(found[name]), flush=True)
            asks.out.write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
