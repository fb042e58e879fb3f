"""Benchmark and memory: what they count is right, what they print is complete. No timings."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mdmvi
import train
from examples import benchmark, memory
from examples.command_line import UserError

SHAPE = ["--size", "tiny", "--batch", "16", "--max-len", "24", "--canvas-len", "8", "--vocab", "40"]
SHAPE += ["--budget", "3"]
SMALL = [*SHAPE, "--device", "cpu", "--no-compile", "--repeats", "1"]


def make_args(*line):
    flags = benchmark.parse_args(line)
    return benchmark.make_args(flags, flags.accumulate, flags.device)


def make_run(flags):
    return benchmark.make_run(flags, benchmark.make_args(flags, 1, "cpu"))


def test_every_step_and_sampler_has_a_row(capsys):
    benchmark.main(SMALL)
    lines = capsys.readouterr().out.splitlines()
    for name in ("plain step", "order step", *mdmvi.STRATEGIES):
        assert sum(line.startswith(name + "  ") for line in lines) == 1, name
    assert "CPU with" in lines[0] and any("optimiser takes" in line for line in lines)


def test_paper_is_one_flag_and_others_change_it():
    args = make_args("--paper", "--device", "cpu")
    assert (args.size, args.batch, args.order_batch, args.accumulate) == ("170m", 256, 64, 8)
    assert (args.max_len, args.canvas_len, args.optimizer) == (256, 96, "adamw")
    args = make_args("--paper", "--batch", "8")
    assert (args.batch, args.order_batch, args.accumulate) == (8, 2, 1)
    args = make_args(*SMALL, "--accumulate", "2")
    assert (args.batch, args.accumulate) == (16, 2)


@pytest.mark.parametrize("budget", ["1", "2"])
@pytest.mark.parametrize("orders", ["runs", "paper"])
def test_steps_of_both_stages_pass_as_many_sequences(orders, budget):
    flags = benchmark.parse_args([*SMALL, "--orders", orders, "--budget", budget])
    run, data, passed = make_run(flags), benchmark.random_data(flags, torch.device("cpu")), []
    run.denoiser.trunk.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    sums = []
    for stage in benchmark.STAGES:
        passed.clear()
        benchmark.make_step(run, stage, data)()
        sums.append(sum(passed))
        assert run.step == train.stage_groups(run, stage)[1] // 2  # half-way, as the rates are
    assert sums == [flags.batch, flags.batch]


@pytest.mark.parametrize(
    "more",
    [
        ["--batch", "10"],
        ["--canvas-len", "24"],
        ["--device", "no"],
        ["--accumulate", "3"],
        ["--vocab", "1"],  # top_prob_margin needs a second token
    ],
)
def test_what_cannot_be_is_one_line(more):
    with pytest.raises(UserError):
        benchmark.parse_args(SMALL + more)


def test_plain_model_is_the_same_work():
    """It has as many weights, and with ours copied over it gives the same logits."""
    run = make_run(benchmark.parse_args(SMALL))
    model, config = benchmark.PlainModel(run.config), run.config
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in run.denoiser.parameters()
    )
    state = run.denoiser.state_dict()
    names = {"proj": "out", "w1": "gate", "w2": "up", "w3": "down"}
    theirs = {"cos": model.cos, "sin": model.sin}
    for name, value in state.items():
        parts = [names.get(part, part) for part in name.removeprefix("trunk.").split(".")]
        if "qkv" in parts:  # rows (head, q|k|v, size) there, (q|k|v, head, size) here
            value = (
                value.view(config.n_head, 3, -1, config.n_embd).transpose(0, 1).reshape_as(value)
            )
        key = ".".join(parts).replace("wte", "embed").replace("lm_head", "head")
        theirs[key] = value
    model.load_state_dict(theirs)
    tokens = torch.randint(config.vocab_size, (2, config.max_len))
    ours = run.denoiser.logits(run.denoiser(tokens))
    torch.testing.assert_close(model(tokens), ours, rtol=1e-4, atol=1e-5)


def test_all_logits_give_the_same_log_probabilities():
    flags = benchmark.parse_args(SMALL)
    run, (tokens, canvas) = make_run(flags), benchmark.random_data(flags, torch.device("cpu"))
    masked = canvas & (torch.rand(canvas.shape) < 0.5)
    ours = mdmvi.token_log_prob(run.denoiser, tokens, masked)
    full = benchmark.all_logits(run.denoiser, tokens, masked)
    torch.testing.assert_close(full, ours)


def test_against_plain_leaves_the_module_as_it_was(capsys):
    before = mdmvi.token_log_prob
    benchmark.main([*SMALL, "--against-plain"])
    assert mdmvi.token_log_prob is before
    assert "plain PyTorch" in capsys.readouterr().out


def test_stages_are_compiled_for_their_timing_only(monkeypatch, capsys):
    before, calls = mdmvi.token_log_prob, []

    def compiled(function, dynamic):
        return lambda *args: calls.append(function.__name__) or function(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    benchmark.main([*SMALL, "--compile"])
    assert mdmvi.token_log_prob is before
    assert set(calls) == {"token_log_prob", "step_bound", "scores"}


def test_flops_are_those_that_torch_counts():
    run = make_run(benchmark.parse_args(SMALL))
    tokens = torch.randint(run.config.vocab_size, (1, run.config.max_len))
    shape, N = run.config, run.config.max_len
    masked = torch.arange(N)[None] < 3
    with FlopCounterMode(display=False) as counter:  # places that are not scored cost no more
        mdmvi.token_log_prob(run.denoiser, tokens, masked).sum().backward()
    attention = 12 * shape.n_layer * shape.n_embd * N * N  # torch does not count the CPU's
    assert counter.get_total_flops() + attention == benchmark.flops_of(shape, 3)


def test_live_bytes_by_hand():
    flags = benchmark.parse_args(SMALL)
    run = make_run(flags)
    networks = (run.denoiser, run.policy, run.posterior)
    weights = sum(p.numel() for network in networks for p in network.parameters())

    def twice(run, data):
        x = torch.empty(1000, 1000)
        del x
        torch.empty(1000, 500)

    peak = memory.peak_bytes(run, flags, 1, twice)
    tables = sum(b.numel() for n in (run.denoiser, run.posterior) for b in n.buffers())
    data = 256 * flags.max_len * 9 + 4 * (weights + tables) + 4_000_000
    assert data <= peak < data + 20_000
    flags.paper = True
    plain = memory.training("plain")
    assert memory.peak_bytes(run, flags, 2, plain) < memory.peak_bytes(run, flags, 1, plain)


def test_a_mask_has_as_many_places_as_the_canvas():
    """However few rows of tokens there are, eight of 24 each; a mask of rows keeps them all."""
    flags, found = benchmark.parse_args(SMALL), []

    def count(run, data):
        for n in (2, 32, 200):
            tokens, canvas = (x[:n] for x in data)
            found.append((len(canvas.flatten().nonzero()), len(tokens[canvas])))
        rows = data[1][: memory.SCORED].any(1)
        found.append((len(rows.nonzero()), len(rows[rows])))

    memory.peak_bytes(make_run(flags), flags, 1, count)
    assert found == [(16, 16), (256, 256), (1600, 1600), (128, 128)]


def test_memory_of_an_order_step_and_of_scoring(monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", (1, 2, 64, 128))  # a block less to trace
    flags = benchmark.parse_args([*SMALL, "--batch", "4", "--budget", "2"])
    run = make_run(flags)
    plain, order = (memory.peak_bytes(run, flags, 1, memory.training(s)) for s in benchmark.STAGES)
    scoring = (memory.peak_bytes(run, flags, 1, memory.scoring("learned", t)) for t in (0.0, 1.0))
    weights = sum(4 * p.numel() for p in run.denoiser.parameters())
    assert order > plain > 4 * weights and all(peak > weights for peak in scoring)


def test_memory_has_a_row_for_each(capsys, monkeypatch):
    """With stand-ins for the peaks, which the tests above compute."""
    monkeypatch.setattr(memory, "peak_bytes", lambda run, flags, n, function: n * 2**30)
    memory.main([*SHAPE, "--batch", "8", "--budget", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if " step  " in line] == [
        [stage, "step", "1.0", "2.0"] for stage in benchmark.STAGES
    ]
    assert sum("scoring 128 with" in line for line in lines) == 2 * len(mdmvi.STRATEGIES)
    assert "hours" in lines[-1]
