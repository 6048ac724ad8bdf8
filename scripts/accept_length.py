"""Accept lengths of a causal draft with a tied selector, computed offline from transformers, without SGLang.

usage: accept_length.py TARGET DRAFT ANSWERS.json --tree NODES:DEPTH ... --chain DEPTH ... --window TOKENS ...
       accept_length.py TARGET DRAFT chat|code|gsm8k --temperature T --top-p P --b B ... --out SAMPLED.json

ANSWERS.json holds [{"prompt": token ids, "answer": token ids}], the target's own greedy answers; long_answers.py makes
some, each with a "group". Each answer is walked as a server walks it: draft at the last emitted token, grow, follow the
answer, go on where it leaves the tree. The draft sees the last TOKENS committed tokens (0: all; else what its config
says). The last line printed is a JSON object {"tree 15": accept length, ...}; of rows in groups there is one a group,
and with windows given the names are such as "tree 15, window 256". --out FILE.json takes it and what it was made with,
and a plot goes beside it.

With a temperature T the answers are sampled here, to the first prompts of a benchmark that ships with the package, each
with a seed. A tree is grown in softmax(b (logits / T + noise)), with the noise that the samples were drawn with; b = 0
stands for what greedy requests have, softmax(logits). A server has b = T. --out gets a row for each shape and b added.

Everything here is written a second time, in plain torch and plain Python, to check the server by; but for the noise and
the samples, which are the package's own (tests compare them with another implementation).
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_dflash.cli.load import chat_ids, questions
from sglang_dflash.kernels.sampling import gumbel, sample

SEED = 1000  # of the first answer; the others have those that follow


class Draft:
    """One draft checkpoint over one target. After `read`, `lattice` drafts at any token of the text read."""

    def __init__(self, path: Path, target: torch.nn.Module, likeliest: int = 0) -> None:
        """likeliest: tokens of a row that noise is added to, others being left out; 0: all of them."""
        self.likeliest = likeliest
        self.raw = json.loads((path / "config.json").read_text())
        tensors = {k: v.float() for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
        self.w = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
        self.extra = self.raw["dflash_config"]
        self.window = self.extra.get("draft_window", 0)
        assert self.extra["causal_head"], "this script reads causal drafts with a tied selector"
        assert self.extra["selector_tied"], "this script reads causal drafts with a tied selector"
        self.target = target
        self.embedding, self.head = (
            target.get_input_embeddings().weight,
            target.get_output_embeddings().weight,
        )
        selector = "candidate_selector.{}_projection"
        before = linear(self.embedding, self.w[selector.format("predecessor")])
        self.before = rms_norm(before, before.shape[-1:], eps=self.extra["selector_eps"])
        self.after = linear(self.head, self.w[selector.format("successor")])
        self.gate = self.w[selector.format("hidden")]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.w[name], self.raw["rms_norm_eps"])

    def heads(self, x: Tensor, name: str, positions: Tensor | None) -> Tensor:
        """[heads, T, head_dim], rotated where positions are given."""
        dim = self.raw["head_dim"]
        y = linear(x, self.w[f"{name}_proj"]).view(len(x), -1, dim)
        if positions is not None:
            y = self.norm(y, f"{name}_norm")
            angle = positions[:, None] / self.raw["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            a, b = y.chunk(2, -1)
            y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return y.transpose(0, 1)

    def read(self, ids: list[int]) -> None:
        """Make every layer's context keys and values of a whole text."""
        states = self.target.base_model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        features = torch.cat([states[i + 1][0] for i in self.extra["target_layer_ids"]], -1)
        context = self.norm(linear(features, self.w["fc"]), "hidden_norm")
        positions = torch.arange(len(ids))
        layers = [f"layers.{i}.self_attn" for i in range(self.raw["num_hidden_layers"])]
        self.context = [
            (self.heads(context, f"{at}.k", positions), self.heads(context, f"{at}.v", None)) for at in layers
        ]
        self.drafted: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def logits(self, bonus: int, position: int, depth: int, window: int) -> tuple[Tensor, Tensor]:
        """`block`'s hidden states and what the head makes of them, kept until another text is read."""
        key = position, depth, window
        if key not in self.drafted:
            hidden = self.block(bonus, position, depth, window)
            self.drafted[key] = hidden, linear(hidden, self.head)
        return self.drafted[key]

    def block(self, bonus: int, position: int, depth: int, window: int) -> Tensor:
        """Final hidden states [depth, H] at the masks behind the bonus token at `position`; window 0: it sees all."""
        first = max(0, position - window) if window else 0
        x = self.embedding[torch.tensor([bonus] + [self.extra["mask_token_id"]] * depth)]
        positions = torch.arange(position, position + depth + 1)
        seen = torch.ones(depth + 1, position - first + depth + 1, dtype=torch.bool).tril(position - first)
        for i, (keys, values) in enumerate(self.context):
            at = f"layers.{i}"
            h = self.norm(x, f"{at}.input_layernorm")
            k = torch.cat([keys[:, first:position], self.heads(h, f"{at}.self_attn.k", positions)], 1)
            v = torch.cat([values[:, first:position], self.heads(h, f"{at}.self_attn.v", None)], 1)
            q = self.heads(h, f"{at}.self_attn.q", positions)
            out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            x = x + linear(out.transpose(0, 1).flatten(1), self.w[f"{at}.self_attn.o_proj"])
            h = self.norm(x, f"{at}.post_attention_layernorm")
            gate, up = linear(h, self.w[f"{at}.mlp.gate_proj"]), linear(h, self.w[f"{at}.mlp.up_proj"])
            x = x + linear(silu(gate) * up, self.w[f"{at}.mlp.down_proj"])
        return self.norm(x, "norm")[1:]

    def lattice(
        self, bonus: int, position: int, depth: int, window: int, noise: Tensor | None = None, scale: float = 1.0
    ) -> tuple[list[list[int]], list[list[list[float]]]]:
        """Candidates [depth][K], and their log-probabilities [depth][predecessor][K], of scale * (logits + noise).

        noise: [depth, V].
        """
        hidden, logits = self.logits(bonus, position, depth, window)
        if noise is not None:
            if self.likeliest:
                logits = logits.masked_fill(logits < logits.topk(self.likeliest).values[:, -1:], -torch.inf)
            logits = scale * (logits + noise)
        unary, tokens = logits.topk(self.extra["selector_top_k"], -1)
        predecessors = torch.cat([torch.full_like(tokens[:1], bonus), tokens[:-1]])
        queries = self.before[predecessors] * linear(hidden, self.gate)[:, None]
        scores = unary[:, None] + scale * (queries @ self.after[tokens].transpose(1, 2))
        share = unary.logsumexp(-1) - logits.logsumexp(-1)
        return tokens.tolist(), (scores.log_softmax(-1) + share[:, None, None]).tolist()


