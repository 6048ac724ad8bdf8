"""z-lab's own loop beside our server's chain: the same draft, the same text, and the same tokens a step.

    python scripts/peer_loop.py peer_loop.json

Both get one plain DFlash checkpoint, made of the embedded draft without its selector, and the embedded target in
float32. z-lab's `dflash` runs transformers; ours is a server that drafts chains. Greedy answers are compared step by
step, up to the last block, which z-lab's loop cuts to what is asked for. At temperature 1 z-lab accepts by rejection
and ours by shared noise: no text is the same, and what a step brings stands side by side.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import httpx
import torch
import typer
from dflash import model as zlab
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_dflash import embedded
from sglang_dflash.cli.bench import device_name
from sglang_dflash.cli.load import chat_ids, gsm8k
from sglang_dflash.cli.server import serving


def plain_draft(folder: Path) -> int:
    """Write the embedded draft without its selector, and without its window, which z-lab's model does not know; gives
    its block.
    """
    config = json.loads((embedded.DRAFT / "config.json").read_text())
    keys = ("mask_token_id", "target_layer_ids")
    config |= {"is_causal": True, "dflash_config": {key: config["dflash_config"][key] for key in keys}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(embedded.DRAFT / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "selector" not in k}, folder / "model.safetensors", {"format": "pt"})
    return int(config["block_size"])


def asked(url: str, ids: list[int], temperature: float, tokens: int) -> tuple[list[int], list[int]]:
    """A server's answer, and how many tokens each of its steps brought, the prefill's left out."""
    params = {"temperature": temperature, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": params, "stream": True}
    ends, output = [], []
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                told = json.loads(line[6:])
                output, count = told["output_ids"], told["meta_info"]["completion_tokens"]
                ends += [count] if not ends or count > ends[-1] else []
    return output, [b - a for a, b in itertools.pairwise(ends)]


def looped(draft: Any, target: Any, ids: list[int], temperature: float, tokens: int) -> tuple[list[int], list[int]]:
    """The same of z-lab's loop, which waits for CUDA where it takes the time."""
    zlab._cuda_time = time.perf_counter
    told = zlab.dflash_generate(draft, target, torch.tensor([ids]), tokens, None, temperature, return_stats=True)
    return told.output_ids[0, len(ids) :].tolist(), told.acceptance_lengths


def compared(ours: tuple[list[int], list[int]], theirs: tuple[list[int], list[int]], block: int) -> dict[str, Any]:
    """Whether the texts are the same, and in how many steps before the last block how many brought as much."""
    steps = same = done = 0
    for mine, their in zip(ours[1], theirs[1], strict=False):
        if done > len(theirs[0]) - 1 - 2 * block:
            break
        steps, same, done = steps + 1, same + (mine == their), done + their
    return {"same_text": ours[0] == theirs[0], "steps": steps, "same_steps": same}


def per_step(answers: list[tuple[list[int], list[int]]]) -> float:
    """Tokens that a step brought, in the mean over all steps."""
    return round(mean(tokens for _, steps in answers for tokens in steps), 3)


def main(
    out: Path,
    prompts: Annotated[int, typer.Option(help="of GSM8K's test questions")] = 8,
    tokens: Annotated[int, typer.Option(help="of an answer")] = 96,
) -> None:
    """Write OUT and print it."""
    target = embedded.ensure().target
    tokenizer = AutoTokenizer.from_pretrained(target)
    questions = [chat_ids(tokenizer, question) for question in gsm8k(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        block = plain_draft(Path(folder))
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        draft = zlab.DFlashDraftModel.from_pretrained(folder, dtype=torch.float32).eval()
        torch.manual_seed(0)
        theirs = {t: [looped(draft, model, ids, t, tokens) for ids in questions] for t in (0.0, 1.0)}
        args = f"--model-path {target} --speculative-algorithm DFLASH --speculative-draft-model-path {folder}".split()
        args += f"--speculative-num-draft-tokens {block - 1} --speculative-num-steps {block - 1}".split()
        args += ["--speculative-eagle-topk", "1"]
        with serving("a server of chains", args, Console(stderr=True)) as url:
            ours = {t: [asked(url, ids, t, tokens) for ids in questions] for t in (0.0, 1.0)}
    report = {
        "device": device_name(),
        "versions": {name: version(name) for name in ("sglang", "sglang-dflash", "dflash", "transformers", "torch")},
        "draft": "embedded, without its selector and its window",
        "block": block,
        "tokens": tokens,
        "greedy": [compared(a, b, block) for a, b in zip(ours[0.0], theirs[0.0], strict=True)],
        "tokens_a_step": {str(t): {"ours": per_step(ours[t]), "z-lab": per_step(theirs[t])} for t in ours},
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
