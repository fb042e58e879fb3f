"""Text to tokens and back: the default tokenizer, and problems as tensors.

Lossless: digits are one token each; the marks of an equation and frequent words have tokens of
their own, all else is bytes. The tokenizer of a published checkpoint is in smdm.py.
"""

import re
from collections import Counter

import torch

SEPARATOR = "||"  # between question and answer, as in SMDM's fine-tuning data
MARKS = (">> <<", ">> #### ", " #### ", "<<", ">>", "####", "||", *"+-*/=0123456789")
# A word takes the space before it along, and the space after it where a number follows.
WORD = r" ?[A-Za-z]+(?: (?=[0-9]))?| ?[^\sA-Za-z0-9](?: (?=[0-9]))?|\s"
PIECE = re.compile("|".join(map(re.escape, MARKS)) + "|" + WORD)


class Tokenizer:
    """Ids: 0 is EOS (no text), 1..256 the bytes, then the pieces; `mask_id` comes after them."""

    eos_id = 0

    def __init__(self, pieces):
        self.pieces = [str(piece) for piece in pieces]
        self.ids = {piece: 257 + i for i, piece in enumerate(self.pieces)}
        self.vocab_size = self.mask_id = 257 + len(self.pieces)
        encoded = [piece.encode("utf-8", "replace") for piece in self.pieces]
        self.bytes = [b"", *(bytes([b]) for b in range(256)), *encoded, b""]  # of each id

    @classmethod
    def build(cls, texts, max_pieces=4096):
        """Marks, then the most frequent pieces of `texts`, if they are there five times or more."""
        count = Counter(piece for text in texts for piece in PIECE.findall(text))
        frequent = [piece for piece in count if count[piece] >= 5 and piece not in MARKS]
        frequent.sort(key=lambda piece: (-count[piece], piece))
        return cls([*MARKS, *frequent[: max_pieces - len(MARKS)]])

    def encode(self, text):
        ids = []
        for piece in PIECE.findall(text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            else:
                ids.extend(1 + b for b in piece.encode("utf-8", "replace"))
        return ids

    def decode(self, ids):
        # A model may string bytes together that are no text
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")


def encode_problems(problems, tokenizer, config, with_answers=True):
    """Lay problems out as prompt, canvas of `canvas_len` tokens filled with EOS, EOS behind it.

    Returns (tokens int32 [M, max_len], canvas bool [M, max_len], fits: list of M bools). A problem
    that does not fit has an empty canvas.
    """
    max_len, canvas_len = config.max_len, config.canvas_len
    tokens = torch.full((len(problems), max_len), tokenizer.eos_id, dtype=torch.int32)
    canvas, fits = torch.zeros(tokens.shape, dtype=torch.bool), []
    for i, problem in enumerate(problems):
        prompt = tokenizer.encode(problem["question"] + SEPARATOR)
        answer = tokenizer.encode(problem["answer"]) if with_answers else []
        fits.append(len(prompt) + canvas_len <= max_len and len(answer) <= canvas_len)
        if fits[-1]:
            ids = prompt + answer
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            canvas[i, len(prompt) : len(prompt) + canvas_len] = True
    return tokens, canvas, fits


def answer_text(tokenizer, tokens, canvas):
    """The text on one row's canvas, up to the first EOS."""
    ids = tokens[canvas].tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)