Path_ = tuple[int, ...]  # ranks of the candidates on the way from the root


def grow(logp: list[list[list[float]]], nodes: int) -> set[Path_]:
    """The `nodes` most probable paths, by a heap."""
    tree: set[Path_] = set()
    heap: list[tuple[float, Path_]] = [(-p, (rank,)) for rank, p in enumerate(logp[0][0])]
    heapq.heapify(heap)
    while len(tree) < nodes:
        cost, path = heapq.heappop(heap)
        tree.add(path)
        if len(path) < len(logp):
            for rank, p in enumerate(logp[len(path)][path[-1]]):
                heapq.heappush(heap, (cost - p, (*path, rank)))
    return tree


def descend(logp: list[list[list[float]]]) -> set[Path_]:
    """The chain by greedy descent, with all its beginnings."""
    path: Path_ = ()
    for row in logp:
        scores = row[path[-1] if path else 0]
        path = (*path, max(range(len(scores)), key=scores.__getitem__))
    return {path[:i] for i in range(1, len(path) + 1)}


def accepted(tree: set[Path_], tokens: list[list[int]], answer: list[int]) -> int:
    """How many tokens of the answer the tree holds."""
    path: Path_ = ()
    for candidates, token in zip(tokens, answer, strict=False):
        if token not in candidates or (*path, candidates.index(token)) not in tree:
            break
        path = (*path, candidates.index(token))
    return len(path)


