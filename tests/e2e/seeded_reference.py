"""Seeded sampling a second time, in NumPy and plain torch: what a request with a seed must answer, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def noise(seed: int, position: int, vocab: int) -> Tensor:
    """Gumbel noise of every token, as SGLang's `murmur_hash32` and `multinomial_with_seed` make it."""

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return x << np.uint32(by) | x >> np.uint32(32 - by)

    h = np.zeros(vocab, np.uint32)
    words = [seed % 2**32, (seed >> 32) % 2**32, position]
    with np.errstate(over="ignore"):
        for k in [*(np.full(vocab, word, np.uint32) for word in words), np.arange(vocab, dtype=np.uint32)]:
            h ^= rotated(k * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
            h = rotated(h, 13) * np.uint32(5) + np.uint32(0xE6546B64)
        h ^= np.uint32(16)
        h = (h ^ h >> np.uint32(16)) * np.uint32(0x85EBCA6B)
        h = (h ^ h >> np.uint32(13)) * np.uint32(0xC2B2AE35)
        h ^= h >> np.uint32(16)
    u = np.maximum(h.astype(np.float64), 0.5) / (2**32 - 1)
    return torch.from_numpy(-np.log(-np.minimum(np.log(u), -(2.0**-32))))


def differs_at(model: Any, prompt: list[int], answer: list[int], params: dict[str, Any]) -> list[int]:
    """Places of an answer whose token is not the one that the seed says, each after the answer's own beginning."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return [
        at
        for at, (row, token) in enumerate(zip(logits, answer, strict=True))
        if token != _token(row, len(prompt) - 1 + at, params)
    ]


def _token(logits: Tensor, position: int, params: dict[str, Any]) -> int:
    if params["temperature"] == 0:
        return int(logits.argmax())
    scaled = logits / params["temperature"]
    sorted_probs, order = scaled.softmax(-1).sort(descending=True)
    kept = torch.arange(len(logits)) < params.get("top_k", len(logits))
    kept &= sorted_probs.cumsum(-1) - sorted_probs < params.get("top_p", 2.0)
    kept &= sorted_probs >= params.get("min_p", 0.0) * sorted_probs[0]
    score = scaled + noise(params["sampling_seed"], position, len(logits))
    return int(order[kept][score[order[kept]].argmax()])
