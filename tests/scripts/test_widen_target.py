"""A widened target and draft give the original's text, features and lattices."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from loading import ROOT, load
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from sglang_dflash import embedded
from sglang_dflash.cli.load import chat_ids, gsm8k
from sglang_dflash.draft.checkpoint import check_tensors, tensor_shapes_on_disk, unknown_names
from sglang_dflash.draft.config import DraftConfig

MAX_RELATIVE_ERROR = 1e-4


widen = load("scripts/widen_target.py")
reference = load("tests/draft/draft_reference.py")
tiny = load("tests/draft/checkpoints.py")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small lose more by waiting for a second thread, on a busy machine, than they gain by it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(wide: Tensor, narrow: Tensor) -> float:
    """Of the first entries, asserting that the last dimension's others are zero."""
    assert torch.count_nonzero(wide[..., narrow.shape[-1] :]) == 0
    wide = wide[..., : narrow.shape[-1]]
    assert wide.shape == narrow.shape
    return ((wide - narrow).abs().max() / narrow.abs().max()).item()


def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@dataclass
class Pair:
    """A target and its draft, loaded."""

    path: Path
    target: Any
    draft: Any

    @classmethod
    def load(cls, target: Path, draft: Path) -> Pair:
        raw = json.loads((draft / "config.json").read_text())
        dflash = raw["dflash_config"]
        raw.setdefault("expected_causal", [bool(dflash.get("causal_head"))] * raw["num_hidden_layers"])
        state = {n: t.float() for file in sorted(draft.glob("*.safetensors")) for n, t in load_file(file).items()}
        return cls(draft, model(target), reference.Reference(raw, state))

    def lattice(self, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Drafted behind all but the last of ids [T], the bonus token: hidden states, tokens and log-probabilities."""
        dflash = self.draft.raw["dflash_config"]
        states = self.target.model(ids[None, :-1], output_hidden_states=True).hidden_states
        context = self.draft.context(torch.cat([states[i + 1][0] for i in dflash["target_layer_ids"]], dim=-1))
        embedding, head = self.target.get_input_embeddings().weight, self.target.get_output_embeddings().weight
        block = torch.full((self.draft.raw["block_size"],), dflash["mask_token_id"])
        block[0] = ids[-1]
        hidden = self.draft.forward(context, embedding[block])
        return hidden, *self.draft.lattice(hidden[1:], int(ids[-1]), embedding, head, k)


def assert_lattices_are_equal(wide: Pair, narrow: Pair, ids: Tensor, k: int) -> None:
    hidden, tokens, logp = wide.lattice(ids, k)
    expected_hidden, expected_tokens, expected_logp = narrow.lattice(ids, k)
    assert tokens.tolist() == expected_tokens.tolist()
    errors = {"hidden": relative_error(hidden, expected_hidden), "lattice": relative_error(logp, expected_logp)}
    print(errors)
    assert max(errors.values()) < MAX_RELATIVE_ERROR


def assert_is_served(target: Path, draft: Path) -> None:
    """Config and tensors are what the server checks before it loads them."""
    config, wide = DraftConfig.load(draft), AutoConfig.from_pretrained(target)
    config.check(hidden_size=wide.hidden_size, vocab_size=wide.vocab_size, num_layers=wide.num_hidden_layers)
    shapes = tensor_shapes_on_disk(draft)
    check_tensors(shapes, config, source=str(draft))
    assert unknown_names(shapes, config) == []


# The embedded pair, at a width that two cores bear.


@pytest.fixture(scope="module")
def narrow() -> Pair:
    return Pair.load(*vars(embedded.ensure()).values())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    files, out = embedded.ensure(), tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widen, "SHARD_BYTES", 350 * 10**6)
        widths = {"hidden": 640, "layers": 31, "heads": 16, "kv_heads": 4, "mlp": 1600}
        widen.main(files.target, files.draft, out / "target", out / "draft", **widths, device="cpu", dtype="float32")
    assert len(list((out / "target").glob("*.safetensors"))) == 3
    assert_is_served(out / "target", out / "draft")
    pair = Pair.load(out / "target", out / "draft")
    for file in out.glob("*/*.safetensors"):
        file.unlink()  # a gigabyte; mapped, so it is there until the pair is gone
    yield pair


@pytest.fixture(scope="module")
def answered(narrow: Pair) -> list[tuple[Tensor, int]]:
    """GSM8K questions with the original's greedy answers, and where the answers start."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.ensure().target)
    prompts = [torch.tensor([chat_ids(tokenizer, question)]) for question in gsm8k(2)]
    with torch.inference_mode():
        return [
            (narrow.target.generate(prompt, max_new_tokens=40, do_sample=False)[0], prompt.shape[1])
            for prompt in prompts
        ]


def test_greedy_text_is_the_original_s(wide: Pair, narrow: Pair, answered: list[tuple[Tensor, int]]) -> None:
    for ids, start in answered:
        logits = wide.target(ids[None]).logits[0]
        # The likeliest token after every beginning of the text is its next one: so greedy decoding gives it.
        assert logits[start - 1 : -1].argmax(-1).tolist() == ids[start:].tolist()
        assert relative_error(logits, narrow.target(ids[None]).logits[0]) < MAX_RELATIVE_ERROR


def test_features_are_the_original_s_and_then_zeros(
    wide: Pair, narrow: Pair, answered: list[tuple[Tensor, int]]
) -> None:
    ids = answered[0][0][None]
    features, expected = (pair.target.model(ids, output_hidden_states=True).hidden_states for pair in (wide, narrow))
    assert len(features) == 32 and len(expected) == 31
    # The last of a model's is normed already: after the added layer, it is the original's again.
    errors = [relative_error(features[i], expected[i]) for i in range(30)] + [
        relative_error(features[31], expected[30])
    ]
    print(max(errors))
    assert max(errors) < MAX_RELATIVE_ERROR


def test_the_shipped_draft_s_lattices_are_the_original_s(
    wide: Pair, narrow: Pair, answered: list[tuple[Tensor, int]]
) -> None:
    for ids, start in answered:
        assert_lattices_are_equal(wide, narrow, ids[: start + 12], 16)


def test_added_weights_are_random_where_they_read_and_zero_where_they_write(wide: Pair) -> None:
    added, last = wide.target.model.layers[30], wide.target.model.layers[29]
    for weight in (added.self_attn.q_proj.weight, added.mlp.up_proj.weight, last.mlp.gate_proj.weight[1536:]):
        assert abs(weight.std().item() / widen.RANDOM_STD - 1) < 0.05
    for weight in (added.self_attn.o_proj.weight, added.mlp.down_proj.weight, last.mlp.down_proj.weight[576:]):
        assert torch.count_nonzero(weight) == 0


# Small random targets and drafts of every kind.

SMALL = {
    "hidden_size": tiny.H,
    "intermediate_size": tiny.INNER,
    "num_hidden_layers": 6,
    "num_attention_heads": tiny.HEADS,
    "num_key_value_heads": tiny.KV_HEADS,
    "head_dim": tiny.HEAD_DIM,
    "vocab_size": tiny.VOCAB,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
WIDER = {"hidden": 72, "layers": 8, "heads": 18, "kv_heads": 3, "head_dim": 24, "mlp": 80}
TARGETS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, biases and untied head": LlamaConfig(**SMALL, attention_bias=True, tie_word_embeddings=False),
    "llama3 rope": LlamaConfig(**SMALL, rope_parameters={**tiny.LLAMA3, "rope_theta": 1e4}),
    "qwen3": Qwen3Config(**SMALL, rms_norm_eps=1e-6),
}


def save_small_target(config: Any, path: Path) -> Path:
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 1:  # norms and biases as if trained
                weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in name))
    made.save_pretrained(path)
    return path


