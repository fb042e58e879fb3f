"""Tests of transformers_model.py and its program, transformers_train.py."""

import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import mdmvi
from examples import runs, transformers_model, transformers_train
from examples.command_line import UserError
from examples.transformers_model import TransformersDenoiser, generate_blocks

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
EOS, MASK, V = 1, 2, 16  # 0 is padding, 3 the first of a prompt, 4 and 5 words, 6 to 15 the digits
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 0}
SIZES |= {"bos_token_id": 3, "eos_token_id": EOS}
KINDS = ("Bert", "Llama", "Roberta", "ModernBert")


def make_model(kind, seed=0, **changes):
    torch.manual_seed(seed)
    config = getattr(transformers, kind + "Config")(**{**SIZES, **changes})
    task = "ForCausalLM" if kind in ("Llama", "Mamba", "Gemma2") else "ForMaskedLM"
    model = getattr(transformers, kind + task)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # far enough from 0 that attention is seen in the logits
            if weight.dim() == 2:
                weight.normal_(std=0.2)
    return model


def wrapped(kind="Bert", **changes):
    return TransformersDenoiser(make_model(kind, **changes), MASK, EOS, canvas_len=8)


def some_problems(rows=3, length=12, seed=0):
    """Random tokens, and canvases of 8 places that begin at 2, 3, 4, .."""
    tokens = torch.randint(4, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    place, start = torch.arange(length), 2 + torch.arange(rows)[:, None]
    return tokens, (place >= start) & (place < start + 8)


# --------------------------------------------------------------------------------------------------
# The wrapper
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_but_for_mask(kind):
    denoiser, (tokens, _) = wrapped(kind), some_problems()
    with torch.no_grad():
        own = denoiser.model(input_ids=tokens, is_causal=False).logits
    hidden = denoiser(tokens)
    assert hidden.shape == (3, 12, 32) and hidden.dtype == torch.float32
    place = torch.tensor([30, 2, 2])
    assert torch.equal(denoiser(tokens, place), hidden.flatten(0, 1)[place])
    logits = denoiser.logits(hidden)
    rest = [i for i in range(V) if i != MASK]
    assert torch.allclose(logits[..., rest], own[..., rest], atol=1e-5)
    assert (logits[..., MASK] == -math.inf).all()
    some = denoiser.logits(hidden[:, 2])  # of chosen places only
    assert torch.allclose(some, logits[:, 2], atol=1e-5)


def test_a_llama_is_made_to_look_both_ways():
    model, (tokens, _) = make_model("Llama"), some_problems()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % V
    with torch.no_grad():  # as it comes, it is causal: the last token changes nothing before it
        assert torch.equal(model(tokens).logits[:, :-1], model(changed).logits[:, :-1])
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        denoiser = TransformersDenoiser(model, MASK, EOS)
        moved = (denoiser(tokens) - denoiser(changed)).abs().amax(-1)
        assert (moved > 1e-3).all()


def test_two_way_llama_is_the_one_with_a_mask_of_ones():
    denoiser, (tokens, _) = wrapped("Llama"), some_problems()
    everything = torch.ones(3, 1, 12, 12, dtype=torch.bool)
    with torch.no_grad():
        base = denoiser.model.base_model(tokens, attention_mask=everything, use_cache=False)
    assert torch.allclose(denoiser(tokens), base.last_hidden_state, atol=1e-5)


def test_half_precision_gives_fp32():
    denoiser = TransformersDenoiser(make_model("Bert").bfloat16(), MASK, EOS)
    hidden = denoiser(some_problems()[0])
    assert hidden.dtype == torch.float32 and denoiser.logits(hidden).dtype == torch.float32


def test_the_policy_has_heads_of_its_own():
    denoiser = wrapped(hidden_size=36, num_attention_heads=12)  # heads of width 3: no rotary ones
    policy, _ = transformers_model.make_networks(denoiser, 12)
    assert policy.block.n_head == 2
    tokens, canvas = some_problems()
    assert policy(denoiser(tokens), canvas).shape == tokens.shape


def test_models_that_do_not_come_apart_or_look_backwards_are_refused():
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is not its parts in a row"):
        wrapped("Gemma2", final_logit_softcapping=0.1, num_key_value_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="MambaForCausalLM looks only backwards"):
        wrapped("Mamba")
    model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(vocab_size=V, dim=24))
    with pytest.raises(ValueError, match="DistilBertForMaskedLM is not its parts in a row"):
        TransformersDenoiser(model, MASK, EOS)
    shape = {"vocab_size": V, "emb_dim": 24, "n_layers": 1, "n_heads": 2}
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(**shape, mask_index=MASK))
    with pytest.raises(ValueError, match="XLMWithLMHeadModel is not its parts in a row"):
        TransformersDenoiser(model, MASK, EOS)
    model = make_model("Bert")
    for ids in ((MASK, MASK), (V, EOS), (-1, EOS), (MASK, V)):
        with pytest.raises(ValueError, match="are not two of the model's tokens, 0 .. 15"):
            TransformersDenoiser(model, *ids)
    for ids in ((None, EOS), (MASK, None)):
        with pytest.raises(ValueError, match="mask_id or eos_id is None"):
            TransformersDenoiser(model, *ids)