def steps(
    draft: Draft, row: dict[str, Any], nodes: int | None, depth: int, window: int, b: float | None = None
) -> int:
    """Verify steps that one answer takes after its first token. nodes None: the chain. b: as above; None: as served."""
    prompt, answer, temperature = row["prompt"], row["answer"], row.get("temperature", 0)
    b, noise = temperature if b is None else b, None
    if b:
        # A token is sampled at the one before it: the bonus token's place is where the first drafted one's noise is.
        places = torch.arange(len(prompt), len(prompt) + len(answer) + depth)
        noise = temperature * gumbel(torch.full_like(places, row["seed"]), places, len(draft.head))
    at, count = 0, 0  # `at`: place of the bonus token in the answer
    while at + 1 < len(answer):
        known = (noise[at : at + depth], b / temperature) if noise is not None else ()
        tokens, logp = draft.lattice(answer[at], len(prompt) + at, depth, window, *known)
        tree = descend(logp) if nodes is None else grow(logp, nodes)
        at += accepted(tree, tokens, answer[at + 1 :]) + 1
        count += 1
    return count


@torch.inference_mode()
def by_group(
    target: torch.nn.Module,
    draft: Path,
    rows: list[dict[str, Any]],
    kinds: dict[str, tuple[int | None, int]],
    windows: Sequence[int] = (),
    bs: Sequence[float] = (),
    likeliest: int = 0,
) -> dict[str, dict[str, float]]:
    """Tokens a step by group of rows and kind, each answer's first token aside; kinds: name -> (nodes, or None for a
    chain; depth). windows, bs: to be compared, where it is not the draft's own window, and the row's temperature.
    """
    drafter = Draft(draft, target, likeliest)
    names: dict[str, tuple[Any, ...]] = {kind: (*how, drafter.window) for kind, how in kinds.items()}
    if windows:
        names = {f"{kind}, window {w}": (*how, w) for kind, how in kinds.items() for w in windows}
    if bs:
        names = {f"{name}, b {b:g}": (*how, b) for name, how in names.items() for b in bs}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    tokens: dict[str, int] = defaultdict(int)
    for number, row in enumerate(rows, start=1):
        group = row.get("group", "")
        print(f"{number} of {len(rows)}: {group or 'answer'}, {len(row['prompt'])} tokens before", file=sys.stderr)
        drafter.read(row["prompt"] + row["answer"])
        tokens[group] += len(row["answer"]) - 1
        for name, how in names.items():
            counts[group][name] += steps(drafter, row, *how)
    return {g: {name: tokens[g] / count for name, count in of.items()} for g, of in counts.items()}


def load(target: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


@torch.inference_mode()
def sampled(
    model: Any, prompts: list[list[int]], temperature: float, top_p: float, tokens: int
) -> list[dict[str, Any]]:
    """Rows of answers of at most so many tokens, all sampled together."""
    bs, lens = len(prompts), torch.tensor([len(p) for p in prompts])
    longest = int(lens.max())
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen = torch.arange(longest) >= longest - lens[:, None]
    positions, seeds, past, answers = (seen.cumsum(1) - 1).clamp(min=0), SEED + torch.arange(bs), None, ids[:, :0]
    settings = [torch.full((bs,), x) for x in (temperature, 1 << 30, top_p, 0.0)]
    for place in range(tokens):
        mask = seen.long()
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=past, logits_to_keep=1)
        past, positions = out.past_key_values, lens[:, None] + place
        ids = sample(out.logits[:, -1], lens + place - 1, seeds, *settings, top_p < 1)[:, None]
        seen, answers = torch.cat([seen, seen.new_ones(bs, 1)], 1), torch.cat([answers, ids], 1)
    rows = []
    for prompt, seed, answer in zip(prompts, seeds.tolist(), answers.tolist(), strict=True):
        ends = [i for i, token in enumerate(answer, start=1) if token == model.config.eos_token_id]
        answer = answer[: (*ends, tokens)[0]]
        rows.append({"prompt": prompt, "answer": answer, "seed": seed, "temperature": temperature})
    return rows


