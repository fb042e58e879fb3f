"""Published SMDM checkpoints (Nie et al., arXiv 2410.18514): into our denoiser, and back.

    python -m examples.smdm check mdm-170M-100e18.safetensors
    python -m examples.smdm to-safetensors out/checkpoint.pt denoiser.safetensors

The two models are the same, only the names of their parameters differ. Here are these names, the
checks that a file fits, and the tokenizer that goes with it; train.py --init uses them. Needs pip
install safetensors tokenizers.
"""

import contextlib
import os
from pathlib import Path

import torch

import mdmvi
from examples.command_line import Parser, UserError, run_main

HUB = {"smdm-170m": ("nieshen/SMDM", "mdm-170M-100e18.safetensors")}  # name: repository, file
HUB_TOKENIZER = ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tokenizer.json")
NAMES = {
    "trunk.wte.": "transformer.wte.",
    "trunk.norm.": "transformer.ln_f.",
    "trunk.blocks.": "transformer.h.",
    ".qkv.": ".attn.attn.",
    ".proj.": ".attn.proj.",
    ".w1.": ".mlp.swiglu.w1.",
    ".w2.": ".mlp.swiglu.w2.",
    ".w3.": ".mlp.swiglu.w3.",
}


def smdm_name(name):
    """The key of an SMDM checkpoint for a parameter name of `mdmvi.Denoiser`."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def safetensors_package():
    """The package safetensors, or UserError where it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("SMDM files need the package safetensors: pip install safetensors")
    return safetensors


def hub_file(repository, name):
    """Path of a file of a hub repository, downloaded once. Raises UserError if it cannot be had."""
    try:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, name)
    except Exception as error:  # many kinds, all of which mean: not to be had
        why = type(error).__name__
        raise UserError(f"cannot get {name} of {repository} ({why}): go online or give a file")


def read_smdm(path_or_name):
    """(path, {key: tensor}) of a file, of the one .safetensors in a folder, or of a HUB name."""
    package = safetensors_package()
    path = Path(hub_file(*HUB[path_or_name]) if path_or_name in HUB else path_or_name)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} .safetensors files: give the one to read")
        path = files[0]
    if not path.exists():
        raise UserError(f"no file at {path}: give a .safetensors file, or {', '.join(HUB)}")
    try:
        return path, package.torch.load_file(path)
    except (OSError, package.SafetensorError) as error:
        why = type(error).__name__
        raise UserError(f"{path} is damaged or no .safetensors file ({why}): get it again")


def read_tokenizer(path_or_name):
    """Text of the tokenizer.json beside an SMDM file, or of the one that a HUB name goes with."""
    if path_or_name in HUB:
        path = Path(hub_file(*HUB_TOKENIZER))
    else:
        path = Path(path_or_name)
        path = (path if path.is_dir() else path.parent) / "tokenizer.json"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"cannot read {path}: put the tokenizer.json of TinyLlama there")


class LlamaTokenizer:
    """The LLaMA BPE of a published checkpoint, from the text of its tokenizer.json."""

    eos_id, vocab_size, mask_id = 2, 32_000, 32_000

    def __init__(self, pieces):
        try:
            import tokenizers
        except ImportError:
            raise UserError("the LLaMA tokenizer needs its package: pip install tokenizers")
        try:
            self.pieces, self.bpe = pieces, tokenizers.Tokenizer.from_str(pieces)
        except Exception as error:  # tokenizers raises plain Exception
            reason = str(error)[:80]
            raise UserError(f"this is not a tokenizer.json ({reason}): give the one of TinyLlama")
        largest = max(self.bpe.get_vocab().values(), default=0)
        if largest >= self.vocab_size:
            raise UserError(f"this tokenizer.json has an id {largest}: give the one of TinyLlama")
        if self.bpe.token_to_id("</s>") != self.eos_id:
            raise UserError("this tokenizer.json has another </s>: give the one of TinyLlama")

    def encode(self, text):
        text = text.encode("utf-8", "replace").decode()  # half a character is no text to it
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode(list(ids))