# --------------------------------------------------------------------------------------------------
# Learning an order on a problem of two tokens: a digit, and the same digit again
# --------------------------------------------------------------------------------------------------


def twins(n, generator):
    """Prompt 3 4, canvas: a random digit twice. A model of single tokens needs two steps."""
    digit = torch.randint(6, V, (n, 1), generator=generator)
    return torch.cat((torch.tensor([[3, 4]]).expand(n, 2), digit, digit), 1)


@pytest.fixture(scope="module")
def trained():
    """A small BERT that fills in masked twins."""
    model, generator = make_model("Bert"), torch.Generator().manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        tokens = twins(64, generator)
        masked = torch.rand(64, 4, generator=generator) < 0.6
        masked[:, :2] = False
        logits = model(input_ids=tokens.masked_fill(masked, MASK)).logits
        torch.nn.functional.cross_entropy(logits[masked], tokens[masked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return TransformersDenoiser(model, MASK, EOS, canvas_len=2)


def test_training_finds_the_order_and_leaves_the_model_alone(trained, monkeypatch):
    monkeypatch.setattr(runs, "SEARCH_STEPS", 60)
    before = {name: w.clone() for name, w in trained.model.state_dict().items()}
    torch.manual_seed(0)
    networks = (trained, *transformers_model.make_networks(trained, 4))
    generator = torch.Generator().manual_seed(1)
    tokens = twins(256, generator)
    canvas = torch.tensor([False, False, True, True]).expand(256, 4)

    def bound():
        return float(mdmvi.order_elbo(*networks, tokens, canvas, 2, 0.1, 8, generator).mean() / 2)

    start = bound()
    uniform = float(mdmvi.uniform_elbo(trained, tokens, canvas, 2, 8, generator).mean() / 2)
    transformers_model.learn_order(networks, tokens, canvas, 2, 120, generator)
    end, best = bound(), -math.log(10) / 2
    assert uniform == pytest.approx(1.5 * best, abs=0.05)  # one time in two in one step
    assert start < uniform and best - 0.2 < end < best + 0.02
    state = trained.model.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in before.items())
    assert all(w.grad is None for w in trained.model.parameters())
    out = mdmvi.generate(trained, tokens, canvas, "learned", 2, networks[1], 1.0, generator)
    assert (out.tokens[:, 2] == out.tokens[:, 3]).float().mean() > 0.8  # 0.55 in a random order
    assert set(range(6, V)) <= set(out.tokens[:, 2].tolist())


def test_orders_are_searched_and_then_the_bound_takes_over(trained, monkeypatch):
    losses = []

    def spy(module, name, tokens_at):
        loss = getattr(module, name)

        def call(*args):
            losses.append((name, len(args[tokens_at])))
            return loss(*args)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(runs, "SEARCH_STEPS", 2)
    spy(runs, "run_log_prob", 1)
    spy(runs, "cut_loss", 1)
    spy(mdmvi, "importance_order_loss", 3)
    networks = (trained, *transformers_model.make_networks(trained, 4))
    canvas = torch.tensor([False, False, True, True]).expand(100, 4)
    tokens = twins(100, torch.Generator().manual_seed(0))
    transformers_model.learn_order(networks, tokens, canvas, 2, 3)
    assert losses[:2] == [("run_log_prob", 64), ("run_log_prob", 36)]
    assert losses[2:] == 2 * [("cut_loss", 32)] + 3 * [("importance_order_loss", 16)]


# --------------------------------------------------------------------------------------------------
# Block by block
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["learned", "top_prob", "iid"])
def test_one_block_is_one_call(strategy):
    denoiser, (tokens, canvas) = wrapped(), some_problems()
    torch.manual_seed(0)
    policy, _ = transformers_model.make_networks(denoiser, 12)

    def run(generate, *args):
        generator = torch.Generator().manual_seed(0)
        options = {"policy": policy, "temperature": 1.0, "generator": generator}
        return generate(denoiser, tokens, canvas, *args, strategy, 4, **options)

    for block_len in (8, 100):
        blocks, whole = run(generate_blocks, block_len), run(mdmvi.generate)
        assert all(torch.equal(a, b) for a, b in zip(blocks, whole))


