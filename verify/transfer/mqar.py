"""Multi-query associative recall: a made-up task whose answers stand in the sequence itself.

After Arora et al. 2023 (Zoology, arXiv:2312.04927): key–value pairs first, then keys in random order, each to be
followed by its value. Only the answers count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

IGNORED = -100  # what cross_entropy skips


def batches(size: int, length: int, seed: int, *, vocabulary: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets, int64 [size, length] each, for ever. A quarter of the length are pairs; half are queries.

    Keys come from the lower half of the vocabulary, without repetition; values from the upper one.
    """
    pairs = min(length // 4, vocabulary // 2)
    generator = torch.Generator().manual_seed(seed)
    half = vocabulary // 2
    while True:
        keys = torch.rand(size, half, generator=generator).argsort(-1)[:, :pairs]
        values = torch.randint(half, vocabulary, (size, pairs), generator=generator)
        order = torch.rand(size, pairs, generator=generator).argsort(-1)
        shown = torch.stack([keys, values], -1).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
        tokens = torch.cat([shown, asked], 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, 2 * pairs :: 2] = values.gather(1, order)
        rest = length - tokens.shape[1]
        yield (
            torch.nn.functional.pad(tokens, (rest, 0), value=vocabulary - 1),
            torch.nn.functional.pad(targets, (rest, 0), value=IGNORED),
        )
