"""LlamaGen's files in and out, against what its own code computed with them."""

import argparse
import dataclasses
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mutor_vision.config import TokenizerConfig, TrainConfig, TransformerConfig
from mutor_vision.errors import DataError, IntegrityError, MismatchError, UserError
from mutor_vision.interop import llamagen
from mutor_vision.interop.convert import convert, convert_back
from mutor_vision.interop.llamagen_codes import import_codes
from mutor_vision.model.transformer import Transformer, num_parameters
from mutor_vision.sampling.draw import SampleSettings
from mutor_vision.sampling.generate import generate
from mutor_vision.storage import checkpoint
from mutor_vision.storage import foreign as foreign_checkpoint
from mutor_vision.storage.files import read_json
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer

GPT, VQ = "llamagen_gpt_tiny", "llamagen_vq_tiny"


def gpt_weights(shared):
    return torch.load(shared / "golden" / f"{GPT}.pt", weights_only=True)["model"]


def convert_gpt(source, target, **settings):
    lines = []
    convert(source, target, heads=4, grid=(4, 4), say=lines.append, **settings)
    return lines


def load_transformer(run):
    folder = checkpoint.resolve(run)
    model = Transformer(checkpoint.read_config(folder, "transformer", TrainConfig).model)
    checkpoint.load_strictly(model, checkpoint.read_weights(folder, "best"), folder)
    return model


@pytest.fixture(scope="module")
def gpt(shared, tmp_path_factory):
    """(the converted golden run, its golden inputs and outputs)"""
    run = tmp_path_factory.mktemp("gpt") / "run"
    convert_gpt(shared / "golden" / f"{GPT}.pt", run)
    return run, np.load(shared / "golden" / f"{GPT}_io.npz")


def test_transformer_equals_llamagens_logits_and_loss(gpt):
    run, io = gpt
    tokens, labels = torch.from_numpy(io["tokens"]), torch.from_numpy(io["cond"])
    model = load_transformer(run)
    losses = []
    for mode in (True, False):
        model.train(mode)
        for dropout in model.modules():
            if isinstance(dropout, torch.nn.Dropout):
                dropout.p = 0.0
        with torch.no_grad():
            logits = model(tokens[:, :-1], labels, torch.arange(16)[None])
        assert np.abs(logits.numpy() - io["logits"]).max() < 1e-5
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).item())
    assert losses[0] == losses[1] == pytest.approx(float(io["loss"]), abs=1e-5)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("greedy_cfg1", dict(cfg_scale=1.0)),
        ("greedy_cfg2", dict(cfg_scale=2.0)),
        ("greedy_cfg3_interval5", dict(cfg_scale=3.0, cfg_interval=(0, 7))),  # theirs counts from the second token
    ],
)
def test_generation_equals_llamagens_token_for_token(gpt, name, settings):
    run, io = gpt
    model = load_transformer(run).eval()
    settings = SampleSettings(temperature=0, **settings)
    codes = generate(model, torch.from_numpy(io["cond"][:2]), settings, seed=0, indices=np.arange(2))
    assert np.array_equal(codes.flatten(1).numpy(), io[name])


def test_tokenizer_equals_llamagens(shared, tmp_path):
    convert(shared / "golden" / f"{VQ}.pt", tmp_path / "vq", say=lambda line: None)
    tokenizer = load_tokenizer(tmp_path / "vq")
    io = np.load(shared / "golden" / f"{VQ}_io.npz")
    result = tokenizer(torch.from_numpy(io["image"]))
    assert np.array_equal(result.quantized.codes.numpy(), io["codes"])
    assert np.abs(result.quantized.latents.numpy() - io["quant"]).max() < 1e-5
    assert np.abs(result.images.numpy() - io["reconstruction"]).max() < 1e-4