@pytest.mark.parametrize("block_len", [1, 3, 4])
def test_blocks_go_from_left_to_right_and_fill_everything(block_len):
    denoiser, (tokens, canvas) = wrapped(), some_problems()
    given = tokens.clone()
    out = generate_blocks(denoiser, tokens, canvas, block_len, "top_prob", 2)
    assert torch.equal(tokens, given)
    assert torch.equal(out.tokens[~canvas], tokens[~canvas])
    assert (out.tokens[canvas] != MASK).all()
    assert ((out.reveal_step >= 0) == canvas).all()
    assert torch.equal(out.steps, out.reveal_step.amax(1) + 1)
    for row, on in zip(out.reveal_step, canvas):
        blocks = row[on].split(block_len)
        for left, right in itertools.pairwise(blocks):
            assert left.max() < right.min() and left.max() - left.min() < 2
        assert row.max() + 1 == sum(min(2, len(block)) for block in blocks)


def test_a_block_without_places_is_refused():
    with pytest.raises(ValueError, match="block_len is -1"):
        generate_blocks(wrapped(), *some_problems(), -1, "top_prob", 2)


@pytest.mark.parametrize("block_len, budget", [(1, 1), (3, 2), (4, 2), (100, 2)])
def test_a_block_has_its_share_of_the_budget(block_len, budget, bert, data, monkeypatch):
    def spy(*args, **options):
        assert args[3:] == (block_len, "learned", budget)
        return generate_blocks(*args, **options)

    monkeypatch.setattr(transformers_train, "generate_blocks", spy)
    short_run(bert, data, "--block-len", str(block_len))  # of a canvas of 4, in 2 steps


def test_a_share_without_a_rest_is_not_rounded_up(monkeypatch):
    """7 of 25 tokens in 25 steps: in floats 7 / 25 of them is a little more than 7."""
    asked, none = [], torch.zeros(0, 30)
    monkeypatch.setattr(transformers_train, "generate_blocks", lambda *a, **_: asked.append(a[-1]))
    taken = mdmvi.Generation(none, none, torch.ones(1))
    monkeypatch.setattr(mdmvi, "generate", lambda *args, **options: taken)
    denoiser = types.SimpleNamespace(canvas_len=25)
    transformers_train.print_generations(denoiser, None, None, none, none, 25, 7, None)
    assert asked == [7]


