"""Tokens a step with a JSON schema, and without: the same prompts asked of one server both ways, alone and at once.

    python scripts/schema_lengths.py docs/results/schema.json
    python scripts/schema_lengths.py out.json --model-path Qwen/Qwen3-8B --speculative-draft-model-path ...

Greedy answers to prompts that ask for JSON; tokens a second are whole rounds'.
What is given behind the file's name goes to the server; without any, the embedded pair's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

TEXT = {"type": "string"}
TOKENS = 120


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


# By name: a schema, how its prompts begin, and what they end with.
SCHEMAS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "person": (
        _object(first_name=TEXT, last_name=TEXT, age={"type": "integer"}, occupation=TEXT, city=TEXT),
        "Give a JSON object with first_name, last_name, age, occupation and city of the person: ",
        [
            "Maria Lopez, 34, teaches physics in Madrid.",
            "In Oslo lives the carpenter Erik Hansen, 51 years old.",
            "Aisha Khan is a 28 year old nurse from Leeds.",
            "John Smith, a retired pilot of 72, lives in Denver.",
            "The painter Yuki Tanaka turned 40 in Kyoto last week.",
        ],
    ),
    "review": (
        _object(
            sentiment={"enum": ["positive", "negative", "neutral"]},
            confidence={"enum": ["low", "medium", "high"]},
            language={"enum": ["english", "french", "german", "spanish"]},
            summary=TEXT,
        ),
        "Classify the review as a JSON object with sentiment, confidence, language and summary: ",
        [
            "The hotel was clean and the staff were kind, we will come again.",
            "It broke after two days and nobody answered my letters.",
            "Works as described. Nothing more to say.",
            "A wonderful film, I laughed and cried.",
            "The soup was cold, but the dessert was very good.",
        ],
    ),
    "answer": (
        _object(steps={"type": "array", "items": TEXT, "maxItems": 4}, answer={"type": "integer"}, unit=TEXT),
        "Solve the problem; answer as a JSON object with a list of steps, the answer and its unit: ",
        [
            "Tom has 3 apples and buys 5 more. How many has he?",
            "A train drives 60 miles an hour for 3 hours. How far does it come?",
            "A book has 240 pages. Ann reads 30 a day. How many days does she need?",
            "A pen costs 2 dollars and a pad 5. What do 3 pens and 2 pads cost?",
            "A tank of 100 litres loses 4 litres an hour. What is left after 6 hours?",
        ],
    ),
    "order": (
        _object(
            order_id={"type": "integer"},
            customer=_object(name=TEXT, email=TEXT),
            items={
                "type": "array",
                "items": _object(product=TEXT, quantity={"type": "integer"}, unit_price={"type": "number"}),
                "minItems": 1,
                "maxItems": 2,
            },
            currency={"enum": ["USD", "EUR", "GBP"]},
            status={"enum": ["open", "paid", "shipped"]},
        ),
        "Turn the order into a JSON object with order_id, customer, items, currency and status: ",
        [
            "Order 117: Ann Lee (ann@lee.com) bought 2 chairs for 40 dollars each. Paid.",
            "Order 92 of Bob Ray, bob@ray.org: one lamp, 25 euros, not paid yet.",
            "No. 305, Carla Diaz, carla@diaz.es, 3 mugs at 8 euros, shipped on Monday.",
            "Dan Wu, dan@wu.net, order 12: a desk for 210 pounds. It is on its way.",
            "Order 77: Eva Roth, eva@roth.de, 5 pens at 2 euros and a pad at 4. Paid.",
        ],
    ),
}


def bodies(name: str, with_schema: bool, count: int) -> list[dict[str, Any]]:
    schema, begin, ends = SCHEMAS[name]
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": TOKENS}
    if with_schema:
        params["json_schema"] = json.dumps(schema)
    return [{"messages": [{"role": "user", "content": begin + end}], "sampling_params": params} for end in ends[:count]]


def asked(url: str, requests: list[dict[str, Any]], at_once: int) -> tuple[list[dict[str, Any]], float]:
    """The answers in their order, and the seconds of all."""

    async def run() -> list[dict[str, Any]]:
        turn = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with turn:
                    response = await client.post("/generate", json=body)
                response.raise_for_status()
                answer: dict[str, Any] = response.json()
                return answer

            return await asyncio.gather(*map(one, requests))

    begun = time.perf_counter()
    return asyncio.run(run()), time.perf_counter() - begun


def row(answers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    metas = [answer["meta_info"] for answer in answers]
    tokens, steps = (sum(m[of] for m in metas) for of in ("completion_tokens", "spec_verify_ct"))
    each = round((tokens - len(metas)) / steps, 2)  # of each answer the prefill gives one
    return {"tokens": tokens, "steps": steps, "tokens_a_step": each, "tok_s": round(tokens / seconds, 1)}


def main() -> None:
    from rich.console import Console
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    from sglang_dflash import embedded
    from sglang_dflash.cli.bench import device_name
    from sglang_dflash.cli.load import chat_ids
    from sglang_dflash.cli.server import serving

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=5, help="of each schema")
    parser.add_argument("--answers", type=Path, help="where the answers go")
    args, more = parser.parse_known_args()
    target = str(embedded.ensure().target)
    if not more:
        more = ["--model-path", "smollm2-135m", "--speculative-num-draft-tokens", "16", "--speculative-num-steps", "10"]
    else:
        target = more[more.index("--model-path") + 1]
    tokenizer = get_tokenizer(target)

    def asks(name: str, with_schema: bool) -> list[dict[str, Any]]:
        return [
            {"input_ids": chat_ids(tokenizer, b.pop("messages")[0]["content"]), **b}
            for b in bodies(name, with_schema, args.prompts)
        ]

    rows: list[dict[str, Any]] = []
    answers: dict[str, Any] = {}
    serves = ["--log-level", "warning", "--speculative-algorithm", "DFLASH", *more]
    with serving("server", serves, Console(stderr=True, quiet=True)) as url:
        warm = [body for name in SCHEMAS for with_schema in (False, True) for body in asks(name, with_schema)]
        asked(url, warm, args.at_once)  # schemas compiled, costs learned
        for with_schema in (False, True):
            every, all_seconds = [], 0.0
            for name in SCHEMAS:
                got, seconds = asked(url, asks(name, with_schema), 1)
                every, all_seconds = every + got, all_seconds + seconds
                answers[f"{name} {with_schema}"] = [{"ids": a["output_ids"], "text": a["text"]} for a in got]
                rows.append({"schema": with_schema, "prompts": name, "at_once": 1, **row(got, seconds)})
                print(rows[-1], flush=True)
            rows.append({"schema": with_schema, "prompts": "all", "at_once": 1, **row(every, all_seconds)})
            print(rows[-1], flush=True)
            got, seconds = asked(url, [b for name in SCHEMAS for b in asks(name, with_schema)], args.at_once)
            rows.append({"schema": with_schema, "prompts": "all", "at_once": args.at_once, **row(got, seconds)})
            print(rows[-1], flush=True)
    if args.answers:
        args.answers.write_text(json.dumps(answers))
    versions = {name: version(name) for name in ("sglang", "torch", "xgrammar")}
    facts = {"device": device_name(), "versions": versions, "server": " ".join(more)}
    args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
