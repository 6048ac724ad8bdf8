"""Sampling with noise that is known beforehand, and the noise itself.

A sample is the token of the highest logit / temperature + noise, the noise being Gumbel's, made by hash of seed,
position and token: that is an exact sample, the same wherever and whenever it is drawn. The hash is the one of SGLang's
seeded sampler (MurmurHash3 of the seed's two words, position, token).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

ALL = 1 << 32
ROWS = 4  # sampled together
BLOCK = 16_384  # tokens at once: few enough that torch wakes no other thread and a core's own cache holds them
ONE, TWO, ADD, LAST = 0xCC9E2D51, 0x1B873593, 0xE6546B64, (0x85EBCA6B, 0xC2B2AE35)
HASHED_BYTES = 16


def sample(
    logits: Tensor,
    positions: Tensor,
    seeds: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    filtered: bool,
) -> Tensor:
    """One token of each row, int64 [rows]: of those that the filters keep, the one of the highest
    logit / temperature + noise; where top-k is 1 that of the highest logit. Ties: the lower token.

    logits [rows, V] in any float dtype, NaN as -inf; positions [rows] int64: of the token that a row stands at. By
    request, the rows of one being neighbours, rows = bs * w: seeds [bs] int64, temperatures [bs] float32 > 0, top_ks
    [bs] int32, top_ps and min_ps [bs] float32. filtered: whether any request has a filter; without one they are read
    for top-k 1 alone.

    A token is kept where fewer than k tokens are more probable, these have less than p of the probability together, and
    the most probable one has no more than 1 / min_p times its own. All three look at the whole distribution, none at
    what another has left over, and tokens that are equally probable are kept or dropped together.

    This one reads values on the host, and serves a CPU alone.
    """
    rows, vocab = logits.shape
    per_row = [x.repeat_interleave(rows // len(seeds), 0) for x in (seeds, temperatures, top_ks, top_ps, min_ps)]
    out = positions.new_empty(rows)
    for at in range(0, rows, ROWS):
        few = slice(at, at + ROWS)
        seed, temperature, top_k, top_p, min_p = (x[few] for x in per_row)
        scaled = torch.nan_to_num(logits[few].float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        greedy = top_k == 1
        scaled /= torch.where(greedy, 1.0, temperature)[:, None]
        if greedy.all():
            out[few] = scaled.argmax(-1)
            continue
        score = gumbel(seed, positions[few], vocab)
        score *= ~greedy[:, None]
        score += scaled
        out[few] = _best_kept(scaled, score, top_k, top_p, min_p) if filtered else score.argmax(-1)
    return out


def _best_kept(scaled: Tensor, score: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Of the tokens that the filters keep, that of the highest score, [rows].

    The best of all is tried first: where it is not kept, no less probable one is, and the next best is tried.
    """
    best = score.argmax(-1, keepdim=True)
    lse, high = scaled.logsumexp(-1, keepdim=True), scaled.amax(-1, keepdim=True)
    floor = high + min_p.log()[:, None]
    free = (top_k == 1) | ((top_k >= scaled.shape[1]) & (top_p >= 1) & (min_p <= 0))
    left = (~free).nonzero()[:, 0]
    while len(left):
        of_best = scaled[left].gather(1, best[left])
        more = scaled[left] > of_best
        count, mass = more.sum(-1), ((scaled[left] - lse[left]).exp_() * more).sum(-1)
        kept = (count < top_k[left]) & ((mass < top_p[left]) | (top_p[left] >= 1))
        kept &= (of_best >= floor[left])[:, 0]
        kept |= count == 0
        left, more = left[~kept], more[~kept]
        best[left] = score[left].masked_fill_(~more, -torch.inf).argmax(-1, keepdim=True)
    return best[:, 0]


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Gumbel noise float32 [rows, vocab] of each row's seed and position, both int64 [rows]."""
    out = torch.empty(len(seeds), vocab, device=seeds.device)
    tokens = _scrambled_tokens(vocab, seeds.device)
    for row, state in zip(out, _states(seeds, positions), strict=True):
        for noise, some in zip(row.split(BLOCK), tokens.split(BLOCK), strict=True):
            _fill(noise, some ^ state)
    return out


def gumbel_of(seeds: Tensor, positions: Tensor, tokens: Tensor, vocab: int) -> Tensor:
    """The same of some tokens of each row: tokens int64 [rows, M]; gives float32 [rows, M]."""
    out = torch.empty(tokens.shape, device=tokens.device)
    states = torch.tensor(_states(seeds, positions), dtype=torch.int32, device=tokens.device)
    _fill(out, _scrambled_tokens(vocab, tokens.device)[tokens] ^ states[:, None])
    return out


def _states(seeds: Tensor, positions: Tensor) -> list[int]:
    """What all tokens of a row share of the hash, as signed words."""
    states = []
    for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True):
        state = 0
        for word in (seed % ALL, (seed >> 32) % ALL, position % ALL):
            state = _stirred(state ^ _scrambled(word))
        states.append(_signed(state))
    return states


def _fill(noise: Tensor, h: Tensor) -> None:
    """Noise of a block of tokens; h, overwritten: their hashes before the last stirring, an unsigned word's bits."""
    low = h >> 19
    low &= (1 << 13) - 1
    h <<= 13
    h |= low
    h *= 5
    h += _signed(ADD)
    h ^= HASHED_BYTES
    _fold(h, 16)
    h *= _signed(LAST[0])
    _fold(h, 13)
    h *= _signed(LAST[1])
    _fold(h, 16)
    # 1 - u is exact in 32 bits, where u itself would lose the rare high values to rounding.
    noise.copy_(h.bitwise_not_())
    noise += (h < 0) * float(ALL)
    noise *= 1 / (ALL - 1)
    noise.clamp_(min=1 / ALL, max=1 - 2**-24)
    noise.neg_().log1p_().neg_().log_().neg_()


def _fold(h: Tensor, by: int) -> None:
    """h ^ h >> by of unsigned words, in place."""
    high = h >> by
    high &= (1 << 32 - by) - 1
    h ^= high


@functools.lru_cache(maxsize=4)
def _scrambled_tokens(vocab: int, device: torch.device) -> Tensor:
    words = [_signed(_scrambled(token)) for token in range(vocab)]
    return torch.tensor(words, dtype=torch.int32, device=device)


def _scrambled(word: int) -> int:
    return _rotated(word * ONE % ALL, 15) * TWO % ALL


def _stirred(state: int) -> int:
    return (_rotated(state, 13) * 5 + ADD) % ALL


def _rotated(word: int, by: int) -> int:
    return (word << by | word >> 32 - by) % ALL


def _signed(word: int) -> int:
    """The same 32 bits, as a signed word."""
    return word - ALL if word >= ALL // 2 else word