def check_fit(path, tensors, denoiser):
    """Raise UserError unless `tensors` has the keys and shapes of `denoiser`, and no others."""
    expected = {smdm_name(name): weight.shape for name, weight in denoiser.state_dict().items()}
    for key, shape in expected.items():
        if key not in tensors:
            raise UserError(f"{path} has no {key}, which this model has: check the size")
        here, there = list(shape), list(tensors[key].shape)
        if here != there:
            raise UserError(f"{path} has {key} of shape {there}, this model {here}: check the size")
    extra = tensors.keys() - expected.keys()
    if extra:
        raise UserError(f"{path} has {min(extra)}, this model has no such layer: check the size")


def load_smdm(path_or_name, denoiser):
    """Fill an `mdmvi.Denoiser` from what `read_smdm` finds; rope_bf16 belongs in its config.

    Raises UserError, with the denoiser left as it was, where that cannot be read or does not fit.
    """
    path, tensors = read_smdm(path_or_name)
    check_fit(path, tensors, denoiser)
    denoiser.load_state_dict({name: tensors[smdm_name(name)] for name in denoiser.state_dict()})


def save_smdm(path, denoiser):
    """Write a denoiser in SMDM's layout, fp32: a temporary file, renamed. Raises UserError."""
    package = safetensors_package()
    tensors = {smdm_name(name): w.float().cpu() for name, w in denoiser.state_dict().items()}
    temporary = f"{path}.tmp"
    try:
        package.torch.save_file(tensors, temporary)
        os.replace(temporary, path)
    except (OSError, package.SafetensorError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f"cannot write {path} ({str(error)[:120]}): give another file")


def config_of(path, tensors):
    """ModelConfig that the shapes tell, with one head: the number of heads leaves no trace."""
    shapes = []
    for key in ("lm_head.weight", "transformer.wte.weight", "transformer.h.0.mlp.swiglu.w1.weight"):
        if key not in tensors or tensors[key].dim() != 2:
            raise UserError(f"{path} has no matrix {key}: it is no SMDM checkpoint")
        shapes.append(tensors[key].shape)
    head, embedding, hidden = shapes
    n_layer = sum(key.endswith(".norm_1.weight") for key in tensors)
    mask_id = embedding[0] - 1
    try:
        return mdmvi.ModelConfig(head[0], 1, n_layer, 1, head[1], hidden[0], mask_id, eos_id=0)
    except ValueError as error:
        raise UserError(f"{path} is no SMDM checkpoint ({error})")


def print_facts(path_or_name):
    """Layers, width, vocabulary and parameters of an SMDM file, or UserError if it is none."""
    path, tensors = read_smdm(path_or_name)
    config = config_of(path, tensors)
    with torch.device("meta"):  # shapes without memory
        check_fit(path, tensors, mdmvi.Denoiser(config))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"layers      {config.n_layer}")
    print(f"width       {config.n_embd}, hidden {config.n_hidden}")
    print(f"vocabulary  {config.vocab_size}, with {config.mask_id + 1} rows in the embedding")
    print(f"parameters  {parameters:,} in {str(tensors['lm_head.weight'].dtype)[6:]}")


def main(argv=None):
    from eval_gsm8k import load_checkpoint  # which imports this file

    parser = Parser(__doc__)
    parser.add_argument(
        "command", choices=("check", "to-safetensors"), help="test, or write a .safetensors file"
    )
    parser.add_argument("file", help="SMDM file to check, or checkpoint.pt of train.py to export")
    parser.add_argument("out", nargs="?", help="the file that to-safetensors writes")
    args = parser.parse_args(argv)
    if (args.command == "check") != (args.out is None):
        raise UserError("give check one file, to-safetensors a checkpoint and the file to write")
    if args.command == "check":
        print_facts(args.file)
    elif os.path.exists(args.out):
        raise UserError(f"{args.out} exists: give another file, or remove it first")
    else:
        save_smdm(args.out, load_checkpoint(args.file)[2].denoiser)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_main(main)
