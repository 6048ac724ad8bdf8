"""Answers of the target to many prompts, by the hundred: two engines behind one call."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_dflash.training.decode_attention import decode_attention
from sglang_dflash.training.target import Target

MIN_P = 0.02  # a sampled token is at least this probable, as a part of the most probable one


@dataclass(frozen=True)
class Request:
    """prompt token ids; temperature, 0 for greedy; at most max_new tokens are generated; min_p: see MIN_P."""

    prompt: list[int]
    temperature: float
    max_new: int
    min_p: float = MIN_P


Progress = Callable[[int], None]
"""told of tokens as they are made"""


class Engine(Protocol):
    def generate(self, requests: list[Request], stop: int, seed: int, progress: Progress) -> list[list[int]]:
        """The tokens of each answer, up to and with `stop` if it came."""


class SGLangEngine:
    """SGLang's offline engine: any target it serves. What it samples does not follow the seed."""

    def __init__(self, path: Path, width: int) -> None:
        from sglang import Engine as Offline

        self.engine = Offline(
            model_path=str(path),
            skip_tokenizer_init=True,
            context_length=width,
            log_level="warning",
            stream_interval=64,
        )

    def generate(self, requests: list[Request], stop: int, seed: int, progress: Progress) -> list[list[int]]:
        if not requests:  # of a small chunk no conversation may go on; SGLang refuses an empty batch
            return []
        parameters = [
            {"temperature": r.temperature, "min_p": r.min_p, "max_new_tokens": r.max_new, "stop_token_ids": [stop]}
            for r in requests
        ]
        out = self.engine.generate(input_ids=[r.prompt for r in requests], sampling_params=parameters)
        answers = [list(o["output_ids"]) for o in out]
        progress(sum(map(len, answers)))
        return answers