@pytest.mark.parametrize("name", [GPT, VQ])
def test_a_file_comes_back_with_the_same_bytes(shared, tmp_path, name):
    source = shared / "golden" / f"{name}.pt"
    settings = {"heads": 4, "grid": (4, 4)} if name == GPT else {}
    convert(source, tmp_path / "run", say=lambda line: None, **settings)
    lines = []
    convert_back(tmp_path / "run", tmp_path / "back.pt", say=lines.append)
    theirs, back = (torch.load(path, weights_only=True)["model"] for path in (source, tmp_path / "back.pt"))
    assert theirs.keys() == back.keys()
    for key in theirs.keys() - {llamagen.USAGE_BUFFER}:
        assert theirs[key].dtype == back[key].dtype and torch.equal(theirs[key], back[key]), key
    assert ("register's row is left out" in lines[0]) == (name == GPT)


def test_our_run_survives_the_way_through_llamagens_file(tmp_path, trained_run):
    convert_back(trained_run, tmp_path / "theirs.pt", say=lambda line: None)
    convert(tmp_path / "theirs.pt", tmp_path / "ours", heads=2, grid=(4, 4), say=lambda line: None)
    before, after = (
        checkpoint.read_weights(checkpoint.resolve(run), "best") for run in (trained_run, tmp_path / "ours")
    )
    assert before.keys() == after.keys()
    before["token_embedding.weight"], after["token_embedding.weight"] = (
        weights["token_embedding.weight"][:-1] for weights in (before, after)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_model_trained_with_registers_keeps_its_logits_in_llamagens_file(tmp_path, trained_run):
    convert_back(trained_run, tmp_path / "theirs.pt", say=lambda line: None)
    convert(tmp_path / "theirs.pt", tmp_path / "ours", heads=2, grid=(4, 4), say=lambda line: None)
    tokens, labels = torch.arange(30).reshape(2, 15), torch.tensor([0, 5])
    ours, back = (
        load_transformer(run).eval()(tokens, labels, torch.arange(16)[None]) for run in (trained_run, tmp_path / "ours")
    )
    assert torch.equal(ours, back)


SIZES = {
    (12, 768): 110_888_448, (24, 1024): 342_910_976, (36, 1280): 774_699_520, (48, 1536): 1_410_972_672,
    (24, 3200): 3_096_659_200,
}  # fmt: skip


@pytest.mark.parametrize("grid", [(16, 16), (24, 24)])
@pytest.mark.parametrize("layers, dim", SIZES)
def test_sizes_are_inferred_from_the_shapes(layers, dim, grid):
    config = TransformerConfig(layers, llamagen.HEADS[dim], dim, 16384, 1000, grid)
    with torch.device("meta"):
        model = Transformer(config)
        theirs = llamagen.llamagen_transformer_state_dict(model.state_dict())
    assert llamagen.transformer_config(theirs, grid) == config
    assert sum(tensor.numel() for tensor in theirs.values()) == SIZES[layers, dim]
    assert num_parameters(model) == SIZES[layers, dim] + dim


@pytest.mark.parametrize(
    "config, count",
    [
        (TokenizerConfig(), 71_883_403),
        (TokenizerConfig(channels=(128, 256, 256, 512)), 70_109_835),
        (TokenizerConfig(code_dim=256, codebook_size=1024, l2_norm=False), None),
    ],
    ids=["vq-16", "vq-8", "vqgan-f16-1024"],
)
def test_tokenizer_sizes_are_inferred_from_the_shapes(config, count):
    with torch.device("meta"):
        model = VQTokenizer(config)
        theirs = llamagen.llamagen_tokenizer_state_dict(model.state_dict())
    assert llamagen.tokenizer_config(theirs, l2_norm=config.l2_norm) == config
    assert count is None or (num_parameters(model) == count and len(theirs) == (344 if count == 71_883_403 else 300))


def as_taming(theirs):
    """LlamaGen's names -> taming's, written out independently of the module under test."""
    names = {}
    for name in theirs:
        new = name.replace("encoder.conv_blocks.", "encoder.down.").replace(".res.", ".block.")
        for level, up in enumerate((2, 1, 0)):
            new = new.replace(f"decoder.conv_blocks.{level}.", f"decoder.UP.{up}.")
        for middle, theirs_middle in (("0", "block_1"), ("1", "attn_1"), ("2", "block_2")):
            new = new.replace(f".mid.{middle}.", f".mid.{theirs_middle}.")
        names[name] = new.replace("UP", "up")
    return {names[name]: value for name, value in theirs.items() if name != llamagen.USAGE_BUFFER}


def test_a_taming_vqgan_converts(tmp_path):
    config = TokenizerConfig(32, (32, 32, 64), 1, 16, 16, 24, l2_norm=False)
    torch.manual_seed(0)
    tokenizer = VQTokenizer(config).eval()
    taming = as_taming(llamagen.llamagen_tokenizer_state_dict(tokenizer.state_dict()))
    assert "decoder.up.2.upsample.conv.weight" in taming and "decoder.up.0.block.1.conv1.weight" in taming
    taming["loss.discriminator.main.0.weight"] = torch.ones(3)
    torch.save({"state_dict": taming, "epoch": 3}, tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "run", image_size=32, say=lambda line: None)
    loaded = load_tokenizer(tmp_path / "run")
    assert loaded.config == config
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert torch.equal(loaded(images).images, tokenizer(images).images)
    with pytest.raises(MismatchError, match="l2_norm"):
        convert_back(tmp_path / "run", tmp_path / "back.pt")


# --- layouts ----------------------------------------------------------------------------------------------------


LAYOUTS = {
    "model": lambda w: {"model": w, "optimizer": {"state": {}}, "steps": 7},
    "model and args": lambda w: {"model": w, "args": argparse.Namespace(gpt_model="GPT-B", image_size=64, ema=True)},
    "module": lambda w: {"module": w},
    "state_dict": lambda w: {"state_dict": w},
    "bare": lambda w: w,
    "ddp, compiled": lambda w: {"model": {f"module._orig_mod.{name}": value for name, value in w.items()}},
    "with position table": lambda w: {"model": w | {"freqs_cis": torch.zeros(17, 8, 2)}},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_is_read(shared, tmp_path, gpt, layout):
    torch.save(layout(gpt_weights(shared)), tmp_path / "file.pt")
    convert_gpt(tmp_path / "file.pt", tmp_path / "run")
    expected, got = (checkpoint.read_weights(checkpoint.resolve(run), "model") for run in (gpt[0], tmp_path / "run"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def per_block(wrapper):
    def rename(name):
        parts = name.split(".")
        return ".".join([*parts[:2], wrapper, *parts[2:]]) if parts[0] == "layers" else name

    return rename


RENAMED = {
    "compiled blocks": per_block("_orig_mod"), "FSDP blocks": per_block("_fsdp_wrapped_module"),
    "checkpointed blocks": per_block("_checkpoint_wrapped_module"),
    "all of them, in one order": per_block("_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod"),
    "all of them, in another": lambda name: "_orig_mod." + per_block("_orig_mod._checkpoint_wrapped_module")(name),
    "DDP twice": lambda name: f"module.module.{name}", "Hugging Face": lambda name: f"model.{name}",
    "DeepSpeed under Lightning": lambda name: f"_forward_module.model.{name}",
    "a prefix that nobody foresaw": lambda name: f"student.backbone.{name}",
    "EMA of a compiled model": lambda name: f"module._orig_mod.{name}",
    "between prefix and name": lambda name: f"model._orig_mod.gpt.{name}",
}  # fmt: skip


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED.keys())
def test_every_wrappers_prefix_is_taken_off_wherever_it_stands(shared, tmp_path, gpt, rename):
    weights = gpt_weights(shared)
    torch.save({"model": {rename(name): value for name, value in weights.items()}}, tmp_path / "file.pt")
    said = convert_gpt(tmp_path / "file.pt", tmp_path / "run")
    assert_golden(gpt, tmp_path / "run")
    assert "taken off" in said[0]


def assert_golden(gpt, run):
    expected, got = (checkpoint.read_weights(checkpoint.resolve(path), "model") for path in (gpt[0], run))
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def under(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def other(weights):
    return {name: value + 1 for name, value in weights.items()}


LAYOUTS_WITH_MORE = {
    "torch's AveragedModel": (lambda w: under("module.", w) | {"n_averaged": torch.tensor(7)}, ""),
    "lucidrains' EMA": (lambda w: {"ema": under("ema_model.", w) | under("online_model.", other(w)) | {
        "initted": torch.tensor(True), "step": torch.tensor(9)}}, ""),
    "its online model": (lambda w: {"ema": under("ema_model.", other(w)) | under("online_model.", w)}, "online_model"),
    "two networks, named": (lambda w: under("model.", w) | under("ema.", other(w)), "model"),
    "LitEma": (lambda w: under("model.", w)
               | {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
               | {f"model_ema.{name.replace('.', '')}": value for name, value in w.items()}, ""),
    "thop": (lambda w: w | {"total_ops": torch.zeros(1), "layers.0.attention.total_params": torch.zeros(1)}, ""),
    "caches": (lambda w: w | {"layers.0.attention.kv_cache.k_cache": torch.zeros(2, 4, 8, 8)}, ""),
    "numbers beside": (lambda w: {"state_dict": w | {"step": 100}}, ""),
    "an entry in an entry": (lambda w: {"state": 3, "model": {"state_dict": under("module.", w), "epoch": 1}}, ""),
    "another entry": (lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}}, ""),
    "an empty entry": (lambda w: {"model": w, "ema": {}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("build, weights", LAYOUTS_WITH_MORE.values(), ids=LAYOUTS_WITH_MORE.keys())
def test_what_frameworks_keep_beside_the_weights_is_left_out(shared, tmp_path, gpt, build, weights):
    torch.save(build(gpt_weights(shared)), tmp_path / "file.pt")
    convert_gpt(tmp_path / "file.pt", tmp_path / "run", weights=weights)
    assert_golden(gpt, tmp_path / "run")


def write_parts(folder, weights, **changes):
    """Hugging Face's layout: two parts with wrapped names, and their index with `changes` in its map."""
    folder.mkdir()
    names, files = sorted(weights), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for part, file in zip((names[::2], names[1::2]), files, strict=True):
        save_file({f"model._orig_mod.{name}": weights[name] for name in part}, folder / file)
    table = {name: files[i % 2] for i, name in enumerate(names)} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_weights_in_several_parts_are_read_by_their_index(shared, tmp_path, gpt, given):
    convert_gpt(write_parts(tmp_path / "parts", gpt_weights(shared)) / given, tmp_path / "run")
    assert_golden(gpt, tmp_path / "run")


def test_parts_without_each_other_are_refused(shared, tmp_path):
    weights = gpt_weights(shared)
    folder = write_parts(tmp_path / "parts", weights)
    with pytest.raises(UserError, match="00001-of-00002.safetensors is one of several parts; give its folder"):
        convert_gpt(folder / "model-00001-of-00002.safetensors", tmp_path / "run")
    save_file({"model._orig_mod.norm.weight": torch.ones(64)}, folder / "model-00001-of-00002.safetensors")
    save_file({"model._orig_mod.norm.weight": torch.ones(64)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(MismatchError, match="stands in another part as well"):
        convert_gpt(folder, tmp_path / "run")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IntegrityError, match="00002-of-00002.safetensors, which .* names, does not exist"):
        convert_gpt(folder, tmp_path / "run")
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(IntegrityError, match=r"holds \[1\], expected an object"):
        convert_gpt(folder, tmp_path / "run")
    outside = write_parts(tmp_path / "outside", weights, x="../parts/model-00001-of-00002.safetensors")
    with pytest.raises(IntegrityError, match="outside of its folder"):
        convert_gpt(outside, tmp_path / "run")


AMBIGUOUS = {
    "two names that become one": (
        lambda w: w | {"module.norm.weight": w["norm.weight"] + 1}, MismatchError,
        "'norm.weight' and 'module.norm.weight' both name norm.weight"),
    "two networks": (lambda w: under("a.", w) | under("b.", w), UserError, "a and b; choose one, such as --weights a"),
    "int8": (lambda w: w | {"layers.0.attention.wo.SCB": torch.ones(64)}, MismatchError, "before quantisation"),
    "a weight under a counter's name": (lambda w: w | {"step": torch.ones(4)}, MismatchError, "also has step"),
}  # fmt: skip


@pytest.mark.parametrize("build, kind, message", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
@pytest.mark.bad_input("weights and codes of others")
def test_what_can_be_read_in_two_ways_is_refused(shared, tmp_path, build, kind, message):
    torch.save(build(gpt_weights(shared)), tmp_path / "file.pt")
    with pytest.raises(kind, match=message):
        convert_gpt(tmp_path / "file.pt", tmp_path / "run")
    with pytest.raises(UserError, match="weights"):
        torch.save(gpt_weights(shared), tmp_path / "file.pt")
        convert_gpt(tmp_path / "file.pt", tmp_path / "run", weights="ema")


def test_names_of_windows_editors_reach_the_run(shared, tmp_path, monkeypatch):
    from mutor_vision.cli import main

    (tmp_path / "names.txt").write_bytes("\ufeffant\r\nbee \r\ncat\r\n\r\ndog\r\nelk\r\n".encode())
    words = ["convert", shared / "golden" / f"{GPT}.pt", tmp_path / "run", "--heads", "4", "--grid", "4,4"]
    words += ["--class-names", tmp_path / "names.txt"]
    monkeypatch.setattr(sys, "argv", ["mutor", *map(str, words)])
    main()
    token_set = read_json(tmp_path / "run" / "token_set.json")
    assert token_set["class_names"] == ["ant", "bee", "cat", "dog", "elk"]


def test_outputs_are_tried_before_the_file_is_read(shared, tmp_path):
    (tmp_path / "file").touch()
    for run in (
        lambda: convert_gpt(shared / "golden" / f"{GPT}.pt", tmp_path / "file" / "run"),
        lambda: convert_back(tmp_path / "gone", tmp_path / "file" / "x.pt"),
        lambda: import_codes(tmp_path, tmp_path / "file" / "set", tmp_path, ["a"]),
    ):
        with pytest.raises(UserError, match="cannot be written"):
            run()


@pytest.mark.parametrize("name", ["consolidated.pth", "pytorch_model.bin"])
def test_a_folder_with_one_of_the_usual_files_is_read(shared, tmp_path, gpt, name):
    (tmp_path / "folder").mkdir()
    torch.save(gpt_weights(shared), tmp_path / "folder" / name)
    convert_gpt(tmp_path / "folder", tmp_path / "run")
    assert_golden(gpt, tmp_path / "run")


def test_a_folder_of_fsdp_is_read(shared, tmp_path):
    (tmp_path / "fsdp").mkdir()
    torch.save(gpt_weights(shared), tmp_path / "fsdp" / "consolidated.pth")
    assert "bare tensors" in convert_gpt(tmp_path / "fsdp", tmp_path / "run")[0]


def test_two_sets_of_weights_need_a_choice(shared, tmp_path):
    weights = gpt_weights(shared)
    torch.save({"model": weights, "ema": {k: v + 1 for k, v in weights.items()}}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="--weights model"):
        convert_gpt(tmp_path / "file.pt", tmp_path / "run")
    convert_gpt(tmp_path / "file.pt", tmp_path / "run", weights="ema")
    got = checkpoint.read_weights(checkpoint.resolve(tmp_path / "run"), "model")
    assert torch.equal(got["norm.weight"], weights["norm.weight"] + 1)


def test_the_grid_follows_from_the_image_size_and_is_told(shared, tmp_path):
    weights = gpt_weights(shared)
    torch.save({"model": weights, "args": argparse.Namespace(image_size=384, downsample_size="x")}, tmp_path / "a.pt")
    torch.save(weights, tmp_path / "b.pt")
    for name, settings, grid in (("a", {}, (24, 24)), ("b", {}, (16, 16)), ("b", {"image_size": 384}, (24, 24))):
        lines = []
        run = tmp_path / f"{name}{grid[0]}"
        convert(tmp_path / f"{name}.pt", run, heads=4, say=lines.append, **settings)
        assert checkpoint.read_config(run, "transformer", TrainConfig).model.grid == grid
        assert any("assumed" in line for line in lines) == (name == "b" and not settings)


def test_a_converted_run_with_a_tokenizer_samples_at_384_and_resizes(
    tmp_path, monkeypatch, tiny_tokenizer_path, shared, command
):
    """A 6x6 model on a tokenizer made for 16 pixels: decoded at 24, resized to 16 as LlamaGen's protocol does."""
    from mutor_vision.runtime import start
    from mutor_vision.sampling.load import load
    from mutor_vision.sampling.stream import sample_images

    config = TransformerConfig(1, 2, 32, 32, 5, (6, 6))
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.head.weight)
    torch.save(llamagen.llamagen_transformer_state_dict(model.state_dict()), tmp_path / "gpt.pt")
    convert(tmp_path / "gpt.pt", tmp_path / "run", tokenizer=tiny_tokenizer_path, heads=2, image_size=24,
            class_names=["ant", "bee", "cat", "dog", "eel"], say=lambda line: None)  # fmt: skip
    loaded = load(tmp_path / "run", start("float32", "cpu"))
    labels, settings = torch.tensor([0, 3]), SampleSettings(cfg_scale=1.5)
    big = sample_images(loaded, labels, np.arange(2), settings, 0)
    small = sample_images(dataclasses.replace(loaded, resize=16), labels, np.arange(2), settings, 0)
    assert big.shape == (2, 3, 24, 24) and small.shape == (2, 3, 16, 16)
    codes = generate(loaded.transformer, labels, settings, seed=0, indices=np.arange(2))
    vq = loaded.tokenizer
    pixels = vq.decoder(vq.post_quant_conv(vq.quantizer.lookup(codes)))
    pixels = F.interpolate(pixels, size=(16, 16), mode="bicubic")
    assert torch.equal(small, torch.clamp(127.5 * pixels + 128, 0, 255).to(torch.uint8))
    words = ("--num-images", 4, "--resize", 16, "--out", tmp_path / "set.npz", "--device", "cpu")
    result = command("mutor", "sample", tmp_path / "run", *words)
    assert result.code == 0, result.err
    assert np.load(tmp_path / "set.npz")["arr_0"].shape == (4, 16, 16, 3)
    assert read_json(tmp_path / "set.npz.json")["resize"] == 16


def test_one_command_makes_a_run_that_samples(shared, tmp_path):
    from mutor_vision.data.images import to_uint8
    from mutor_vision.runtime import start
    from mutor_vision.sampling.load import load
    from mutor_vision.sampling.stream import sample_images

    convert_gpt(shared / "golden" / f"{GPT}.pt", tmp_path / "run", tokenizer=shared / "golden" / f"{VQ}.pt")
    assert sorted(os.listdir(tmp_path / "run")) == [
        "checkpoints", "config.json", "status.json", "token_set.json", "tokenizer"]  # fmt: skip
    loaded = load(tmp_path / "run", start("float32", "cpu"))
    assert loaded.class_names == ["0", "1", "2", "3", "4"]
    made = sample_images(loaded, torch.tensor([0, 2]), np.arange(2), SampleSettings(cfg_scale=2.0, temperature=0), 0)
    codes = np.load(shared / "golden" / f"{GPT}_io.npz")["greedy_cfg2"].reshape(2, 4, 4)
    assert torch.equal(made, to_uint8(loaded.tokenizer.decode(torch.from_numpy(codes).long())))


# --- refusals ---------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def resnet():
    return {"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.ones(64), "fc.weight": torch.zeros(10, 512)}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


BAD_FILES = {
    "pickle that runs a command": (lambda w, c: {"model": w, "args": Evil(c)}, IntegrityError, "asks for posix.system"),
    "the same in a Namespace": (
        lambda w, c: {"model": w, "args": argparse.Namespace(x=Evil(c))}, IntegrityError, "asks for posix.system"),
    "a whole module": (lambda w, c: torch.nn.Linear(2, 2), IntegrityError, "torch.nn.modules.linear.Linear"),
    "NaN": (lambda w, c: w | {"norm.weight": w["norm.weight"] * float("nan")}, IntegrityError, "'norm.weight' holds"),
    "wrong shape": (
        lambda w, c: w | {"layers.1.attention.wo.weight": torch.zeros(64, 32)}, MismatchError,
        r"'layers.1.attention.wo.weight' has shape \(64, 32\), expected \(64, 64\)"),
    "missing key": (lambda w, c: {k: v for k, v in w.items() if k != "norm.weight"}, MismatchError, "lacks norm.w"),
    "missing layer": (
        lambda w, c: {k: v for k, v in w.items() if "layers.0" not in k}, MismatchError, "lacks layers.0.attention.wo"),
    "unexpected key": (lambda w, c: w | {"gate.weight": torch.ones(2)}, MismatchError, "also has gate.weight"),
    "ResNet": (lambda w, c: resnet(), MismatchError, "no LlamaGen transformer.*bn1.weight, conv1.weight"),
    "text model": (lambda w, c: w | {"cls_embedding.cap_proj.fc1.weight": torch.ones(2)}, MismatchError, "text-cond"),
    "whole numbers": (lambda w, c: w | {"norm.weight": torch.ones(64).long()}, MismatchError, "int64"),
    "stride 0": (lambda w, c: w | {"x": torch.ones(1).expand(10**10)}, IntegrityError, "claims 10,000,000,000"),
    "sparse": (lambda w, c: w | {"x": torch.eye(3).to_sparse_csr()}, IntegrityError, "is refused"),
    "no weights": (lambda w, c: {"epoch": 3}, MismatchError, "holds no weights: its entries are epoch"),
    "a list": (lambda w, c: [1, 2], MismatchError, "holds a list"),
    "not a tensor": (lambda w, c: {"model": w | {"a": 3}}, MismatchError, "'a' is a int"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("build, kind, message", BAD_FILES.values(), ids=BAD_FILES.keys())
@pytest.mark.bad_input("weights and codes of others")
def test_bad_contents_are_refused_and_nothing_is_run_or_written(shared, tmp_path, monkeypatch, build, kind, message):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # asks every torch.load to run what it reads
    torch.save(build(gpt_weights(shared), tmp_path / "canary"), tmp_path / "file.pt")
    with pytest.raises(kind, match=message):
        convert_gpt(tmp_path / "file.pt", tmp_path / "run")
    assert os.listdir(tmp_path) == ["file.pt"]


BAD_BYTES = {
    "empty": (lambda path: path.write_bytes(b""), "0 bytes"),
    "web page": (lambda path: path.write_bytes(b"<!DOCTYPE html><p>quota exceeded"), "web page"),
    "git-lfs pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "truncated": (lambda path: damage(path, "truncated"), "truncated"),
    "one flipped bit": (lambda path: damage(path, "flipped"), "checksum"),
    "legacy format": (
        lambda path: torch.save({"model": {}}, path, _use_new_zipfile_serialization=False), "never opened"),
    "TorchScript": (lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path), "TorchScript"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("spoil, message", BAD_BYTES.values(), ids=BAD_BYTES.keys())
@pytest.mark.bad_input("weights and codes of others")
def test_bad_bytes_are_refused_and_nothing_is_written(shared, tmp_path, spoil, message):
    path = tmp_path / "file.pt"
    torch.save({"model": gpt_weights(shared)}, path)
    spoil(path)
    with pytest.raises(IntegrityError, match=message):
        convert_gpt(path, tmp_path / "run")
    assert os.listdir(tmp_path) == ["file.pt"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_is_never_opened(tmp_path, protocol):
    import pickle

    for name in ("file.pt", "file.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "canary"), protocol=protocol))
        with pytest.raises(IntegrityError):
            foreign_checkpoint.read(tmp_path / name)
    assert not (tmp_path / "canary").exists()


def test_the_command_prints_one_line_and_its_exit_code(shared, tmp_path, command):
    torch.save({"model": gpt_weights(shared), "args": Evil(tmp_path / "canary")}, tmp_path / "file.pt")
    result = command("mutor", "convert", tmp_path / "file.pt", tmp_path / "run")
    assert result.code == 4 and result.err.count("\n") == 1 and "posix.system" in result.err
    assert os.listdir(tmp_path) == ["file.pt"]


def test_settings_that_cannot_work_are_refused(shared, tmp_path, tiny_tokenizer_path):
    source = shared / "golden" / f"{GPT}.pt"
    for settings, kind, message in (
        (dict(heads=0), UserError, "give --heads"),
        (dict(heads=4, image_size=250), UserError, "no multiple of 16"),
        (dict(heads=4, class_names=["a"]), MismatchError, "1 class names for a model of 5"),
        (dict(heads=4, tokenizer=tiny_tokenizer_path), MismatchError, "64 codes, the tokenizer 32"),
        (dict(heads=4, tokenizer=source), MismatchError, "is a transformer"),
        (dict(heads=3), UserError, "model.dim 64"),
    ):
        with pytest.raises(kind, match=message):
            convert(source, tmp_path / "run", say=lambda line: None, **settings)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "there", heads=4)
    assert os.listdir(tmp_path) == ["there"]


# --- codes ------------------------------------------------------------------------------------------------------


def write_codes(path, num_images=7, views=10, seed=0):
    generator = np.random.default_rng(seed)
    codes = generator.integers(32, size=(num_images, 1, views, 16))
    for folder in ("imagenet16_codes", "imagenet16_labels"):
        (path / folder).mkdir(parents=True)
    for i in range(num_images):
        np.save(path / "imagenet16_codes" / f"{i}.npy", codes[i])
        np.save(path / "imagenet16_labels" / f"{i}.npy", np.array([i % 5]))
    return codes[:, 0]


def test_codes_become_a_token_set(tmp_path, tiny_tokenizer_path, monkeypatch):
    import mutor_vision.interop.llamagen_codes

    monkeypatch.setattr(mutor_vision.interop.llamagen_codes, "SHARD_SIZE", 3)
    first, second = write_codes(tmp_path / "ten"), write_codes(tmp_path / "ten_105", seed=1)
    names = ["ant", "bee", "cat", "dog", "eel"]
    tokens = import_codes(tmp_path / "ten", tmp_path / "set", tiny_tokenizer_path, names, tmp_path / "ten_105")
    assert tokens.num_images == 7 and tokens.num_views == 20 and tokens.grid == (4, 4) and tokens.image_size == 16
    assert tokens.views[:1] + tokens.views[-1:] == ["top-left", "center-flip@1.05"]
    assert np.array_equal(tokens.codes().numpy(), np.concatenate([first, second], axis=1))
    assert tokens.labels.tolist() == [0, 1, 2, 3, 4, 0, 1]

    # Interrupted after the first shard, the rest is made and the first is not read again.
    (tmp_path / "set" / "manifest.json").unlink()
    for name in ("codes-00002.npy", "labels-00001.npy"):
        (tmp_path / "set" / name).unlink()
    np.save(tmp_path / "ten" / "imagenet16_codes" / "1.npy", np.zeros((1, 10, 16), dtype=np.int64))
    again = import_codes(tmp_path / "ten", tmp_path / "set", tiny_tokenizer_path, names, tmp_path / "ten_105")
    assert again.identity == tokens.identity
    with pytest.raises(MismatchError, match="another views"):
        import_codes(tmp_path / "ten", tmp_path / "set", tiny_tokenizer_path, names)


BAD_CODES = {
    "a gap": (lambda p: (p / "imagenet16_codes" / "3.npy").unlink(), "lacks 3.npy"),
    "fewer labels": (lambda p: (p / "imagenet16_labels" / "6.npy").unlink(), "equal numbers"),
    "truncated": (lambda p: damage(p / "imagenet16_codes" / "2.npy", "truncated"), "2.npy is not a complete"),
    "a pickle": (lambda p: np.save(p / "imagenet16_codes" / "2.npy", np.array([{}]), allow_pickle=True), "2.npy is"),
    "another shape": (
        lambda p: np.save(p / "imagenet16_codes" / "2.npy", np.zeros((1, 2, 16), dtype=int)), "2.npy holds int64"),
    "a code too large": (
        lambda p: np.save(p / "imagenet16_codes" / "2.npy", np.full((1, 10, 16), 32)), "2.npy holds 32 to 32"),
    "a label too large": (lambda p: np.save(p / "imagenet16_labels" / "2.npy", np.array([5])), "2.npy holds 5 to 5"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, message", BAD_CODES.values(), ids=BAD_CODES.keys())
@pytest.mark.bad_input("weights and codes of others")
def test_bad_codes_are_named_and_leave_no_token_set(tmp_path, tiny_tokenizer_path, spoil, message):
    write_codes(tmp_path / "ten")
    spoil(tmp_path / "ten")
    with pytest.raises(DataError, match=message):
        import_codes(tmp_path / "ten", tmp_path / "set", tiny_tokenizer_path, list("abcde"))
    assert not (tmp_path / "set" / "manifest.json").exists()
