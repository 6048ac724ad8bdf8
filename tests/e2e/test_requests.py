"""Every request setting, on one default server: the same answer as plain decoding, and SGLang's own clients."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from client import Body, accept_length, generate, metrics
from conftest import Plain
from openai import AsyncOpenAI
from prompts import SETTINGS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sglang_dflash import embedded
from sglang_dflash.cli.load import gsm8k

GRAFANA = Path(__file__).parents[2] / "docs" / "grafana"


@pytest.fixture(scope="module")
def server(default_server: str) -> str:
    return default_server


@pytest.fixture(scope="module")
def answers(server: str, short_bodies: list[Body]) -> dict[str, Body]:
    """All settings at once, so that each shares its batches with the others."""
    bodies = [{**short_bodies[0], **setting} for setting in SETTINGS.values()]
    return dict(zip(SETTINGS, generate(server, bodies, len(bodies)), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_setting_answers_as_plain_decoding(name: str, answers: dict[str, Body], plain: Plain) -> None:
    truth = plain.settings[list(SETTINGS).index(name)]
    assert answers[name]["output_ids"] == truth["output_ids"]
    assert answers[name]["text"] == truth["text"]
    assert answers[name]["meta_info"]["finish_reason"] == truth["meta_info"]["finish_reason"]


@pytest.mark.parametrize("name", ["json schema", "json schema of long names", "regex"])
def test_a_request_with_a_grammar_drafts(name: str, server: str, short_bodies: list[Body], plain: Plain) -> None:
    answers = generate(server, [{**short_bodies[0], **SETTINGS[name]}], 1)
    assert answers[0]["output_ids"] == plain.settings[list(SETTINGS).index(name)]["output_ids"]
    assert accept_length(answers) > 1


def test_settings_change_the_text(plain: Plain) -> None:
    """The settings above bite: else their test could not fail."""
    texts = {name: answer["text"] for name, answer in zip(SETTINGS, plain.settings, strict=True)}
    greedy = texts["log-probabilities"]
    for name in ("logit bias", "json schema", "regex"):
        assert texts[name][:80] != greedy[:80], name


@pytest.mark.parametrize("name", ["log-probabilities", "log-probabilities of the prompt"])
def test_log_probabilities_are_those_of_plain_decoding(
    name: str, answers: dict[str, Body], plain: Plain
) -> None:
    truth = plain.settings[list(SETTINGS).index(name)]["meta_info"]
    got = answers[name]["meta_info"]
    kinds = [kind for kind in truth if kind.endswith("logprobs") and truth[kind]]
    assert "output_token_logprobs" in kinds
    for kind in kinds:
        assert flat(got[kind]) == pytest.approx(flat(truth[kind]), abs=2e-3), kind


def flat(entry: object) -> list[float]:
    """All numbers of nested (logprob, token, text) entries; a missing one counts as 0."""
    if isinstance(entry, list | tuple):
        return [number for part in entry for number in flat(part)]
    return [] if isinstance(entry, str) else [float(entry or 0)]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"return_hidden_states": True}, "hidden"),
        ({"return_sampling_mask": True}, "return_sampling_mask"),
        ({"sampling_params": {"sampling_seed": 2**63}}, "sampling_seed"),
        ({"sampling_params": {"beam_width": 2}}, "Beam search"),
        ({"watermark": {"enabled": True}}, "watermark"),
    ],
)
def test_what_is_not_served_is_refused_with_its_name(server: str, asked: Body, why: str) -> None:
    params = {"temperature": 0, "max_new_tokens": 4, **asked.get("sampling_params", {})}
    answer = httpx.post(f"{server}/generate", json={"text": "Hello", **asked, "sampling_params": params}, timeout=60)
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert why in answer.text


def test_parallel_sampling_gives_as_many_answers(server: str, short_bodies: list[Body]) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 24, "n": 5}
    (answers,) = generate(server, [{**short_bodies[1], "sampling_params": params}], 1)
    assert len({answer["text"] for answer in answers}) > 1
    assert len(answers) == 5


def test_eight_streaming_chats_at_once(server: str) -> None:
    async def chat(client: AsyncOpenAI, question: str) -> tuple[str, str]:
        messages = [{"role": "user", "content": question}]
        options = {"model": "smollm2-135m", "messages": messages, "temperature": 0, "max_tokens": 48}
        whole = await client.chat.completions.create(**options)
        stream = await client.chat.completions.create(**options, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert len(parts) > 4
        return whole.choices[0].message.content, "".join(parts)

    async def run() -> list[tuple[str, str]]:
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
            return await asyncio.gather(*(chat(client, question) for question in gsm8k(8)))

    pairs = asyncio.run(run())
    assert all(whole == streamed and len(whole) > 40 for whole, streamed in pairs)


def test_metrics_count_what_was_accepted(server: str, short_bodies: list[Body]) -> None:
    before = metrics(server)
    (answer,) = generate(
        server, [{**short_bodies[2], "sampling_params": {"temperature": 0, "max_new_tokens": 64}}], 1
    )
    meta, after = answer["meta_info"], metrics(server)
    assert meta["spec_accept_length"] == pytest.approx(meta["completion_tokens"] / meta["spec_verify_ct"])
    drafts = {name: after[name] - before.get(name, 0) for name in after if "accepted_drafts_total" in name}
    assert sum(drafts.values()) == meta["spec_num_correct_drafts"]
    by_depth = [value for _, value in sorted(drafts.items(), key=lambda item: depth(item[0]))]
    assert by_depth == sorted(by_depth, reverse=True)
    steps = next(name for name in after if name.startswith("sglang:dflash_steps_total"))
    assert after[steps] - before.get(steps, 0) == meta["spec_verify_ct"]
    assert {'part="draft"', 'part="verify"', 'part="other"'} == {
        re.search(r'part="\w+"', name)[0] for name in after if "step_seconds_total" in name
    }
    assert next(value for name, value in after.items() if "dflash_tree_nodes" in name) == 31
    taken = {name: value - before.get(name, 0) for name, value in after.items() if "dflash_shape_steps_total" in name}
    assert sum(taken.values()) == meta["spec_verify_ct"]


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yml"])
def test_dashboard_and_alerts_name_metrics_that_are_there(name: str, server: str, short_bodies: list[Body]) -> None:
    generate(server, [{**short_bodies[2], "sampling_params": {"temperature": 0, "max_new_tokens": 8}}], 1)
    file = GRAFANA / name
    named = set(re.findall(r"sglang:\w+", str(yaml.safe_load(file.read_text()))))  # JSON is YAML too
    assert len(named) > 4
    assert named <= {key.split("{")[0] for key in metrics(server)}


def test_what_overlap_runs_beyond_an_end_counts_nowhere(server: str, short_bodies: list[Body]) -> None:
    """Short answers at once: hardly a step is not the last of one of them."""
    before = metrics(server)
    bodies = [
        {**body, "sampling_params": {"temperature": 0, "max_new_tokens": 1 + i % 7}}
        for i, body in enumerate(short_bodies)
    ]
    metas = [answer["meta_info"] for answer in generate(server, bodies, 16)]
    after = metrics(server)

    def counted(name: str) -> float:
        return sum(value - before.get(key, 0) for key, value in after.items() if key.startswith(f"sglang:{name}_total"))

    emitted, steps = sum(m["completion_tokens"] for m in metas), sum(m.get("spec_verify_ct", 0) for m in metas)
    drafts = sum(m.get("spec_num_correct_drafts", 0) for m in metas)  # of none where the prefill was all
    assert emitted == sum(1 + i % 7 for i in range(len(bodies)))
    assert emitted == len(metas) + steps + drafts, "of each the prefill's token, and of each step one and its drafts"
    assert (counted("generation_tokens"), counted("dflash_steps")) == (emitted, steps)
    assert counted("dflash_accepted_drafts") == drafts


def depth(name: str) -> int:
    return int(re.search(r'depth="(\d+)"', name)[1])


def save_changed(target: Path, folder: Path, **changes: torch.Tensor) -> Path:
    """A copy of the target with two layers weakened, and some tensors put in place of others."""
    shutil.copytree(target, folder, copy_function=shutil.copyfile)
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    for name in ("model.layers.12.mlp.down_proj.weight", "model.layers.20.self_attn.o_proj.weight"):
        state[name] = state[name] / 2
    file.unlink()
    save_file({**state, **changes}, file, metadata={"format": "pt"})
    return folder


def by_transformers(path: Path, body: Body) -> list[int]:
    model, ids = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), torch.tensor([body["input_ids"]])
    tokens = body["sampling_params"]["max_new_tokens"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return out[0, ids.shape[1] :].tolist()


def test_weights_are_updated_whole_or_not_at_all(
    server: str, pair: embedded.Pair, short_bodies: list[Body], plain: Plain, tmp_path: Path
) -> None:
    """The last test here: it leaves the server with the weights it came with, but changes them on the way."""
    bodies = [{**b, "sampling_params": {"temperature": 0, "max_new_tokens": 24}} for b in short_bodies[:2]]
    old = [answer["output_ids"][:24] for answer in plain.short[:2]]
    changed = save_changed(pair.target, tmp_path / "changed")
    new = [by_transformers(changed, body) for body in bodies]
    assert new != old

    def post(path: str, **body: object) -> httpx.Response:
        return httpx.post(f"{server}/{path}", json=body, timeout=120)

    def update(path: Path) -> httpx.Response:
        return post("update_weights_from_disk", model_path=str(path))

    def drafts() -> str:
        return post("weights_checker", action="checksum", selector="draft").text

    def answered() -> list[list[int]]:
        return [answer["output_ids"] for answer in generate(server, bodies, 2)]

    before = drafts()
    assert update(changed).is_success
    assert answered() == new
    misshaped = save_changed(pair.target, tmp_path / "misshaped", **{"model.norm.weight": torch.ones(7)})
    foreign = save_changed(pair.target, tmp_path / "foreign", **{"vision.weight": torch.ones(7)})
    for bad, why in (
        (misshaped, "model.norm.weight has shape [7]"),
        (foreign, "no tensor vision.weight"),
        (tmp_path / "none", "no directory"),
        (pair.draft, "no tensor"),
    ):
        refused = update(bad)
        assert refused.status_code == httpx.codes.BAD_REQUEST
        assert why in refused.json()["message"]
    assert answered() == new
    assert update(pair.target).is_success
    assert drafts() == before
    assert post("release_memory_occupation").is_success
    assert post("resume_memory_occupation").is_success
    assert answered() == old
