"""Prompts of 0.1k to 7k tokens and what a target answers them greedily, from transformers: for accept_length.py.

usage: long_answers.py TARGET ANSWERS.json [--part 1]

Three kinds: a list of GSM8K problems and one of them to solve, a document (Python's own manual, as pydoc has it) and a
question about it, conversations on the target's own answers. Part 0 is there to choose by, part 1 set aside: it shares
no problem, document or question of a conversation with part 0. Writes a list of {"group": kind and length, "prompt":
token ids, "answer": token ids}; the groups of conversations are their turns, of which all ask the same questions.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTHS = {100: 2, 1000: 2, 2000: 2, 3500: 2, 7000: 1}  # about how many tokens: prompts of each kind
TURNS = 1, 2, 4, 8, 10  # of a conversation, that are measured
TALKS = 4
ASKED = (
    "Summarise the text above in a few sentences.",
    "What is the text above about? Explain it to a beginner.",
    "List the most important points of the text above.",
)


class Asked:
    """The target, and the prompts of one part."""

    def __init__(self, target: Path, part: int, max_tokens: int) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(target)
        self.model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.part, self.max_tokens = part, max_tokens
        lines = resources.files("sglang_dflash").joinpath("data/gsm8k.jsonl").read_text().splitlines()
        self.problems = [json.loads(line)["question"] for line in lines][part::2]
        topics = sorted(pydoc_data.topics.topics.items())[part::2]
        self.paragraphs = [p for _, text in topics for p in text.split("\n\n")]

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.inference_mode()
    def answer(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_tokens, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()

    def parts_of(self, texts: list[str], first: int, tokens: int) -> list[str]:
        """Texts from the first on, around the list's end, while they are no more than so many tokens; one at least."""
        taken: list[str] = []
        while tokens > 0:
            text = texts[(first + len(taken)) % len(texts)]
            tokens -= len(self.tokenizer.encode(text, add_special_tokens=False)) + 3
            if tokens > 0 or not taken:
                taken.append(text)
        return taken

    def listed(self, number: int, tokens: int) -> list[int]:
        problems = self.parts_of(self.problems, number * 80, tokens - 60)
        if len(problems) == 1:
            return self.ids([{"role": "user", "content": problems[0]}])
        lines = "\n".join(f"{n}. {problem}" for n, problem in enumerate(problems, start=1))
        which = number * 7 % len(problems) + 1
        return self.ids([{"role": "user", "content": f"Here are some problems.\n{lines}\nSolve problem {which}."}])

    def document(self, number: int, tokens: int) -> list[int]:
        text = "\n\n".join(self.parts_of(self.paragraphs, number * 211, tokens - 60))
        return self.ids([{"role": "user", "content": f"{text}\n\n{ASKED[number % len(ASKED)]}"}])

    def singles(self) -> Iterator[tuple[str, list[int]]]:
        number = 0
        for tokens, count in LENGTHS.items():
            for _ in range(count):
                number += 1
                yield f"list {tokens}", self.listed(number, tokens)
                yield f"document {tokens}", self.document(number, tokens)

    def talk(self, number: int) -> Iterator[tuple[str, list[int], list[int]]]:
        """One conversation's measured turns. What is asked there is asked at another turn in every other talk."""
        asked, fillers = self.problems[-len(TURNS) :], self.problems[number * 20 :]
        messages: list[dict[str, str]] = []
        for turn in range(1, max(TURNS) + 1):
            measured = turn in TURNS
            question = asked[(TURNS.index(turn) + number) % len(asked)] if measured else fillers[turn]
            messages.append({"role": "user", "content": question})
            prompt = self.ids(messages)
            answer = self.answer(prompt)
            messages.append({"role": "assistant", "content": self.tokenizer.decode(answer, skip_special_tokens=True)})
            if measured:
                yield f"turn {turn}", prompt, answer


def rows(asked: Asked) -> Iterator[dict[str, Any]]:
    for group, prompt in asked.singles():
        yield {"group": group, "prompt": prompt, "answer": asked.answer(prompt)}
    for number in range(TALKS):
        for group, prompt, answer in asked.talk(number):
            yield {"group": group, "prompt": prompt, "answer": answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--part", type=int, choices=(0, 1), default=0)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    done: list[dict[str, Any]] = []
    for row in rows(Asked(args.target, args.part, args.max_tokens)):
        done.append(row)
        print(row["group"], len(row["prompt"]), len(row["answer"]), flush=True)
        args.answers.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
