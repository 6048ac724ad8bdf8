"""The target in plain torch, and the engine on it, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sglang_dflash.training.data import Batch
from sglang_dflash.training.generate import Request, TorchEngine
from sglang_dflash.training.step import features, features_and_states
from sglang_dflash.training.target import Target

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)),
}


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Target]:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.save_pretrained(tmp_path)
    return model, Target.load(tmp_path, "cpu", torch.float32)


def test_features_of_packed_documents_are_those_of_each_alone(pair: tuple[Any, Target]) -> None:
    model, target = pair
    tokens, starts = torch.randint(61, (1, 20)), torch.tensor([[0] * 8 + [8] * 12])
    batch = Batch(tokens, starts, torch.ones_like(tokens).bool(), starts)
    packed = features(target, batch, [0, 1])
    same, states = features_and_states(target, batch, [0])
    assert torch.equal(same, packed[..., :32])
    for document in (slice(0, 8), slice(8, 20)):
        alone = model.model(tokens[:, document], output_hidden_states=True)
        first = alone.hidden_states[1]
        assert (packed[:, document, :32] - first).abs().max() < 1e-4 * first.abs().max()
        assert torch.allclose(states[:, document], alone.last_hidden_state, atol=1e-4)


def test_the_engine_s_greedy_answers_are_transformers_s(pair: tuple[Any, Target]) -> None:
    model, target = pair
    engine = TorchEngine(target, slots=3, width=96)
    requests = [Request(torch.randint(3, 61, (n,)).tolist(), 0.0, 10 + 7 * i) for i, n in enumerate((3, 9, 17, 4, 6))]
    told: list[int] = []
    answers = engine.generate(requests, stop=2, seed=0, progress=told.append)
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([request.prompt])
        full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new, do_sample=False)
        assert answer == full[0, len(request.prompt) :].tolist()
    assert sum(told) == sum(map(len, answers))


def test_sampled_answers_follow_the_seed_and_the_temperature(pair: tuple[Any, Target]) -> None:
    engine = TorchEngine(pair[1], slots=4, width=64)
    requests = [Request([5, 6, 7], 1.0, 20)] * 8

    def run(seed: int) -> list[list[int]]:
        return engine.generate(requests, stop=60, seed=seed, progress=lambda _: None)

    assert run(1) == run(1) != run(2)
    assert len({tuple(answer) for answer in run(1)}) > 1


def test_min_p_is_each_request_s_own(pair: tuple[Any, Target]) -> None:
    """The most probable token alone where it is 1, anything where it is 0, side by side."""
    engine = TorchEngine(pair[1], slots=6, width=64)
    requests = [Request([5, 6, 7], 5.0 if i else 0.0, 20, float(i % 2)) for i in range(6)]
    greedy, *others = engine.generate(requests, stop=60, seed=1, progress=lambda _: None)
    assert [answer == greedy for answer in others] == [True, False, True, False, True]


def test_a_prompt_that_does_not_fit_is_refused(pair: tuple[Any, Target]) -> None:
    engine = TorchEngine(pair[1], slots=1, width=16)
    with pytest.raises(ValueError, match="10 tokens and 7 new ones do not fit in 16"):
        engine.generate([Request(list(range(10)), 0.0, 7)], stop=2, seed=0, progress=lambda _: None)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ValueError, match="MambaForCausalLM is not one of"):
        Target.load(tmp_path, "cpu", torch.float32)
