"""Orders for text where each token is needed to tell the next: a step reveals places far apart.

    python train.py --orders spread --size small --data openai/gsm8k --max-len 256 \\
        --canvas-len 96 --middle 0

The order is a timetable, the same for all texts. The places of the canvas are taken in the order
0, 1/2, 1/4, 3/4, 1/8, ... of its length and cut into T equal parts, one for each step. A search
then lets places change steps where some training problems gain by it. Posterior and policy are
tables that say what the timetable says, so KL is next to nothing and all paths of a text are alike;
stage 2 trains the denoiser.
"""

import torch
import torch.nn as nn
from tqdm import tqdm

import mdmvi

SURE = 10.0  # the logit of what the timetable says


def equal_parts(length, budget):
    """The step of each place, int64 [length], in `budget` parts of (nearly) equal size.

    The rank of a place is its bits in reverse; places beyond a power of two leave gaps.
    """
    place, bits = torch.arange(length), range((length - 1).bit_length())
    reverse = ((place >> b & 1) << (len(bits) - 1 - b) for b in bits)
    rank = sum(reverse, torch.zeros_like(place)).argsort().argsort()
    return rank * min(budget, length) // length  # no part is empty


def canvas_place(canvas):
    """Which place of its canvas each position is, counted from 0 and 0 before it: int64 [B, N]."""
    return (canvas.cumsum(1) - 1).clamp(min=0)


class SpreadPosterior(nn.Module):
    """log alpha = -APART * timetable, [B, N]: one part of the timetable in a step, if tau <= 1."""

    APART = 10.0

    def __init__(self, config, budget):
        super().__init__()
        self.register_buffer("timetable", equal_parts(config.canvas_len or config.max_len, budget))

    def forward(self, tokens, canvas):
        return -self.APART * self.timetable[canvas_place(canvas)]


class SpreadPolicy(nn.Module):
    """pi is (nearly) 1 where a timetable has its step and (nearly) 0 elsewhere.

    pi_logits come from a table by number of masked places and rank among them. That tells the
    place where a canvas has as many places as the timetable, and only there.
    """

    def __init__(self, config, timetable):
        super().__init__()
        self.register_buffer("logit", torch.zeros(config.max_len + 1, config.max_len + 1))
        self.follow(timetable)

    def follow(self, timetable):
        """timetable int64 [L]: the step of each place.

        Within a step it is not known which places are left: they are taken as evenly spread over
        those that were left when the step began.
        """
        for s in range(int(timetable.max()) + 1):
            due = timetable[timetable >= s] == s
            for n in range(len(due) - int(due.sum()) + 1, len(due) + 1):
                now = due[torch.arange(n, device=due.device) * len(due) // n]
                self.logit[n, 1 : n + 1] = torch.where(now, SURE, -SURE)

    def forward(self, hidden, masked):
        rank = masked.cumsum(1)
        return self.logit[rank[:, -1:], rank]


@torch.no_grad()
def search_timetable(denoiser, tokens, canvas, timetable, passes, generator=None):
    """A timetable of at least two steps in which some given solutions are more probable, int64 [L].

    Two places of neighbouring steps swap, and stay so where the mean log p_theta of the solutions
    rises. That changes what is masked at the later step alone. So of `passes` denoiser passes on
    each solution, one for each step comes first, and each of the others is a try. Raises ValueError
    where a canvas has not L places.
    """
    if (canvas.sum(1) != len(timetable)).any():
        raise ValueError(f"each canvas must have {len(timetable)} places, as the timetable has")
    timetable, place = timetable.clone(), canvas_place(canvas)

    def log_prob(s):
        """Mean log p_theta of each place before step s, nats [L]; 0 where it is revealed."""
        total = torch.zeros(len(timetable), device=tokens.device)
        for x, on, at in zip(tokens.split(64), canvas.split(64), place.split(64)):
            log_p = mdmvi.token_log_prob(denoiser, x.long(), on & (timetable[at] >= s))
            total += log_p[on].view(len(x), -1).sum(0)
        return total / len(tokens)

    def one_of(step):
        places = (timetable == step).nonzero().squeeze(1)
        return places[torch.randint(len(places), (), device=places.device, generator=generator)]

    log_p = torch.stack([log_prob(s) for s in range(int(timetable.max()) + 1)])
    value = log_p.gather(0, timetable[None]).sum()
    with tqdm(range(passes - len(log_p)), "timetable", unit="try", mininterval=1.0) as bar:
        for _ in bar:
            s = int(torch.randint(len(log_p) - 1, (), device=place.device, generator=generator))
            pair, before = torch.stack((one_of(s), one_of(s + 1))), log_p[s + 1].clone()
            timetable[pair] = timetable[pair.flip(0)]
            log_p[s + 1] = log_prob(s + 1)
            swapped = log_p.gather(0, timetable[None]).sum()
            if swapped > value:
                value = swapped
                bar.set_postfix_str(f"loss {-value / len(timetable):.4f}", refresh=False)
            else:
                timetable[pair] = timetable[pair.flip(0)]
                log_p[s + 1] = before
    return timetable
