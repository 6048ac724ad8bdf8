"""Penalties a second time, in plain torch: what a greedy request with penalties must answer, token for token."""

from __future__ import annotations

from typing import Any

import torch
from client import Body
from torch import Tensor

TIE = 1e-4  # logits that differ by less are tied: passes of different width round differently


def differs_at(model: Any, body: Body, answer: list[int]) -> list[int]:
    """Places of a greedy answer whose token is not the one that its own beginning says.

    Tokens emitted before are penalised, as SGLang means it: not the prompt's.
    """
    prompt, params = body["input_ids"], body["sampling_params"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    ends = torch.tensor(model.generation_config.eos_token_id).view(-1)
    rows = [_penalised(row, answer[:at], params, ends) for at, row in enumerate(logits)]
    return [at for at, (row, token) in enumerate(zip(rows, answer, strict=True)) if row.max() - row[token] > TIE]


def _penalised(logits: Tensor, emitted: list[int], params: dict[str, Any], ends: Tensor) -> Tensor:
    scores = logits.clone()
    for token in set(emitted):
        scores[token] -= params.get("frequency_penalty", 0.0) * emitted.count(token)
        scores[token] -= params.get("presence_penalty", 0.0)
        scale = params.get("repetition_penalty", 1.0)
        scores[token] = scores[token] * scale if scores[token] < 0 else scores[token] / scale
    if len(emitted) < params.get("min_new_tokens", 0):
        scores[ends] = -torch.inf
    return scores