def accept_lengths(
    target: Path,
    draft: Path,
    rows: list[dict[str, Any]],
    kinds: dict[str, tuple[int | None, int]],
    window: int | None = None,
    likeliest: int = 0,
) -> dict[str, float]:
    """The same of all rows together, by kind alone; window None: the draft's own."""
    rows = [{**row, "group": ""} for row in rows]
    windows = () if window is None else (window,)
    lengths = by_group(load(target), draft, rows, kinds, windows, likeliest=likeliest)[""]
    return dict(zip(kinds, lengths.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("answers")
    parser.add_argument("--tree", nargs="*", default=["7:7", "15:8", "31:9"], metavar="NODES:DEPTH")
    parser.add_argument("--chain", nargs="*", type=int, default=[7], metavar="DEPTH")
    parser.add_argument("--window", nargs="*", type=int, default=[], metavar="TOKENS")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--b", nargs="*", type=float, default=[], help="beside 0 and the temperature")
    parser.add_argument("--likeliest", type=int, default=0, help="tokens that are given noise, as on a CPU; 0: all")
    parser.add_argument("--count", type=int, default=40, help="answers that are sampled")
    parser.add_argument("--tokens", type=int, default=48, help="of each of them, at most")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    kinds: dict[str, tuple[int | None, int]] = {f"chain {depth}": (None, depth) for depth in args.chain}
    for tree in args.tree:
        nodes, depth = map(int, tree.split(":"))
        kinds[f"tree {nodes}"] = (nodes, depth)
    model = load(args.target)
    facts = {"device": f"CPU, {platform.machine()}", "torch": torch.__version__}
    facts |= {"transformers": transformers.__version__, "dtype": "float32"}
    if args.temperature:
        return of_samples(args, model, kinds, facts)
    rows = json.loads(Path(args.answers).read_text())
    lengths: dict[str, Any] = {
        group: {name: round(length, 3) for name, length in of.items()}
        for group, of in by_group(model, args.draft, rows, kinds, args.window).items()
    }
    if args.out:
        prompts = spans(rows)
        args.out.write_text(json.dumps({**facts, "prompts": prompts, "accept_length": lengths}, indent=1) + "\n")
        plot(prompts, lengths, args.out.with_suffix(".png"))
    print(json.dumps(lengths[""] if list(lengths) == [""] else lengths))


def of_samples(args: argparse.Namespace, model: Any, kinds: dict[str, Any], facts: dict[str, str]) -> None:
    """Answers sampled and walked: a row for each shape and b, printed, and added to --out."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = [chat_ids(tokenizer, question) for question in questions(args.answers, args.count)]
    rows = sampled(model, prompts, args.temperature, args.top_p, args.tokens)
    tried = sorted({args.temperature, *args.b})
    lengths = by_group(model, args.draft, rows, kinds, bs=[0.0, *tried], likeliest=args.likeliest)[""]
    asked = {"dataset": args.answers, "temperature": args.temperature, "top_p": args.top_p, "answers": len(rows)}
    asked |= {"tokens": sum(len(row["answer"]) for row in rows), "draft": args.draft.resolve().parent.name}
    asked |= {"likeliest": args.likeliest} if args.likeliest else {}
    results = []
    for kind, b in ((kind, b) for kind in kinds for b in tried):
        today, noisy = lengths[f"{kind}, b 0"], lengths[f"{kind}, b {b:g}"]
        found = {"shape": kind, "b": b, "without": round(today, 3), "shared_noise": round(noisy, 3)}
        results.append({**asked, **found, "ratio": round(noisy / today, 3), **facts})
        print(json.dumps(found | {"ratio": results[-1]["ratio"]}))
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept + results) + "\n]\n")


def spans(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each group, its prompts' lengths and how many answer tokens there are."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        group = groups.setdefault(row.get("group", ""), {"prompt_tokens": [], "answer_tokens": 0})
        group["prompt_tokens"].append(len(row["prompt"]))
        group["answer_tokens"] += len(row["answer"])
    return groups


def plot(prompts: dict[str, Any], lengths: dict[str, dict[str, float]], path: Path) -> None:
    """Accept length by prompt length, a picture for each kind of group ("list 100" is a "list")."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(group.split()[0] if group else "all" for group in lengths))
    figure = Figure(figsize=(4 * len(kinds), 3.2), layout="tight")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        groups = [group for group in lengths if kind in (group.split() or ["all"])[0]]
        x = [sum(prompts[g]["prompt_tokens"]) / len(prompts[g]["prompt_tokens"]) for g in groups]
        for name in lengths[groups[0]]:
            axes.plot(x, [lengths[g][name] for g in groups], marker=".", label=name)
        axes.set(title=kind, xlabel="tokens before the answer", ylim=(0, None))
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
