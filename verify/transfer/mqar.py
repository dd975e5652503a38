"""Multi-query associative recall: a made-up task whose answers stand in the sequence itself.

After Arora et al. 2023 (Zoology, arXiv:2312.04927): key–value pairs first, then keys in random order, each to be
followed by its value. Only the answers count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # what cross_entropy skips

TASKS: Mapping[str, Mapping[str, Any]] = {"mqar": {}, "mqar-mixed": {"vocabulary": 32, "mixed": True}}
"""By the name that a sweep gives for its data. Where all sequences are long the loss stays at that of guessing for a
time that chance decides, and then falls at once; mixed ones are learned one after the other, shortest first."""


def batches(
    size: int, length: int, seed: int, *, vocabulary: int = 256, mixed: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, int64 [size, length] each, for ever. A quarter of the length are pairs; half are queries.

    Keys come from the lower half of the vocabulary, without repetition; values from the upper one. Mixed sequences have
    any number of pairs from one to that many, and are padded on the left.
    """
    pairs = min(length // 4, vocabulary // 2)
    generator = torch.Generator().manual_seed(seed)
    half = vocabulary // 2
    while True:
        keys = torch.rand(size, half, generator=generator).argsort(-1)[:, :pairs]
        values = torch.randint(half, vocabulary, (size, pairs), generator=generator)
        place = torch.rand(size, pairs, generator=generator)
        kept = torch.ones(size, pairs, dtype=torch.bool)
        if mixed:
            kept = torch.arange(pairs) < torch.randint(1, pairs + 1, (size, 1), generator=generator)
        order = place.masked_fill(~kept, 1.0).argsort(-1)  # those kept are asked first
        answers = values.gather(1, order)
        shown = torch.stack([keys, values], -1).flatten(1)
        asked = torch.stack([keys.gather(1, order), answers], -1).flatten(1)
        tokens = torch.cat([shown, asked], 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, 2 * pairs :: 2] = answers
        there = torch.cat([kept, kept], 1).repeat_interleave(2, 1)
        tokens, targets = tokens.masked_fill(~there, vocabulary - 1), targets.masked_fill(~there, IGNORED)
        right = there.long().argsort(dim=-1, stable=True)
        rest = length - tokens.shape[1]
        yield (
            torch.nn.functional.pad(tokens.gather(1, right), (rest, 0), value=vocabulary - 1),
            torch.nn.functional.pad(targets.gather(1, right), (rest, 0), value=IGNORED),
        )
