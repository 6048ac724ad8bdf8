"""A draft that knows the answer, and one that is always wrong, in one server: as long as can be, and as short."""

from __future__ import annotations

from pathlib import Path

from client import Body, generate
from conftest import Plain, Serve, planted

DEPTH = 8
TOKENS = 1 + 7 * (DEPTH + 1)  # the prefill's token, then seven whole steps


def test_right_drafts_are_accepted_whole_and_wrong_ones_not_at_all(
    serve: Serve, plain: Plain, short_bodies: list[Body], known_answers: Path
) -> None:
    longest = [i for i, a in enumerate(plain.short) if len(a["output_ids"]) >= TOKENS]
    right, wrong = ([i for i in longest if i % 2 == kind][:8] for kind in (0, 1))
    assert len(right) == len(wrong) == 8
    asked = [i for both in zip(right, wrong, strict=True) for i in both]
    params = {"temperature": 0, "max_new_tokens": TOKENS}
    bodies = [{"input_ids": short_bodies[i]["input_ids"], "sampling_params": params} for i in asked]
    with serve(
        "--speculative-algorithm", "DFLASH", "--speculative-num-draft-tokens", "15",
        "--speculative-num-steps", str(DEPTH), "--page-size", "16", env=planted(str(known_answers)),
    ) as url:  # fmt: skip
        answers = dict(zip(asked, generate(url, bodies, 8), strict=True))
    for i in asked:
        assert answers[i]["output_ids"] == plain.short[i]["output_ids"][:TOKENS]
    metas = {i: answers[i]["meta_info"] for i in asked}
    assert all(
        metas[i]["spec_num_correct_drafts"] == DEPTH * metas[i]["spec_verify_ct"] == 7 * DEPTH for i in right
    )
    assert all(metas[i]["spec_num_correct_drafts"] == 0 for i in wrong)
    assert all(metas[i]["spec_verify_ct"] == TOKENS - 1 for i in wrong)