def save_draft(raw: dict[str, Any], path: Path, state: dict[str, Tensor] | None = None) -> Path:
    path.mkdir()
    save_file(state or tiny.weights(raw), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(raw))
    return path


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_target(TARGETS["llama"], tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_drafts_of_every_kind(kind: str, small_target: Path, tmp_path: Path) -> None:
    draft = save_draft(tiny.KINDS[kind], tmp_path / "draft")
    out = tmp_path / "out"
    widen.main(small_target, draft, out / "target", out / "draft", **WIDER, dtype="float32", device="cpu")
    assert_is_served(out / "target", out / "draft")
    wide, narrow = Pair.load(out / "target", out / "draft"), Pair.load(small_target, draft)
    assert wide.draft.raw["num_target_layers"] == 8
    assert_lattices_are_equal(wide, narrow, torch.arange(5, 30), 5)


def test_queries_and_keys_are_normed_with_the_original_s_eps(small_target: Path, tmp_path: Path) -> None:
    draft, out = save_draft({**tiny.KINDS["bias"], "rms_norm_eps": 0.3}, tmp_path / "draft"), tmp_path / "out"
    # A quarter of the hidden entries and all of a head's: there the power of two makes it exact.
    widths = {"hidden": 128, "layers": 6, "heads": 16, "kv_heads": 4, "head_dim": 8, "mlp": 48}
    widen.main(small_target, draft, out / "target", out / "draft", **widths, dtype="float32", device="cpu")
    wide, narrow = Pair.load(out / "target", out / "draft"), Pair.load(small_target, draft)
    assert_lattices_are_equal(wide, narrow, torch.arange(5, 30), 5)


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_of_every_kind(kind: str, tmp_path: Path) -> None:
    target = save_small_target(TARGETS[kind], tmp_path / "target")
    draft, out = save_draft(tiny.KINDS["qwen3"], tmp_path / "draft"), tmp_path / "out"
    widen.main(target, draft, out / "target", out / "draft", **WIDER, dtype="float32", device="cpu")
    ids = torch.arange(40)[None]
    narrow, wide = model(target), model(out / "target")
    assert wide.config.num_hidden_layers == 8 and wide.config.head_dim == 24
    assert relative_error(wide(ids).logits, narrow(ids).logits) < MAX_RELATIVE_ERROR


def test_the_script_runs_without_sglang_and_writes_bfloat16(small_target: Path, tmp_path: Path) -> None:
    draft, out = save_draft(tiny.KINDS["tied selector"], tmp_path / "draft"), tmp_path / "out"
    alone = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['sglang', 'sglang_dflash', 'transformers']));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    paths = [small_target, draft, out / "target", out / "draft"]
    options = [word for name, value in WIDER.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-c", alone, ROOT / "scripts/widen_target.py", *paths, *options, "--device", "cpu"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    for name in ("target", "draft"):
        tensors = [t for file in (out / name).glob("*.safetensors") for t in load_file(file).values()]
        assert {t.dtype for t in tensors} == {torch.bfloat16}
        assert sum(t.numel() for t in tensors) == report["parameters"][name]
        assert json.loads((out / name / "config.json").read_text())["dtype"] == "bfloat16"
    assert (out / "target" / "generation_config.json").is_file()


# What does not fit is named.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 16}, "--hidden 16 is less than the 32 of .*give 32 or more"),
        ({"mlp": 40}, "--mlp 40 is less than the 48"),
        ({"layers": 5}, "--layers 5 is less than the 6"),
        ({"kv_heads": 1}, "--kv-heads 1 is less than the 2"),
        ({"heads": 3}, "gives 1 query heads a KV head, fewer than the 2 .*give --heads 6 or more"),
        ({"heads": 16}, "--heads 16 is no multiple of --kv-heads 3"),
        ({"head_dim": 12}, "--head-dim 12 is no multiple of the 8"),
        ({"hidden": 70}, "--hidden 70 is no multiple of --heads 18"),
        ({"hidden": 54}, "--hidden 54 is no multiple of the conv_group_size 4"),
        ({"dtype": "float16"}, "'float16' is not one of bfloat16, float32"),
    ],
)
def test_widths_that_do_not_fit_are_named(
    options: dict[str, Any], message: str, small_target: Path, tmp_path: Path
) -> None:
    draft, out = save_draft(tiny.KINDS["DFlash2"], tmp_path / "draft"), tmp_path / "out"
    with pytest.raises(typer.BadParameter, match=message):
        widen.main(small_target, draft, out / "target", out / "draft", **{**WIDER, "device": "cpu", **options})
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        ({}, {"layers.0.self_attn.sinks": torch.zeros(4)}, r"tensor layers\.0\.self_attn\.sinks"),
        ({}, {"norm.weight": None}, r"tensor norm\.weight is missing"),
        ({}, {"fc.weight": torch.zeros(32, 96)}, r"fc\.weight has shape \[32, 96\].*asks for \[32, 64\]"),
        ({"architectures": ["Eagle"]}, {}, "architecture Eagle; only DFlashDraftModel"),
        ({"hidden_size": 48}, {}, "hidden_size is 48, the target's 32"),
        ({"vocab_size": 60}, {}, "vocab_size is 60, the target's 61"),
        ({"dflash_config": {"mask_token_id": 3}}, {}, "target_layer_ids is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {}, "rope_type yarn"),
        ({"partial_rotary_factor": 0.5}, {}, "partial or interleaved rotary"),
    ],
)
def test_drafts_that_cannot_be_widened_are_named(
    change: dict[str, Any], tensors: dict[str, Tensor | None], message: str, small_target: Path, tmp_path: Path
) -> None:
    raw = copy.deepcopy(tiny.KINDS["qwen3"])
    state = {n: t for n, t in {**tiny.weights(raw), **tensors}.items() if t is not None}
    draft, out = save_draft({**raw, **change}, tmp_path / "draft", state), tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        widen.main(small_target, draft, out / "target", out / "draft", **WIDER, device="cpu")
    assert not out.exists()


def test_weights_that_are_there_are_not_written_over(small_target: Path, tmp_path: Path) -> None:
    draft = save_draft(tiny.KINDS["qwen3"], tmp_path / "draft")
    with pytest.raises(typer.BadParameter, match="already holds weights: give a new directory"):
        widen.main(small_target, draft, tmp_path / "out", draft, **WIDER, device="cpu")


def test_a_wide_target_is_kept_for_one_more_draft(small_target: Path, tmp_path: Path) -> None:
    draft, out = save_draft(tiny.KINDS["qwen3"], tmp_path / "draft"), tmp_path / "out"
    widen.main(small_target, draft, out, tmp_path / "one", **WIDER, device="cpu")
    written = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    widen.main(small_target, draft, out, tmp_path / "two", **WIDER, device="cpu", seed=1)
    assert {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")} == written
    with pytest.raises(typer.BadParameter, match="weights of another shape"):
        widen.main(small_target, draft, out, tmp_path / "three", **{**WIDER, "layers": 9}, device="cpu")