class TorchEngine:
    """A static batch of slots in plain torch, for small targets and hosts without SGLang.

    Every slot decodes at each step (one CUDA graph); every STEPS steps finished slots are handed new prompts.
    """

    STEPS = 32
    PREFILL_TOKENS = 1 << 14  # at a time, padding included: prompts of like length go together

    def __init__(self, target: Target, slots: int, width: int) -> None:
        """width: the longest prompt and answer together, in tokens."""
        self.target, self.slots, self.width = target, slots, width
        config, device = target.config, target.embedding.device
        layer: Any = target.layers[0]
        shape = (slots, width, config["num_key_value_heads"], layer.head_dim)
        self.cache = [
            tuple(torch.zeros(shape, dtype=target.embedding.dtype, device=device) for _ in "kv") for _ in target.layers
        ]
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.lens = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens in the cache
        self.temperature, self.min_p = torch.zeros(2, slots, device=device)
        self.sample: Callable[[Tensor, Tensor, Tensor], Tensor] = sample
        if device.type == "cuda":
            self.sample = torch.compile(sample, dynamic=True)
            for layer in target.layers:  # what attention does to a cache in place stays outside of what is compiled
                layer.before_attention = torch.compile(layer.before_attention, dynamic=True)
                layer.after_attention = torch.compile(layer.after_attention, dynamic=True)
        self.step = self._captured() if device.type == "cuda" else self._step

    @torch.no_grad()
    def _step(self) -> None:
        rows = torch.arange(self.slots, device=self.tokens.device)
        lens, seen = self.lens, self.lens + 1

        def attention(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
            state[0][rows, lens], state[1][rows, lens] = k, v
            return decode_attention(q, *state, seen)

        hidden = self.target.hidden(self.tokens, lens, attention, self.cache)
        self.tokens.copy_(self.sample(hidden @ self.target.head.T, self.temperature, self.min_p))
        lens.add_(1).clamp_(max=self.width - 1)

    def _captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    @torch.no_grad()
    def _prefill(self, slots: list[int], requests: list[Request]) -> None:
        """Fill slots' caches with their prompts and sample each first token."""
        device = self.tokens.device
        lens = torch.tensor([len(r.prompt) for r in requests])
        tokens = torch.zeros(len(requests), int(lens.max()), dtype=torch.int64)
        for row, request in zip(tokens, requests, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        tokens, lens, at = tokens.to(device), lens.to(device), torch.tensor(slots, device=device)

        def attention(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
            state[0][at, : k.shape[1]], state[1][at, : k.shape[1]] = k, v
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        hidden = self.target.hidden(tokens, positions, attention, self.cache)
        last = hidden[torch.arange(len(requests), device=device), lens - 1]
        temperature, min_p = torch.tensor([[r.temperature, r.min_p] for r in requests], device=device).T
        self.temperature[at], self.min_p[at], self.lens[at] = temperature, min_p, lens
        self.tokens[at] = self.sample(last @ self.target.head.T, temperature, min_p)

    def _admit(self, slots: list[int], requests: list[Request]) -> None:
        order = sorted(range(len(slots)), key=lambda i: len(requests[i].prompt))
        while order:
            count = max(1, min(len(order), self.PREFILL_TOKENS // len(requests[order[-1]].prompt)))
            group, order = order[-count:], order[:-count]
            self._prefill([slots[i] for i in group], [requests[i] for i in group])

    def generate(self, requests: list[Request], stop: int, seed: int, progress: Progress) -> list[list[int]]:
        for r in requests:
            if not 0 < len(r.prompt) <= self.width - r.max_new:
                raise ValueError(
                    f"a prompt of {len(r.prompt)} tokens and {r.max_new} new ones do not fit in {self.width}: "
                    "raise the width or shorten the prompt"
                )
        torch.manual_seed(seed)
        answers: list[list[int]] = [[] for _ in requests]
        waiting, free = deque(range(len(requests))), list(range(self.slots))
        owner = np.full(self.slots, -1)
        limit, count = np.zeros(self.slots, dtype=np.int64), np.zeros(self.slots, dtype=np.int64)
        written = np.zeros((self.slots, self.width + self.STEPS + 1), dtype=np.int64)
        while waiting or len(free) < self.slots:
            if waiting and free:
                new = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                slots, free = free[: len(new)], free[len(new) :]
                self._admit(slots, [requests[i] for i in new])
                owner[slots], limit[slots], count[slots] = new, [requests[i].max_new for i in new], 1
                written[slots, 0] = self.tokens.cpu().numpy()[slots]
            made = self._run()
            rows = np.nonzero(owner >= 0)[0]
            written[rows[:, None], count[rows, None] + np.arange(self.STEPS)] = made[:, rows].T
            stopped = (made[:, rows] == stop).any(0) | (written[rows, 0] == stop)
            count[rows] += self.STEPS
            done = rows[stopped | (count[rows] >= limit[rows])].tolist()
            self.lens[done] = 0  # an idle slot reads next to nothing
            for slot in done:
                answer = written[slot, : min(count[slot], limit[slot])].tolist()
                answer = answer[: answer.index(stop) + 1] if stop in answer else answer
                answers[owner[slot]] = answer
                progress(len(answer))
                owner[slot] = -1
                free.append(slot)
        return answers

    def _run(self) -> np.ndarray:
        """STEPS steps of every slot: tokens [STEPS, slots]."""
        made = []
        for _ in range(self.STEPS):
            self.step()
            made.append(self.tokens.clone())
        return torch.stack(made).cpu().numpy()


def sample(logits: Tensor, temperature: Tensor, min_p: Tensor) -> Tensor:
    """One token a row of logits [N, V]: the best at temperature [N] 0, else drawn from those min_p [N] allows."""
    x = logits.float()
    scaled = x / temperature.clamp(min=1e-4)[:, None]
    allowed = scaled >= scaled.amax(-1, keepdim=True) + min_p.log()[:, None]
    noise = -torch.empty_like(x).exponential_().log()  # Gumbel: the argmax is a draw from the softmax
    drawn = torch.where(allowed, scaled + noise, -torch.inf).argmax(-1)
    return torch.where(temperature > 0, drawn, x.argmax(-1))
