"""Learn an order on a frozen masked language model of transformers, print bounds and examples.

    python -m examples.transformers_train --model FOLDER_OR_NAME --data problems.jsonl

The model's code must be part of transformers (pip install transformers). A line of --data is
{"question", "answer"}; what the model expects between the two belongs to the question. The last
tenth of the data, at most 64 problems, is held out. Nothing is saved. The method is in
examples/transformers_model.py, to copy.
"""

import math
from pathlib import Path

import torch
from torch import nn

import mdmvi
from examples.command_line import Parser, UserError, add_device, positive, run_main, whole
from examples.gsm8k import read_records
from examples.transformers_model import (
    TransformersDenoiser,
    generate_blocks,
    learn_order,
    make_networks,
)

TAU = 0.1  # of the training, and of the bounds that are printed


def load_model(name, mask_id, canvas_len, device):
    """(denoiser, tokenizer) of a local folder or a hub name. Raises UserError."""
    try:
        import transformers
    except ImportError:
        raise UserError("this program needs the package transformers: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        masked = "MaskedLM" in str(config.architectures)
        kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        model, info = kind.from_pretrained(name, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many kinds, all of which mean: not to be had
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"cannot load {name} ({why}): give the folder of a model, or go online")
    if info["missing_keys"]:
        raise UserError(
            f"{name} has no weights for {min(info['missing_keys'])}: take another model"
        )
    if not hasattr(config, "vocab_size") or not hasattr(config, "hidden_size"):
        raise UserError(f"{name} is no plain text model: take another model")
    masks = (mask_id, tokenizer.mask_token_id, getattr(config, "mask_token_id", None))
    mask_id = token_id("MASK", "give --mask-id", config.vocab_size, *masks)
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    eos_id = token_id("EOS or SEP", "take another tokenizer", config.vocab_size, *ends)
    try:
        return TransformersDenoiser(model.to(device), mask_id, eos_id, canvas_len), tokenizer
    except ValueError as error:
        raise UserError(str(error))


def token_id(what, advice, vocab_size, *choices):
    """The first of `choices` that is not None, or UserError if it is no token of the model."""
    found = next((i for i in choices if i is not None), None)
    if found is None:
        raise UserError(f"none of the model's {vocab_size} tokens is {what}: {advice}")
    if not 0 <= found < vocab_size:
        raise UserError(f"{what} is {found}, the model has tokens 0 .. {vocab_size - 1}: {advice}")
    return found


def encode_file(path, tokenizer, denoiser, max_len):
    """A file of {"question", "answer"} as prompt, canvas filled with EOS, EOS behind it.

    Returns (tokens int64 [M, N], canvas bool [M, N], how many did not fit). The prompt gets the
    special tokens of the tokenizer, such as [CLS]. Raises UserError for what cannot be read.
    """
    rows, left_out, length = [], 0, denoiser.canvas_len
    for where, record in read_records(Path(path)):
        columns = record if isinstance(record, dict) else {}
        texts = [columns.get(key) for key in ("question", "answer")]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where} has no texts question and answer: mend or remove it")
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # half a character
        prompt = tokenizer.encode(texts[0])
        answer = tokenizer.encode(texts[1], add_special_tokens=False)
        if max(prompt + answer, default=0) >= denoiser.model.config.vocab_size:
            raise UserError(f"{where} has tokens that the model lacks: another tokenizer?")
        if len(prompt) + length > max_len or len(answer) > length or denoiser.mask_id in answer:
            left_out += 1
        else:
            rows.append(prompt + answer + [denoiser.eos_id] * (length - len(answer)))
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} problems fit into {max_len} tokens, {length} of them canvas, "
            "but 2 are needed: give another --canvas-len or more --data"
        )
    lengths = torch.tensor([[len(row)] for row in rows])
    place = torch.arange(int(lengths.max()))
    padded = [torch.tensor(row) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=denoiser.eos_id)
    return tokens, (place >= lengths - length) & (place < lengths), left_out


