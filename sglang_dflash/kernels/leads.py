"""Leads in a lattice: tokens that something else than the draft knows may come, each behind the one before.

Each lead stands in the place of an unlikely candidate, at every depth. A first lead is entered as likely as the draft
finds its token; behind a lead that has more, these are all but certain. So a stretch that is known is drafted whole,
wherever the draft thinks that it begins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SURE, UNSURE = math.log(0.95), math.log(0.05)  # that one of a lead's next ones comes, and that none does
LEAST = -1e4  # log-probability of a candidate that a tree may hold


class Leads(NamedTuple):
    """A trie of tokens a request, M places each.

    tokens [bs, M] int64, -1: none; before [bs, M] int64: the place of the lead before, -1: of a first one; sure [bs]
    int64: 1 where at the root one of the first leads comes, whatever the draft thinks, else 0. M < K.
    """

    tokens: Tensor
    before: Tensor
    sure: Tensor


def place_leads(unary: Tensor, tokens: Tensor, leads: Leads) -> tuple[Tensor, Tensor]:
    """Candidates, the likeliest first, with leads in the last places; unary float32, tokens int64 [bs, d, K].

    A lead's own score is that of its token where the draft has it, else that of the last candidate: at most too high.
    """
    _, d, k = tokens.shape
    m = leads.tokens.shape[1]
    mine = leads.tokens.flip(1)[:, None].expand(-1, d, -1)
    same = tokens[..., None] == mine[:, :, None]  # [bs, d, K, M]
    scores = torch.where(same, unary[..., None], unary[..., -1:, None]).amax(2)
    there = mine >= 0
    last = slice(k - m, k)
    tokens, unary = tokens.clone(), unary.clone()
    tokens[..., last] = torch.where(there, mine, tokens[..., last])
    unary[..., last] = torch.where(there, scores, unary[..., last])
    return unary, tokens


def follow_leads(logp: Tensor, tokens: Tensor, leads: Leads) -> Tensor:
    """A lattice's logp [bs, d, Kp, K] float32, of the tokens [bs, d, K] that `place_leads` gave, with leads followed.

    Returns [bs, d, K, K]: a lead comes only behind the lead before it, a first one behind any of the draft's own
    candidates; and no token comes twice behind the same one, as children of a tree's node have distinct tokens. At
    least K - M candidates have a finite logp behind each: where all their paths fill a tree, nothing else is in it.
    """
    _, d, k = tokens.shape
    m = leads.tokens.shape[1]
    mine, before = leads.tokens.flip(1), m - 1 - leads.before.flip(1)  # now by place among the last candidates
    there, first = mine >= 0, leads.before.flip(1) < 0
    lead = torch.nn.functional.pad(there, (k - m, 0))  # [bs, K]
    places = torch.arange(k, device=tokens.device) - (k - m)
    behind_lead = (before[:, None] == places[:, None]) & there[:, None] & ~first[:, None] & lead[..., None]
    enters = behind_lead | (first & there)[:, None] & ~lead[..., None]  # [bs, p, M]: lead j may follow candidate p
    enters = enters[:, None].repeat(1, d, 1, 1)
    enters[:, 0] = (first & there)[:, None]
    own = (tokens[..., :, None] == mine[:, None, None]) & ~lead[:, None, :, None]  # [bs, d, c, M]
    twice = (enters.float() @ own.float().transpose(-1, -2)) > 0  # [bs, d, p, c]
    entered = torch.nn.functional.pad(enters, (k - m, 0))
    never = twice | (lead[:, None, None] & ~entered)
    logp = logp.expand(-1, -1, k, -1).clamp(min=LEAST).masked_fill(never, -torch.inf)
    known = behind_lead.any(-1)[:, None].repeat(1, d, 1)  # [bs, d, p]: what comes is known
    known[:, 0] = leads.sure[:, None]
    among = logp.masked_fill(~entered, -torch.inf)
    chosen = among.log_softmax(-1) + SURE
    return torch.where(known[..., None], torch.where(entered, chosen, logp + UNSURE), logp)
