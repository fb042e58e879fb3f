"""Orders for text where each token is needed to tell the next, such as the equations of GSM8K.

    python train.py --orders spread --search 0 --data openai/gsm8k --max-len 256 --canvas-len 96

The canvas has a timetable. Its places are taken in the order 0, 1/2, 1/4, 3/4, 1/8, ... of its
length and cut into T equal parts, one for each step. The posterior may move a token to another
step. No search is needed: the timetable is a good start, and `mdmvi.PlacePolicy`, which sees
places, can foretell it.
"""

import torch
import torch.nn as nn

import mdmvi


def spread_ranks(length):
    """The rank of each place if they are spread out: its bits in reverse, int64 [length].

    Ranks have gaps where `length` is no power of two.
    """
    place, bits = torch.arange(length), range((length - 1).bit_length())
    return sum(((place >> b & 1) << (len(bits) - 1 - b) for b in bits), torch.zeros_like(place))


def canvas_place(canvas):
    """Which place of its canvas each position is, counted from 0 and 0 before it: int64 [B, N]."""
    return (canvas.cumsum(1) - 1).clamp(min=0)


class SpreadPosterior(mdmvi.OrderPosterior):
    """log alpha = CONTENT * score - APART * timetable, [B, N], for `budget` steps.

    APART is five times tau = 0.1, so that a part of the timetable moves as one; scale it with tau.
    The score starts at 0, and CONTENT keeps it small: a token that falls behind its part becomes
    the best one left, and the next step reveals little else.
    """

    APART, CONTENT = 0.5, 0.1

    def __init__(self, config, budget):
        super().__init__(config)
        nn.init.zeros_(self.score.weight)
        rank = spread_ranks(config.canvas_len or config.max_len).argsort().argsort()
        self.register_buffer("timetable", rank * budget // len(rank))  # the step of each place

    def forward(self, tokens, canvas):
        step = self.timetable[canvas_place(canvas)]
        return self.CONTENT * self.scores(tokens, canvas) - self.APART * step