def test_a_block_sees_the_earlier_ones_and_only_masks_after_it():
    denoiser, (tokens, canvas) = wrapped(), some_problems()
    seen = []

    class Spy:
        mask_id, eos_id, logits = MASK, EOS, staticmethod(denoiser.logits)

        def __call__(self, x):
            seen.append(x)
            return denoiser(x)

    out = generate_blocks(Spy(), tokens, canvas, 4, "top_prob", 1)
    place = canvas.cumsum(1) - 1
    first, second = (canvas & (place // 4 == k) for k in (0, 1))
    assert len(seen) == 2 and (seen[0][canvas] == MASK).all()
    assert (seen[1][second] == MASK).all()
    assert torch.equal(seen[1][first], out.tokens[first])


def test_canvases_of_different_lengths():
    denoiser, (tokens, canvas) = wrapped(), some_problems()
    canvas[0] = False
    canvas[0, 5] = True
    out = generate_blocks(denoiser, tokens, canvas, 3, "top_prob", 1)
    assert out.steps.tolist() == [1, 3, 3] and (out.tokens[canvas] != MASK).all()


# --------------------------------------------------------------------------------------------------
# The program, on a local folder
# --------------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[EOS]", "[MASK]", "[CLS]", "twice", "or", *"0123456789"]


def save_folder(folder, kind, **special):
    """A model and its tokenizer of whole words, as save_pretrained leaves them."""
    make_model(kind).save_pretrained(folder)
    ids = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="or"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=words, pad_token="[PAD]", **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tmp_path):
    return save_folder(tmp_path / "bert", "Bert", sep_token="[EOS]", mask_token="[MASK]")


@pytest.fixture
def data(tmp_path):
    """Twenty problems, one of which is too long for a canvas of 4."""
    rows = [{"question": f"twice {i % 10}", "answer": f"{i % 10} {i % 10}"} for i in range(19)]
    rows.append({"question": "twice 1", "answer": "1 1 1 1 1"})
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def short_run(model, data, *more):
    line = ["--model", model, "--data", data, "--canvas-len", "4", "--budget", "2", "--steps", "4"]
    transformers_train.main([*line, "--block-len", "2", "--device", "cpu", *more])


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_program_from_end_to_end(kind, tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(runs, "SEARCH_STEPS", 10)
    special = {"sep_token": "[EOS]", "mask_token": "[MASK]"} if kind == "Bert" else {}
    special = special or {"eos_token": "[EOS]"}
    more = [] if kind == "Bert" else ["--mask-id", str(MASK)]
    model = save_folder(tmp_path / "model", kind, **special)
    printed = []
    for _ in range(2):
        short_run(model, data, *more)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]  # seeded
    lines = printed[0].splitlines()
    assert lines[0] == "18 problems to learn from, 1 held out, 1 do not fit"
    bounds = [line.split() for line in lines if line.startswith(("  uniform", "  learned order"))]
    assert [" ".join(words[:-1]) for words in bounds] == [
        "uniform orders",
        "learned order, before",
        "learned order, after",
    ]
    assert all(-10 < float(words[-1]) < 0 for words in bounds)
    at = lines.index("prompt: [CLS] twice 8")
    assert [line.split(",")[0].strip() for line in lines[at + 1 :]] == [
        "learned",
        "top_prob",
        "in blocks",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_the_whole_context_fits(kind):
    denoiser = wrapped(kind)
    n = transformers_train.context_of(denoiser.model)
    assert n == (23 if kind == "Roberta" else 24)
    assert denoiser(torch.full((1, n), 5)).isfinite().all()


def test_layout_of_a_file(bert, data):
    denoiser, tokenizer = transformers_train.load_model(bert, None, 4, "cpu")
    assert (denoiser.mask_id, denoiser.eos_id) == (MASK, EOS)
    tokens, canvas, left_out = transformers_train.encode_file(data, tokenizer, denoiser, 24)
    assert tokens.shape == canvas.shape == (19, 7) and left_out == 1
    assert tokens[3].tolist() == [3, 4, 9, 9, 9, EOS, EOS]  # [CLS] twice 3, canvas 3 3 EOS EOS
    assert canvas[3].tolist() == [False] * 3 + [True] * 4


def test_prompts_of_different_lengths(bert, tmp_path):
    rows = [{"question": "twice 1 or 2", "answer": "1"}, {"question": "3", "answer": "4 4"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    denoiser, tokenizer = transformers_train.load_model(bert, None, 3, "cpu")
    file = (tmp_path / "p.jsonl", tokenizer, denoiser, 24)
    tokens, canvas, _ = transformers_train.encode_file(*file)
    assert tokens.tolist() == [[3, 4, 7, 5, 8, 7, EOS, EOS], [3, 9, 10, 10, EOS, EOS, EOS, EOS]]
    assert [row.nonzero().squeeze(1).tolist() for row in canvas] == [[5, 6, 7], [2, 3, 4]]


def test_bad_input_is_one_line(bert, data, tmp_path, monkeypatch):
    def said(*line):
        with pytest.raises(UserError) as caught:
            short_run(*line)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        return str(caught.value)

    assert "cannot load" in said(str(tmp_path), data)
    assert "MASK is 16, the model has tokens 0 .. 15" in said(bert, data, "--mask-id", "16")
    assert "are not two of the model's tokens" in said(bert, data, "--mask-id", str(EOS))
    nothing = save_folder(tmp_path / "nothing", "Bert", mask_token="[MASK]")
    assert "EOS or SEP" in said(nothing, data)
    no_mask = save_folder(tmp_path / "no_mask", "Llama", eos_token="[EOS]")
    assert "MASK: give --mask-id" in said(no_mask, data)
    assert "cannot read" in said(bert, str(tmp_path / "absent.jsonl"))
    assert "0 problems fit into 24 tokens" in said(bert, data, "--canvas-len", "23")
    assert "--budget" in said(bert, data, "--budget", "0")
    assert "--budget 1 leaves no order to learn" in said(bert, data, "--budget", "1")
    assert "--device" in said(bert, data, "--device", "cuda:99")
    bad = tmp_path / "bad.jsonl"
    for line in ('{"question": "twice 1"}', '{"question": "twice 1", "answer": 1}', "[1, 2]", "3"):
        bad.write_text('{"question": "twice 1", "answer": "1"}\n' + line)
        assert "line 2 has no texts question and answer" in said(bert, str(bad))
    large = tmp_path / "large"
    save_folder(large, "Bert", sep_token="[EOS]", mask_token="[MASK]")
    make_model("Bert", vocab_size=10).save_pretrained(large)
    assert "line 5 has tokens that the model lacks" in said(str(large), data)
    make_model("Bert").base_model.save_pretrained(large)
    assert "has no weights for cls.predictions.bias" in said(str(large), data)
    with monkeypatch.context() as patch:  # as of a model of text and pictures
        config = types.SimpleNamespace(architectures=["BertForMaskedLM"])
        kind = types.SimpleNamespace(from_pretrained=lambda name: config)
        patch.setattr(sys.modules["transformers"], "AutoConfig", kind)
        assert "is no plain text model" in said(bert, data)
    weights = large / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in said(str(large), data)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in said(bert, data)


def test_a_problem_with_mask_in_its_answer_is_left_out(bert, tmp_path):
    rows = [{"question": "1", "answer": text} for text in ("1", "2", "[MASK]")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    denoiser, tokenizer = transformers_train.load_model(bert, None, 3, "cpu")
    file = (tmp_path / "p.jsonl", tokenizer, denoiser, 24)
    assert transformers_train.encode_file(*file)[2] == 1
