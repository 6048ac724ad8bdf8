"""The target's own answers on disk, and as packed batches.

A data set is a directory of `shard-00000.npz` files beside a `manifest.json`. A shard holds documents (conversations or
raw text): `tokens` uint32, all documents in a row; `doc_starts` int64 [docs + 1]; `spans` int64 [answers, 2], the
half-open ranges of `tokens` that the target wrote; `source` int16 [docs], an index into the manifest's `sources`.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """tokens and the (start, end) ranges in them that the target wrote."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    source: int


def write_shard(path: Path, documents: list[Document]) -> None:
    """Write atomically: a shard is there whole or not at all."""
    starts = np.cumsum([0] + [len(d.tokens) for d in documents])
    spans = [(int(s) + a, int(s) + b) for s, d in zip(starts, documents, strict=False) for a, b in d.spans]
    scratch = path.with_suffix(f".{os.getpid()}.partial")
    with scratch.open("wb") as file:
        np.savez_compressed(
            file,
            tokens=np.concatenate([np.asarray(d.tokens, dtype=np.uint32) for d in documents]),
            doc_starts=starts.astype(np.int64),
            spans=np.asarray(spans, dtype=np.int64).reshape(-1, 2),
            source=np.asarray([d.source for d in documents], dtype=np.int16),
        )
    scratch.rename(path)


class Answers:
    """All documents of a data set.

    tokens uint32 [total]; starts int64 [docs + 1]; answer bool [total], the target wrote it; source int16 [docs].
    """

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("shard-*.npz"))
        if not files:
            raise ValueError(f"{path}: no shard-*.npz there: make data first (scripts/make_data.py)")
        self.sources: list[str] = json.loads((path / "manifest.json").read_text())["sources"]
        shards = [dict(np.load(file)) for file in files]
        offsets = np.cumsum([0] + [len(s["tokens"]) for s in shards])
        self.tokens = np.concatenate([s["tokens"] for s in shards])
        starts = [s["doc_starts"][:-1] + o for s, o in zip(shards, offsets, strict=False)]
        self.starts = np.concatenate([*starts, offsets[-1:]])
        self.source = np.concatenate([s["source"] for s in shards])
        edges = np.zeros(len(self.tokens) + 1, dtype=np.int8)
        for shard, offset in zip(shards, offsets, strict=False):
            np.add.at(edges, shard["spans"][:, 0] + offset, 1)
            np.add.at(edges, shard["spans"][:, 1] + offset, -1)
        self.answer = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.starts).max())


@dataclass(frozen=True)
class Batch:
    """Documents packed whole into rows, the rest of a row padding.

    tokens [B, T] int64. starts [B, T] int64: where in the row the document of each token begins (padding is a document
    of its own). answer [B, T] bool: the target wrote this token. document [B, T] int64: which one, -1 for padding.
    """

    tokens: Tensor
    starts: Tensor
    answer: Tensor
    document: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in vars(self).values()))


def pack(answers: Answers, documents: np.ndarray, rows: int, width: int) -> tuple[Batch, int]:
    """The first documents that fit in rows x width, and how many they are: each in the first row that has room for it,
    up to the first one that no row has. Longer ones are cut to width.
    """
    tokens = np.zeros((rows, width), dtype=np.int64)
    starts, which = np.zeros_like(tokens), np.full_like(tokens, -1)
    answer = np.zeros((rows, width), dtype=bool)
    filled, used = [0] * rows, 0
    for document in documents:
        begin, end = answers.starts[document], answers.starts[document + 1]
        size = min(int(end - begin), width)
        row = next((row for row, at in enumerate(filled) if at + size <= width), None)
        if row is None:
            break
        at = filled[row]
        here = slice(at, at + size)
        tokens[row, here], answer[row, here] = (
            answers.tokens[begin : begin + size],
            answers.answer[begin : begin + size],
        )
        starts[row, here], which[row, here] = at, document
        filled[row], used = at + size, used + 1
    for row, at in enumerate(filled):
        starts[row, at:] = at
    return Batch(*(torch.from_numpy(a) for a in (tokens, starts, answer, which))), used


@dataclass
class Cursor:
    """Where training stands in the data: resuming from it gives the batches that would have come."""

    epoch: int = 0
    index: int = 0


def batches(
    answers: Answers, rows: int, width: int, seed: int, cursor: Cursor, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Batch, Cursor]]:
    """Endless shuffled batches of this rank's documents, each with the cursor after it."""
    epoch, index = cursor.epoch, cursor.index
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(answers))[rank::ranks]
        while index < len(order):
            batch, used = pack(answers, order[index : index + rows * width], rows, width)
            index += used
            yield batch, Cursor(epoch, index)
        epoch, index = epoch + 1, 0


def prefetch(source: Iterator, depth: int = 8) -> Iterator:
    """The same items, made ahead by a thread."""
    ready: queue.Queue = queue.Queue(depth)

    def fill() -> None:
        for item in source:
            ready.put(item)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield ready.get()
