"""What window passes cannot do on CUDA is told apart before anything is loaded; no GPU is needed to know it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dflash import embedded
from sglang_dflash.draft.config import DraftConfig
from sglang_dflash.platforms import Need, cuda
from sglang_dflash.targets import Target

ASKED = {
    "attention_backend": None,
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "speculative_draft_attention_backend": None,
    "dtype": "auto",
    "tp_size": 1,
}
TARGET = Target(
    hidden_size=576,
    vocab_size=49152,
    num_layers=30,
    head_dim=64,
    dtype="bfloat16",
    quantization="",
    needs={},
    two_pools=False,
    full_layers=True,
    unserved="",
)
EIGHT_BITS = {Need.FP8_CACHE: "it is in eight bits"}
NETS_AND_IMAGES = {Need.DELTA_NETS: "it keeps a state", Need.IMAGES: "it reads images"}
WINDOWS_AND_SINKS = {Need.WINDOWS: "it slides", Need.SINKS: "it has sinks"}


@pytest.mark.parametrize(
    ("asked", "draft", "target", "capability", "reason"),
    [
        ({}, {}, {}, (9, 0), ""),
        ({"attention_backend": "fa3"}, {}, {}, (8, 0), ""),
        (
            {}, {}, {}, (10, 0),
            "by fa3 is not made for compute capability 10.0: there trees need --attention-backend flashinfer, tri",
        ),
        ({}, {}, {}, (10, 0), "triton or fa4, seen on no such GPU yet"),
        ({}, {}, {}, (12, 0), "there trees need --attention-backend flashinfer or triton, seen"),
        ({}, {}, {}, (7, 0), "the GPU has compute capability 7.0, and trees need 7.5"),
        ({}, {}, {}, (7, 5), "there trees need --attention-backend flashinfer or triton, seen on no such GPU yet"),
        ({"attention_backend": "triton"}, {}, {}, (7, 5), ""),
        ({"attention_backend": "flashinfer"}, {}, {}, (9, 0), ""),
        ({"attention_backend": "flashinfer"}, {}, {}, (12, 0), ""),
        ({"prefill_attention_backend": "flashinfer"}, {}, {}, (8, 6), ""),
        ({"attention_backend": "flashinfer"}, {}, {"head_dim": 80}, (9, 0), "target's head size 80 is not 64"),
        ({"attention_backend": "fa3"}, {}, {}, (10, 0), "not made for compute capability 10.0"),
        ({"attention_backend": "trtllm_mha"}, {}, {}, (10, 0), "not made for compute capability 10.0"),
        ({"attention_backend": "triton"}, {}, {}, (8, 0), ""),
        ({"attention_backend": "triton"}, {}, {}, (12, 0), ""),
        ({"decode_attention_backend": "triton"}, {}, {}, (9, 0), ""),
        ({"attention_backend": "fa4"}, {}, {}, (9, 0), ""),
        ({"attention_backend": "fa4"}, {}, {}, (10, 3), ""),
        (
            {"attention_backend": "fa4"}, {}, {}, (8, 6),
            "by fa4 is not made for compute capability 8.6: there trees need --attention-backend fa3, flashinfer",
        ),
        ({"attention_backend": "fa4"}, {}, {}, (12, 0), "--attention-backend flashinfer or triton"),
        ({"attention_backend": "fa4"}, {}, {"head_dim": 256}, (10, 0), "target's head size 256 is not 64 or 128"),
        ({"dtype": "float32", "attention_backend": "flashinfer"}, {}, {}, (9, 0), "flashinfer reads no tree"),
        (
            {"prefill_attention_backend": "flashinfer", "decode_attention_backend": "fa3"}, {}, {}, (9, 0),
            "--decode-attention-backend fa3 is not flashinfer, and all passes of target and draft have one",
        ),
        (
            {"speculative_draft_attention_backend": "flashinfer"}, {}, {}, (9, 0),
            "--speculative-draft-attention-backend flashinfer is not fa3, and all passes",
        ),
        ({"attention_backend": "flex_attention"}, {}, {}, (9, 0), "flex_attention reads no tree, fa3 does"),
        ({"tp_size": 2}, {}, {}, (9, 0), ""),
        (
            {"tp_size": 2, "attention_backend": "flashinfer"}, {}, {}, (9, 0),
            "attention is by flashinfer, which was not seen on several GPUs (--tp-size 2)",
        ),
        ({"tp_size": 4, "dtype": "float32"}, {}, {}, (9, 0), "attention is by plain_torch, which was not seen on"),
        (
            {"tp_size": 2}, {}, {"needs": {Need.SINKS: "it has sinks"}}, (9, 0),
            "it has sinks, which was not seen on several GPUs (--tp-size 2)",
        ),
        ({"dtype": "float32"}, {}, {}, (9, 0), ""),
        ({"dtype": "float", "attention_backend": "plain_torch"}, {}, {}, (12, 0), ""),
        ({"dtype": "float32", "attention_backend": "fa3"}, {}, {}, (9, 0), "fa3 reads no tree, plain_torch does"),
        ({"speculative_draft_attention_backend": "plain_torch"}, {}, {}, (9, 0), "reads no tree, fa3 does"),
        ({}, {}, {"needs": WINDOWS_AND_SINKS}, (9, 0), ""),
        ({}, {}, {"needs": NETS_AND_IMAGES}, (9, 0), ""),
        (
            {"attention_backend": "flashinfer"}, {}, {"needs": {Need.WINDOWS: "it slides"}}, (9, 0),
            "slides, which window passes of flashinfer do not serve here yet (--attention-backend fa3 or triton does)",
        ),
        (
            {"attention_backend": "flashinfer"}, {}, {"needs": {Need.SINKS: "it has sinks"}}, (10, 0),
            "which window passes of flashinfer do not serve here yet (--attention-backend triton does)",
        ),
        ({"attention_backend": "triton"}, {}, {"needs": EIGHT_BITS}, (8, 6), "need compute capability 8.9"),
        (
            {}, {}, {"needs": EIGHT_BITS}, (8, 9),
            "beside fa3 need compute capability 9.0 (--attention-backend flashinfer or triton does)",
        ),
        ({}, {}, {"needs": EIGHT_BITS}, (9, 0), ""),
        ({"attention_backend": "flashinfer"}, {}, {"needs": EIGHT_BITS}, (8, 9), ""),
        ({"attention_backend": "triton"}, {}, {"needs": EIGHT_BITS}, (9, 0), ""),
        (
            {"attention_backend": "fa4"}, {}, {"needs": EIGHT_BITS}, (9, 0),
            "of fa4 do not serve here yet (--attention-backend fa3, flashinfer or triton does)",
        ),
        ({"attention_backend": "triton"}, {}, {"needs": NETS_AND_IMAGES}, (12, 0), ""),
        ({"attention_backend": "flashinfer"}, {}, {"needs": NETS_AND_IMAGES | EIGHT_BITS}, (9, 0), ""),
        (
            {"attention_backend": "fa4"}, {}, {"needs": {Need.IMAGES: "it reads images"}}, (9, 0),
            "window passes of fa4 do not serve here yet (--attention-backend fa3, flashinfer or triton does)",
        ),
        ({"attention_backend": "fa4"}, {}, {"needs": {Need.DELTA_NETS: "it keeps a state"}}, (9, 0), ""),
        ({"attention_backend": "triton"}, {}, {"needs": WINDOWS_AND_SINKS}, (9, 0), ""),
        ({"dtype": "float32"}, {}, {"needs": {Need.SINKS: "it has sinks"}}, (9, 0), "window passes of plain_torch do"),
        ({}, {}, {"head_dim": 80}, (9, 0), "target's head size 80 is not 64, 128 or 256"),
        ({"dtype": "float32"}, {}, {"head_dim": 80}, (9, 0), ""),
        ({}, {"head_dim": 96}, {}, (9, 0), "draft's head size 96 is not 64, 128 or 256"),
        ({"dtype": "float32"}, {"head_dim": 96}, {}, (9, 0), "draft's head size 96"),
        ({}, {"window_left": (-1, 127, -1)}, {}, (9, 0), ""),
        ({}, {"causal_layers": (True, False, True)}, {}, (9, 0), ""),
    ],
)  # fmt: skip
def test_what_cuda_does_not_serve(
    asked: dict[str, Any],
    draft: dict[str, Any],
    target: dict[str, Any],
    capability: tuple[int, int],
    reason: str,
) -> None:
    config = dataclasses.replace(DraftConfig.load(embedded.DRAFT), **draft)
    arguments = SimpleNamespace(**{**ASKED, **asked})
    told = cuda.unserved(arguments, arguments, config, dataclasses.replace(TARGET, **target), capability)
    assert reason in told if reason else told == ""


def test_what_sglang_chose_itself_is_no_wish() -> None:
    """On Ampere, and for a chain with large pages, SGLang's default is flashinfer."""
    settled = SimpleNamespace(**{**ASKED, "attention_backend": "flashinfer"})
    draft = DraftConfig.load(embedded.DRAFT)
    asked = SimpleNamespace(**ASKED)
    assert cuda.unserved(asked, settled, draft, TARGET, (8, 0)) == ""
    assert cuda.attention_backend(asked, "auto") == "fa3"
