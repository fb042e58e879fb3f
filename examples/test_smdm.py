"""Tests of examples/smdm.py:  python -m pytest examples/test_smdm.py"""

import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_gsm8k
import mdmvi
from examples import smdm
from examples.command_line import UserError

package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT.parent / "shared" / "smdm_fixture"
needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason="no ../shared/smdm_fixture")


def make_denoiser(n_layer=2, vocab_size=11, seed=0):
    torch.manual_seed(seed)
    return mdmvi.Denoiser(mdmvi.ModelConfig(vocab_size, 16, n_layer, 2, 8, 12, vocab_size, 0))


@pytest.fixture
def saved(tmp_path):
    """(path, denoiser) of a small file that is right."""
    denoiser = make_denoiser()
    smdm.save_smdm(tmp_path / "m.safetensors", denoiser)
    return tmp_path / "m.safetensors", denoiser


def one_line(*args, **kwargs):
    """The one line that load_smdm has to say of a bad file."""
    with pytest.raises(UserError) as caught:
        smdm.load_smdm(*args, **kwargs)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return str(caught.value)


def fixture_denoiser(rope_bf16):
    c = json.loads((FIXTURE / "config.json").read_text())
    names = (
        "vocab_size",
        "block_size",
        "n_layer",
        "n_head",
        "n_embd",
        "intermediate_size",
        "mask_id",
    )
    config = mdmvi.ModelConfig(*(c[name] for name in names), eos_id=2, rope_bf16=rope_bf16)
    denoiser = mdmvi.Denoiser(config)
    smdm.load_smdm(FIXTURE / "smdm_tiny.safetensors", denoiser)
    return denoiser


@needs_fixture
@pytest.mark.parametrize(
    "rope_bf16, recorded, tolerance",
    [(False, "logits_fp32_rope", 1e-4), (True, "logits_bf16_rope", 2e-3)],
)
def test_the_logits_are_those_of_the_original_code(rope_bf16, recorded, tolerance):
    denoiser, arrays = fixture_denoiser(rope_bf16), np.load(FIXTURE / "smdm_tiny_logits.npz")
    with torch.no_grad():
        logits = denoiser.logits(denoiser(torch.from_numpy(arrays["ids"]).long()))
    assert (logits - torch.from_numpy(arrays[recorded]).float()).abs().max() < tolerance


@needs_fixture
def test_our_file_of_the_fixture_has_the_same_tensors(tmp_path):
    smdm.save_smdm(tmp_path / "back.safetensors", fixture_denoiser(rope_bf16=True))
    theirs = package.load_file(FIXTURE / "smdm_tiny.safetensors")
    ours = package.load_file(tmp_path / "back.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].float()) for key in ours)


def test_the_names_are_those_that_the_publication_uses():
    layer = ("norm_1", "attn.attn", "attn.proj", "norm_2")
    layer += ("mlp.swiglu.w1", "mlp.swiglu.w2", "mlp.swiglu.w3")
    expected = {"lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"}
    expected |= {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in layer}
    assert {smdm.smdm_name(name) for name in make_denoiser().state_dict()} == expected


def test_round_trip_is_exact_and_leaves_no_other_file(saved):
    path, denoiser = saved
    again = make_denoiser(seed=1)
    smdm.load_smdm(str(path), again)
    state = again.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in denoiser.state_dict().items())
    assert os.listdir(path.parent) == [path.name]
    smdm.load_smdm(path.parent, make_denoiser())  # a folder with one file in it


def test_saved_in_fp32(tmp_path):
    smdm.save_smdm(tmp_path / "m.safetensors", make_denoiser().bfloat16())
    dtypes = {w.dtype for w in package.load_file(tmp_path / "m.safetensors").values()}
    assert dtypes == {torch.float32}


def test_a_bf16_file_is_read(saved):
    path, denoiser = saved
    half = {key: w.bfloat16() for key, w in package.load_file(path).items()}
    package.save_file(half, path)
    again = make_denoiser(seed=1)
    smdm.load_smdm(path, again)
    assert torch.equal(again.lm_head.weight, denoiser.lm_head.weight.bfloat16().float())


def test_other_sizes_are_told_and_change_nothing(saved):
    path, _ = saved
    deeper = make_denoiser(n_layer=3, seed=1)
    before = {name: w.clone() for name, w in deeper.state_dict().items()}
    assert "has no transformer.h.2.norm_1.weight, which this model has" in one_line(path, deeper)
    assert all(torch.equal(w, before[name]) for name, w in deeper.state_dict().items())
    said = one_line(path, make_denoiser(n_layer=1))
    assert "has transformer.h.1.attn.attn.weight, this model has no such layer" in said
    said = one_line(path, make_denoiser(vocab_size=13))
    assert "of shape [12, 8], this model [14, 8]" in said


