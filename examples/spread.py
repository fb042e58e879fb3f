"""Orders for text whose neighbours depend on each other: places far apart go together.

    python train.py --orders spread --search 0 --data openai/gsm8k --max-len 256 --canvas-len 96
    python -m examples.bounds --checkpoint out/plain.pt     # is "spread" ahead of "best runs"?

A run from the left reveals neighbours together, and on real text they seldom are independent. Here
the canvas has a timetable: its places in the order 0, 1/2, 1/4, 3/4, 1/8, ... go in T equal parts.
What x_0 is moves a token to another step where that pays. No search is needed: these orders start
well, and a policy that sees places foretells a timetable.
"""

import torch
import torch.nn as nn

import mdmvi


def spread_ranks(length):
    """When each place comes if they are spread out: its bits in reverse, int64 [length]."""
    place, bits = torch.arange(length), range((length - 1).bit_length())
    return sum((place >> b & 1) << (len(bits) - 1 - b) for b in bits)


class SpreadPosterior(mdmvi.OrderPosterior):
    """log alpha = CONTENT * score - APART * timetable, [B, N], for `budget` steps.

    APART is five times tau = 0.1, so that a part of the timetable moves as one. The scores count
    for little at first: a token that is late by itself makes all later parts wait for it.
    """

    APART, CONTENT = 0.5, 0.1

    def __init__(self, config, budget):
        super().__init__(config)
        nn.init.zeros_(self.score.weight)
        rank = spread_ranks(config.canvas_len or config.max_len).argsort().argsort()
        self.register_buffer("timetable", rank * budget // len(rank))  # of each place, its step

    def forward(self, tokens, canvas):
        place = (canvas.cumsum(1) - 1).clamp(min=0)
        return self.CONTENT * self.scores(tokens, canvas) - self.APART * self.timetable[place]


class SpreadPolicy(mdmvi.UnmaskPolicy):
    """An `UnmaskPolicy` that sees which of the masked places each is, and how many there are.

    From these two numbers a timetable can be told: hidden states know distances only.
    """

    def __init__(self, config):
        super().__init__(config)
        self.block = mdmvi.Block(config)
        self.rank = nn.Embedding(config.max_len + 1, config.n_embd)
        self.count = nn.Embedding(config.max_len + 1, config.n_embd)
        for table in (self.rank, self.count):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, hidden, masked):
        rank = masked.cumsum(1)
        seen = self.rank(rank) + self.count(rank[:, -1:])
        return super().forward(self.block(hidden + masked[:, :, None] * seen), masked)