def print_generations(denoiser, policy, tokenizer, tokens, canvas, budget, block_len, generator):
    """Each prompt, and what the learned order, top_prob at as many steps, and blocks make of it.

    A block has its share of the budget, rounded up, so that all blocks together may take more.
    """
    options = {"policy": policy, "generator": generator}
    given = (denoiser, tokens, canvas)
    learned = mdmvi.generate(*given, "learned", budget, **options)
    steps = math.ceil(learned.steps.float().mean())
    steps_a_block = -(-budget * min(block_len, denoiser.canvas_len) // denoiser.canvas_len)
    blocks = generate_blocks(*given, block_len, "learned", steps_a_block, **options)
    top_prob = mdmvi.generate(*given, "top_prob", steps)
    for i, (row, on) in enumerate(zip(tokens, canvas)):
        print(f"\nprompt: {tokenizer.decode(row[: int(on.int().argmax())])}")
        for name, out in (("learned", learned), ("top_prob", top_prob), ("in blocks", blocks)):
            ids = out.tokens[i][on].tolist()
            ids = ids[: ids.index(denoiser.eos_id)] if denoiser.eos_id in ids else ids
            print(f"  {name}, {int(out.steps[i])} steps: {tokenizer.decode(ids)}")


def context_of(model):
    """The most tokens that a row may have."""
    context = getattr(model.config, "max_position_embeddings", math.inf)
    for name, part in model.named_modules():
        padding = getattr(part, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            context -= padding + 1  # RoBERTa counts positions from behind it
    return context


def parse_args(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model and its tokenizer, or hub name")
    add("--data", required=True, help=".json/.jsonl(.gz/.xz) file of questions and answers")
    add("--mask-id", type=int, help="the token that stands for MASK (default: the model tells)")
    add("--canvas-len", type=positive, default=64, help="tokens in the canvas")
    add("--budget", type=positive, default=5, help="steps of generation, T")
    add(
        "--block-len",
        type=positive,
        default=16,
        help="tokens in a block; each block takes at least one step",
    )
    add("--steps", type=positive, default=1000, help="training steps")
    add("--seed", type=whole, default=0, help="seed of the weights and of every draw")
    add_device(parser)
    args = parser.parse_args(argv)
    if args.budget < 2:
        raise UserError("--budget 1 leaves no order to learn: give 2 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    denoiser, tokenizer = load_model(args.model, args.mask_id, args.canvas_len, args.device)
    max_len = min(context_of(denoiser.model), tokenizer.model_max_length)
    tokens, canvas, left_out = encode_file(args.data, tokenizer, denoiser, max_len)
    tokens, canvas = tokens.to(args.device), canvas.to(args.device)
    held_out = min(64, max(1, len(tokens) // 10))
    n = len(tokens) - held_out
    print(f"{n} problems to learn from, {held_out} held out, {left_out} do not fit", flush=True)
    torch.manual_seed(args.seed)
    networks = (denoiser, *make_networks(denoiser, tokens.shape[1]))
    generator = torch.Generator(args.device).manual_seed(args.seed)

    data = (tokens[n:], canvas[n:], args.budget)

    def bound():
        nats = mdmvi.order_elbo(*networks, *data, TAU, 4, generator)
        return float(nats.sum() / canvas[n:].sum())

    before = bound()
    learn_order(networks, tokens[:n], canvas[:n], args.budget, args.steps, generator, TAU)
    uniform = mdmvi.uniform_elbo(denoiser, *data, 4, generator)
    print(f"\nELBO at T={args.budget}, nats per canvas token, of the problems held out")
    print(f"  uniform orders         {float(uniform.sum() / canvas[n:].sum()):.4f}")
    print(f"  learned order, before  {before:.4f}")
    print(f"  learned order, after   {bound():.4f}")
    shown = (tokens[n : n + 3], canvas[n : n + 3], args.budget, args.block_len, generator)
    print_generations(denoiser, networks[1], tokenizer, *shown)


if __name__ == "__main__":
    run_main(main)