def test_an_odd_width_is_no_smdm_checkpoint():
    shapes = {"lm_head.weight": 12, "transformer.wte.weight": 14}
    tensors = {key: torch.zeros(rows, 7) for key, rows in shapes.items()}
    tensors["transformer.h.0.mlp.swiglu.w1.weight"] = torch.zeros(16, 7)
    tensors["transformer.h.0.norm_1.weight"] = torch.zeros(7)
    with pytest.raises(UserError, match="a.safetensors is no SMDM checkpoint .n_embd 7"):
        smdm.config_of("a.safetensors", tensors)


def test_files_that_are_none(saved, tmp_path):
    path, denoiser = saved
    whole = path.read_bytes()
    damaged = {"start": whole[:400], "end": whole[:-4], "empty": b"", "text": b"no tensors" * 50}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        assert "is damaged or no .safetensors file" in one_line(tmp_path / name, denoiser)
    assert "no file at" in one_line(tmp_path / "absent", denoiser)
    assert "no file at" in one_line("smdm-171m", denoiser)
    (tmp_path / "second.safetensors").write_bytes(whole)
    assert "holds 2 .safetensors files" in one_line(tmp_path, denoiser)


def test_a_save_that_fails_leaves_what_was_there(saved, monkeypatch):
    path, denoiser = saved
    with pytest.raises(UserError, match="cannot write"):
        smdm.save_smdm(path.parent / "absent" / "m.safetensors", denoiser)
    before = path.read_bytes()

    def half_written(tensors, name):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "save_file", half_written)
    with pytest.raises(UserError, match="No space left"):
        smdm.save_smdm(path, denoiser)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_missing_packages_and_network_are_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    said = one_line("smdm-170m", make_denoiser())
    assert "cannot get mdm-170M-100e18.safetensors of nieshen/SMDM (ConnectionError)" in said
    assert asked == [("nieshen/SMDM", "mdm-170M-100e18.safetensors")]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "go online or give a file" in one_line("smdm-170m", make_denoiser())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in one_line("any", make_denoiser())


def test_the_hub_file_is_loaded(saved, monkeypatch):
    path, denoiser = saved
    monkeypatch.setattr(smdm, "hub_file", lambda repository, name: str(path))
    again = make_denoiser(seed=1)
    smdm.load_smdm("smdm-170m", again)
    assert torch.equal(again.lm_head.weight, denoiser.lm_head.weight)


def test_check_tells_the_shape(saved, capsys):
    path, denoiser = saved
    smdm.main(["check", str(path)])
    printed = " ".join(capsys.readouterr().out.split())
    count = sum(w.numel() for w in denoiser.parameters())
    assert printed.startswith("layers 2 width 8, hidden 12 vocabulary 11, with 12 rows")
    assert printed.endswith(f"parameters {count:,} in float32")
    tensors = package.load_file(path)
    del tensors["transformer.h.1.mlp.swiglu.w2.weight"]
    package.save_file(tensors, path)
    with pytest.raises(UserError, match="has no transformer.h.1.mlp.swiglu.w2.weight"):
        smdm.main(["check", str(path)])
    package.save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="it is no SMDM checkpoint"):
        smdm.main(["check", str(path)])


def test_export_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    checkpoint, denoiser = tmp_path / "checkpoint.pt", make_denoiser()
    loaded = {str(checkpoint): (None, None, types.SimpleNamespace(denoiser=denoiser))}
    monkeypatch.setattr(eval_gsm8k, "load_checkpoint", loaded.get)
    out = tmp_path / "m.safetensors"
    smdm.main(["to-safetensors", str(checkpoint), str(out)])
    assert str(out) in capsys.readouterr().out
    again = make_denoiser(seed=1)
    smdm.load_smdm(out, again)
    assert torch.equal(again.trunk.wte.weight, denoiser.trunk.wte.weight)
    written = out.read_bytes()
    with pytest.raises(UserError, match="exists"):
        smdm.main(["to-safetensors", str(checkpoint), str(out)])
    assert out.read_bytes() == written


@pytest.mark.parametrize("line", [["check", "a", "b"], ["to-safetensors", "a"], ["eat", "a"], []])
def test_wrong_command_lines(line):
    with pytest.raises(UserError):
        smdm.main(line)
