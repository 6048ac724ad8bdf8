"""docs/settings.md names tests that are there, and every setting of SGLang's sampling."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sglang.srt.sampling.sampling_params import SamplingParams

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs" / "settings.md").read_text().splitlines() if line.startswith("| ")][1:]
# What SGLang makes of others.
INTERNAL = {
    "stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized", "ebnf_full_assistant",
}  # fmt: skip


def test_each_setting_names_tests_that_are_there() -> None:
    assert len(ROWS) > 15
    for row in ROWS:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^(def|class) {test}\b", (ROOT / file).read_text(), re.MULTILINE), (file, test)


def test_no_setting_of_a_sample_is_left_out() -> None:
    named = {word for row in ROWS for word in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert set(SamplingParams.__struct_fields__) - INTERNAL <= named


def test_the_soak_s_figures_are_its_file_s() -> None:
    told = json.loads((ROOT / "docs" / "results" / "soak.json").read_text())
    text = " ".join((ROOT / "docs" / "settings.md").read_text().split())
    assert told["complete"] and not told["failures_at_the_end"]
    for figure in (
        f"{told['requests']:,} requests, {told['concurrency']} at once, {told['tokens']:,} tokens",
        f"{told['side']['/pause_generation']} pauses, {told['retractions']:.0f} retractions for want of room",
        f": {told['verdicts']['ok']:,} answered right",
        f"{told['verdicts']['aborted']} aborted and {told['verdicts']['refused']} refused",
        f"{told['ties']} ties, {told['wrong']} wrong",
    ):
        assert figure in text
