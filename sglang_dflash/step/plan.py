"""What the next step drafts: the budget asked, and told what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from sglang_dflash.budget import Budget, Choice, Shape
from sglang_dflash.metrics import Clock, StepLog, StepMetrics
from sglang_dflash.options import Options
from sglang_dflash.platforms import WITH_PROMPTS, windows_beside
from sglang_dflash.step import ranks
from sglang_dflash.step.grammar import Grammars
from sglang_dflash.step.penalties import penalised

_NONE: Mapping[Any, Sized] = {}


@dataclass(frozen=True)
class Step:
    """One step: what was chosen for it, and when its parts ended. penalised: whether one of its requests is. before:
    the step that it followed without a break, as its choice, its start and the host's seconds for its grammars; None
    behind a prefill. prompts: how many it reads.
    """

    choice: Choice
    shape: Shape
    penalised: bool
    clock: Clock
    before: tuple[Choice, Any, float] | None
    prompts: int


class Planner:
    """Plans steps for one server; results come back in the order of the steps."""

    def __init__(self, options: Options, requests: int, on_gpu: bool, metrics: StepMetrics | None) -> None:
        """requests: the numbers by which SGLang tells running ones apart are below this."""
        self._shapes = options.shapes
        self.budget = Budget(options.shapes, requests)
        self._log, self._metrics = StepLog(options) if ranks.is_first() else None, metrics
        self._on_gpu = on_gpu
        self._before: tuple[Choice, Any, float] | None = None
        self._in_flight = 0  # steps planned whose results have not come
        self._results: list[tuple[Step, np.ndarray | None, np.ndarray, list[int]]] = []  # that came, not taken in yet
        self._known: tuple[list[Any], np.ndarray, np.ndarray] = [], *_numbers_and_kinds([])
        # Windows that a pass may have, prompts' among them.
        self._room = [min(shape.most, requests - 1) + windows_beside(shape.verified) for shape in options.shapes]

    def expect(self, verify: dict[int, dict[int, float]], draft: dict[int, dict[int, float]]) -> None:
        """Seconds of verify and draft passes by width, then by requests, measured before serving."""
        for index, shape in enumerate(self._shapes):
            sizes, seconds = np.array(sorted(verify[shape.verified].items())).T
            self._room[index] = int(sizes[-1])
            if shape.nodes:
                seconds = seconds + np.interp(sizes, *np.array(sorted(draft[shape.block].items())).T)
            self.budget.cost.expect(index, sizes, seconds)

    def begin(self, reqs: Sequence[Any]) -> None:
        """New requests come in, of which nothing is known."""
        self.catch_up()  # results of others that had the same numbers
        requests, kinds = _numbers_and_kinds(reqs)
        self.budget.gain.begin(requests, kinds)
        self.budget.cost.begin(requests, np.array([req.grammar is not None for req in reqs], dtype=bool))
        self._known = [], *_numbers_and_kinds([])

    def prefill(self, batch: Any) -> None:
        """A batch was prefilled: what that took is no step's cost."""
        running = {id(req) for req in batch.decoding_reqs or ()}  # in a mixed batch
        self.begin([req for req in batch.reqs if id(req) not in running])
        self._before = None

    def has_room(self, requests: int, lengths: Sequence[int]) -> bool:
        """Whether prompts of these lengths should be read beside so many requests: where a pass can, and that pays."""
        return requests >= WITH_PROMPTS and self.budget.reads_beside(self._fits(requests, lengths))

    def plan(self, batch: Any, prompts: Mapping[Any, Sized] = _NONE) -> Step:
        """The next step of a batch, from now on. prompts: what it is to read of some requests' first: such a step is no
        example of what others cost, and drafts of a first token tell nothing of those to come.
        """
        if batch.reqs != self._known[0]:  # most are those of the step before: then only identities are compared
            self._known = batch.reqs[:], *_numbers_and_kinds(batch.reqs)
        _, requests, kinds = self._known
        some_penalised = any(map(penalised, batch.reqs))
        sort = int(batch.has_grammar) + 2 * some_penalised  # what else the host does: masks, penalties
        drafting, fits = np.array(batch.spec_info.drafting), None
        if prompts:
            drafting &= [req not in prompts for req in batch.reqs]
        if reads := any(lengths := [*map(len, prompts.values())]):
            fits = self._fits(len(batch.reqs), lengths)
            if not any(fits):  # others came from a pass of their own meanwhile: the smallest tree's has no graph then
                fits[min(1, len(fits) - 1)] = True
        choice = self.budget.choose(requests, kinds, drafting, sort, fits)
        if (shape := ranks.first_ranks_number(choice.shape)) != choice.shape:
            choice = replace(choice, shape=shape)
        clock = Clock(self._on_gpu, parts=self._metrics is not None)
        step = Step(choice, self._shapes[shape], some_penalised, clock, self._before, len(prompts))
        self._before = None if reads else (choice, step.clock.start, 0.0)
        self._in_flight += 1
        return step

    def _fits(self, requests: int, lengths: Sequence[int]) -> list[bool]:
        """Which shapes have room for prompts of these lengths beside so many requests."""
        return [
            requests <= shape.most and max(requests + windows(lengths, shape.verified), WITH_PROMPTS) <= room
            for shape, room in zip(self._shapes, self._room, strict=True)
        ]

    def checked(self, grammars: Grammars) -> None:
        """Walks of the step planned last were held to grammars."""
        if self._before is None:
            return
        choice, start, _ = self._before
        self.budget.cost.checks_took(choice.requests[grammars.rows], grammars.seconds)
        self._before = choice, start, grammars.seconds

    def learn(self, step: Step, nodes: Tensor | None, lens: Tensor, reqs: Sequence[Any]) -> None:
        """A step's results have reached the host: nodes [bs, D + 1] walked, None of the smallest shape; lens [bs]
        emitted; reqs: who took it, their outputs still as before.

        They are taken in at once if no other step is in flight. If one is, the GPU waits for the step behind it, and
        these wait until that is launched.
        """
        metrics = self._metrics is not None
        contexts = [len(req.origin_input_ids) + len(req.output_ids) for req in reqs] if metrics else []
        self._results.append((step, nodes if nodes is None else nodes.numpy(), lens.numpy(), contexts))
        self._in_flight -= 1
        if not self._in_flight:
            self.catch_up()

    def catch_up(self) -> None:
        """Take in the results that have come: what waits for the host is launched."""
        for results in self._results:
            self._take_in(*results)
        self._results.clear()

    def _take_in(self, step: Step, nodes: np.ndarray | None, lens: np.ndarray, contexts: list[int]) -> None:
        if step.before is not None:
            choice, start, checks = step.before
            self.budget.took(choice, step.clock.since(start), checks)
        self.budget.learn(step.choice, nodes, lens)
        if self._log is not None:
            self._log.step_done(step.choice, step.clock, lens, step.prompts)
        if self._metrics is not None:
            self._metrics.step_done(step.clock, step.choice.shape, lens, contexts, step.prompts)


def windows(lengths: Sequence[int], width: int) -> int:
    """How many windows of a width read prompts of these lengths."""
    return sum(-(-length // width) for length in lengths)


def _numbers_and_kinds(reqs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """SGLang's numbers of requests, and their kinds: whether each is sampled (1), whether it has a grammar (2)."""
    numbers = np.array([req.kv.req_pool_idx for req in reqs], dtype=np.int64)
    kinds = [int(req.sampling_params.top_k != 1) + 2 * (req.grammar is not None) for req in reqs]
    return numbers, np.array(kinds, dtype=np.int64)
