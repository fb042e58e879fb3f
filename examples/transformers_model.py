"""A learned order on top of a frozen masked language model of Hugging Face transformers, to copy.

    denoiser = TransformersDenoiser(model, mask_id, eos_id, canvas_len)
    policy, posterior = make_networks(denoiser, max_len)
    learn_order((denoiser, policy, posterior), tokens, canvas, budget=5, steps=1000)
    out = mdmvi.generate(denoiser, tokens, canvas, "learned", budget=5, policy=policy)

It needs mdmvi.py, runs.py and tqdm. tokens are int64 [M, N], canvas bool [M, N]: true where the
answer goes, with EOS behind it. Shorter rows are filled up, with EOS say: that belongs to the
prompt, as the model attends to all of a row, so fill up in the same way when you generate. The
model is BERT-like, or LLaMA-like and trained to fill in masks: its attention is made to go both
ways. examples/transformers_train.py is a program around this file.
"""

import math
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

import mdmvi
from examples import runs  # import runs, where it lies beside this file

BOTH_WAYS = {"is_causal": False, "use_cache": False}  # BERT-like models attend so anyway


class TransformersDenoiser:
    """mdmvi's denoiser around a frozen model of transformers: its base, then the parts of its head.

    canvas_len: the most places a canvas has; on a GPU logits are computed for as many in each row,
    and bounds are nan where there are more (0: any number, logits of whole rows). Raises ValueError
    where mask_id and eos_id are not two tokens of the model, where these parts do not make up the
    model, or where it still looks only backwards.
    """

    def __init__(self, model, mask_id, eos_id, canvas_len=0):
        if mask_id is None or eos_id is None:
            raise ValueError("mask_id or eos_id is None: the tokenizer has no such token, give one")
        size = model.config.vocab_size
        if mask_id == eos_id or not (0 <= mask_id < size and 0 <= eos_id < size):
            ids = f"mask_id {mask_id} and eos_id {eos_id}"
            raise ValueError(f"{ids} are not two of the model's tokens, 0 .. {size - 1}")
        self.model = model.eval().requires_grad_(False)
        self.mask_id, self.eos_id, self.canvas_len = mask_id, eos_id, canvas_len
        self.head = nn.Sequential(*(m for m in model.children() if m is not model.base_model))
        self.check(type(model).__name__)

    @torch.no_grad()
    def __call__(self, tokens, place=None):
        """int64 [B, N] -> last hidden states fp32 [B, N, D], or rows `place` of them, [M, D]."""
        hidden = self.model.base_model(input_ids=tokens, **BOTH_WAYS).last_hidden_state.float()
        return hidden if place is None else hidden.flatten(0, 1)[place]

    @torch.no_grad()
    def logits(self, hidden):
        """fp32 [..., D] -> fp32 [..., V], -inf for MASK."""
        logits = self.head(hidden.to(self.model.dtype)).float()
        logits[..., self.mask_id] = -math.inf
        return logits

    @torch.no_grad()
    def check(self, name):
        tokens = torch.tensor([[0, 0], [0, 1]], device=self.model.device)
        hidden = self(tokens)
        own = self.model(input_ids=tokens, **BOTH_WAYS).logits.float()
        own[..., self.mask_id] = -math.inf
        try:
            same = torch.allclose(self.logits(hidden), own, rtol=1e-3, atol=1e-3)
        except (RuntimeError, TypeError, AttributeError):  # parts that do not follow one another
            same = False
        if not same:
            raise ValueError(f"the head of {name} is not its parts in a row: take another model")
        if torch.equal(hidden[0, 0], hidden[1, 0]):
            raise ValueError(f"{name} looks only backwards: update transformers or take another")


def make_networks(denoiser, max_len):
    """A policy as wide as the model, and a small posterior with an embedding of its own.

    max_len: no row may be longer, in training or later.
    """
    model, ids = denoiser.model, (denoiser.mask_id, denoiser.eos_id)
    shape = (2, 4, 128, 256)  # layers, heads, width, hidden
    config = mdmvi.ModelConfig(model.config.vocab_size, max_len, *shape, *ids)
    width = model.config.hidden_size
    heads = next((n for n in (8, 4, 2) if width % (2 * n) == 0), 1)
    as_wide = replace(config, n_embd=width, n_head=heads, n_hidden=2 * width)
    policy, posterior = runs.RunPolicy(as_wide), runs.RunPosterior(config)
    return policy.to(model.device), posterior.to(model.device)


def learn_order(
    networks,
    tokens,
    canvas,
    budget,
    steps,
    generator=None,
    tau=0.1,
    batch=16,
    paths=2,
    searched=256,
):
    """Train the last two of (denoiser, policy, posterior): on the best runs, then on the bound.

    tokens int64 [M, N], clean; canvas bool [M, N]. The search takes a denoiser pass of each of the
    `searched` problems for each canvas place, a step `batch` (`paths` + 1) passes. Raises
    ValueError on a budget below 2.
    """
    denoiser, policy, posterior = networks
    optimizer = make_optimizer(mdmvi.parameter_groups(None, None, posterior, posterior_lr=3e-3))
    known = (tokens[:searched], canvas[:searched])
    runs.search_cuts(denoiser, posterior, *known, budget, [optimizer], generator)
    # A low rate: the posterior could not read before the search, and would forget what that taught
    optimizer = make_optimizer(mdmvi.parameter_groups(*networks, posterior_lr=3e-5))
    bar = tqdm(range(steps), desc="order", unit="step", mininterval=1.0)
    for step in bar:
        rows = torch.randint(len(tokens), (batch,), device=tokens.device, generator=generator)
        data = (*networks, tokens[rows], canvas[rows], budget, tau, paths, generator)
        loss, _ = mdmvi.importance_order_loss(*data)
        loss.backward()
        mdmvi.update([optimizer], step, steps)
        bar.set_postfix_str(f"loss {float(loss.detach()):.4f}", refresh=False)


def make_optimizer(groups):
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)


def generate_blocks(denoiser, tokens, canvas, block_len, strategy, budget, **options):
    """Fill the canvas block by block from the left, as LLaDA (arXiv 2502.09992) and Fast-dLLM do.

    `mdmvi.generate` is called once for each block_len places, what lies to the right still masked.
    Blocks behind the first EOS cost passes too. budget: steps a block; options: those of
    `generate`. Returns a Generation whose reveal_step and steps go on from block to block. Raises
    ValueError on a block_len below 1, or what `generate` refuses.
    """
    mdmvi.check_positive(block_len=block_len)
    place = canvas.cumsum(1) - 1
    tokens = tokens.masked_fill(canvas, denoiser.mask_id)
    reveal_step = torch.full_like(tokens, -1)
    steps = torch.zeros_like(tokens[:, 0])
    for start in range(0, int(canvas.sum(1).max()), block_len):
        block = canvas & (place >= start) & (place < start + block_len)
        out = mdmvi.generate(denoiser, tokens, block, strategy, budget, **options)
        tokens = out.tokens
        reveal_step = torch.where(block, steps[:, None] + out.reveal_step, reveal_step)
        steps = steps + out.steps
    return mdmvi.Generation(tokens, reveal_step, steps)
