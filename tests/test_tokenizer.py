import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from mutor_vision.config import TokenizerConfig, TokenizerTrainConfig
from mutor_vision.data.images import to_uint8
from mutor_vision.errors import IntegrityError, MismatchError, UserError
from mutor_vision.interop.llamagen import tokenizer_config, tokenizer_state_dict
from mutor_vision.presets import TOKENIZERS
from mutor_vision.storage import checkpoint
from mutor_vision.tokenizer import losses
from mutor_vision.tokenizer.model import VQTokenizer, load_tokenizer, tokenizer_identity
from mutor_vision.tokenizer.perceptual import TimmDistance
from mutor_vision.tokenizer.quantizer import VectorQuantizer, assignment_entropy, nearest, revive_dead_codes, usage
from mutor_vision.tokenizer.reconstruction import psnr, side_by_side, ssim

CONFIG = TokenizerConfig(
    image_size=16, channels=(8, 8, 16), layers_per_block=1, latent_channels=8, code_dim=4, codebook_size=32,
    norm_groups=4,
)  # fmt: skip


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return VQTokenizer(CONFIG).eval()


def images_like(batch=2, height=16, width=16, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The model.


def test_shapes_ranges_and_types(tokenizer):
    images = images_like(height=16, width=24)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 4, 6) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 32
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1 and not decoded.requires_grad


def test_training_sees_the_reconstruction_that_decoding_gives(tokenizer):
    images = images_like()
    reconstruction = tokenizer(images)
    assert torch.equal(reconstruction.quantized.codes, tokenizer.encode(images))
    difference = reconstruction.images.clamp(-1, 1) - tokenizer.decode(tokenizer.encode(images))
    assert difference.abs().max() < 1e-5


def test_sides_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(UserError, match="multiples of 4"):
        tokenizer.encode(images_like(height=18))


@pytest.mark.parametrize("change", [{"channels": (8, 10)}, {"image_size": 18}, {"codebook_size": 0}])
@pytest.mark.bad_input("settings")
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(UserError):
        VQTokenizer(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("name, count", [("vq-16", 71_883_403), ("vq-8", 70_109_835)])
def test_vq16_and_vq8_have_llamagens_parameter_counts(name, count):
    with torch.device("meta"):
        model = VQTokenizer(TOKENIZERS[name].model)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_llamagens_tokenizer_gives_its_codes_latents_and_images(shared):
    state = torch.load(shared / "golden" / "llamagen_vq_tiny.pt", weights_only=True)["model"]
    expected = {k: torch.from_numpy(v) for k, v in np.load(shared / "golden" / "llamagen_vq_tiny_io.npz").items()}
    config = tokenizer_config(state, image_size=16)
    assert (config.channels, config.layers_per_block, config.codebook_size) == ((32, 64), 2, 64)
    model = VQTokenizer(config)
    checkpoint.load_strictly(model, tokenizer_state_dict(state), "llamagen_vq_tiny.pt")
    codes = model.encode(expected["image"])
    assert torch.equal(codes, expected["codes"])
    assert (model.quantizer.lookup(codes) - expected["quant"]).abs().max() < 1e-5
    assert (model.decode(codes) - expected["reconstruction"].clamp(-1, 1)).abs().max() < 1e-4


def test_batches_of_1_and_32_agree(tokenizer):
    images = images_like(batch=32, height=32, width=32)
    together = tokenizer.encode(images)
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert (together == alone).double().mean() >= 0.9999


def test_identity_is_of_the_weights(tokenizer, tiny_tokenizer_path, tmp_path):
    checkpoint.export(tiny_tokenizer_path, tmp_path / "copy")
    loaded = load_tokenizer(tiny_tokenizer_path)
    identities = [tokenizer_identity(x) for x in (tiny_tokenizer_path, tmp_path / "copy", loaded)]
    assert len(set(identities)) == 1 != len({*identities, tokenizer_identity(tokenizer)})
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        loaded.quantizer.codebook[0, 0] += 1e-7
    assert tokenizer_identity(loaded) != identities[0]


def test_ema_weights_are_the_best_and_each_can_be_named(tokenizer, tmp_path):
    other = VQTokenizer(CONFIG)
    weights = {"model": tokenizer.state_dict(), "ema": other.state_dict()}
    checkpoint.save(tmp_path, 3, "tokenizer", TokenizerTrainConfig(model=CONFIG), weights, {}, keep=2)
    assert tokenizer_identity(load_tokenizer(tmp_path)) == tokenizer_identity(other) == tokenizer_identity(tmp_path)
    model = load_tokenizer(tmp_path / "checkpoints" / "step-0000003" / "model.safetensors", weights="model")
    assert tokenizer_identity(model) == tokenizer_identity(tokenizer)
    with pytest.raises(UserError, match="no 'other' weights"):
        load_tokenizer(tmp_path, weights="other")


# The quantizer.


def vector_quantizer(codebook_size, code_dim, l2_norm=True):
    return VectorQuantizer(TokenizerConfig(codebook_size=codebook_size, code_dim=code_dim, l2_norm=l2_norm))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_the_nearest_code_is_chosen(l2_norm):
    torch.manual_seed(0)
    quantizer = vector_quantizer(50, 4, l2_norm)
    quantizer.codebook.data.normal_()
    latents = torch.randn(2, 4, 5, 3)
    quantized = quantizer(latents)
    flat, codebook = latents.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.codebook.detach()
    if l2_norm:
        flat, codebook = flat / flat.norm(dim=1, keepdim=True), codebook / codebook.norm(dim=1, keepdim=True)
    assert torch.equal(quantized.codes.flatten(), torch.cdist(flat, codebook).argmin(1))
    assert torch.allclose(quantized.latents, quantizer.lookup(quantized.codes), atol=1e-6)
    assert torch.allclose(quantized.codebook_loss, mse_loss(flat, codebook[quantized.codes.flatten()]))
    assert torch.equal(quantized.codebook_loss, quantized.commitment_loss)


def test_slices_of_the_search_change_nothing(monkeypatch):
    latents, codebook = torch.randn(100, 8), torch.randn(64, 8)
    whole = nearest(latents, codebook)
    monkeypatch.setattr("mutor_vision.tokenizer.quantizer._CHUNK", 64 * 7)
    assert torch.equal(nearest(latents, codebook), whole)


def test_the_gradient_goes_straight_through_and_each_loss_moves_its_side():
    torch.manual_seed(0)
    quantizer = vector_quantizer(16, 4, l2_norm=False)
    latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    weights = torch.randn(1, 4, 2, 2)
    (quantizer(latents).latents * weights).sum().backward()
    assert torch.equal(latents.grad, weights) and quantizer.codebook.grad is None
    latents.grad = None
    quantizer(latents).codebook_loss.backward()
    assert latents.grad is None and quantizer.codebook.grad.abs().sum() > 0
    quantizer.codebook.grad = None
    quantizer(latents).commitment_loss.backward()
    assert latents.grad.abs().sum() > 0 and quantizer.codebook.grad is None


def test_without_rounding_latents_pass_as_they_are_and_codes_still_follow():
    torch.manual_seed(0)
    quantizer, latents = vector_quantizer(16, 4), torch.randn(3, 4, 2, 2, requires_grad=True)
    plain, rounded = quantizer(latents, rounding=False), quantizer(latents)
    assert torch.equal(plain.latents, plain.encoded) and not torch.equal(plain.latents, rounded.latents)
    assert torch.equal(plain.codes, rounded.codes) and plain.codebook_loss == rounded.codebook_loss
    assert plain.commitment_loss == 0


def test_distances_are_float32_under_autocast():
    torch.manual_seed(0)
    quantizer = vector_quantizer(4096, 8)
    latents = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = quantizer(latents)
    assert under.latents.dtype == torch.float32
    assert torch.equal(under.codes, quantizer(latents).codes)


def test_entropy_is_low_when_latents_are_sure_and_all_codes_are_used():
    codebook = torch.eye(8)
    spread, same, unsure = codebook, codebook[:1].expand(8, -1), torch.full((8, 8), 8**-0.5)
    assert assignment_entropy(spread, codebook, 0.01).item() == pytest.approx(-math.log(8), abs=1e-3)
    assert assignment_entropy(same, codebook, 0.01).item() == pytest.approx(0, abs=1e-3)
    assert assignment_entropy(unsure, codebook, 0.01).item() == pytest.approx(0, abs=1e-3)


def test_usage_and_perplexity():
    assert usage(torch.tensor([5, 5, 0, 0])) == (0.5, pytest.approx(2.0))
    assert usage(torch.full((8,), 3)) == (1.0, pytest.approx(8.0))
    assert usage(torch.zeros(4, dtype=torch.int64)) == (0.0, 1.0)


def test_a_code_idle_for_the_limit_moves_onto_a_latent_and_others_stay():
    codebook, candidates = torch.zeros(4, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    idle, draws = torch.zeros(4, dtype=torch.int64), torch.tensor([0.0, 0.1, 0.6, 0.9])
    counts = torch.tensor([1, 0, 0, 1])
    assert revive_dead_codes(codebook, idle, counts, candidates, 2, draws) == 0
    assert idle.tolist() == [0, 1, 1, 0] and not codebook.any()
    assert revive_dead_codes(codebook, idle, torch.tensor([0, 1, 0, 1]), candidates, 2, draws) == 1
    assert codebook.tolist() == [[0, 0], [0, 0], [3, 4], [0, 0]] and idle.tolist() == [1, 0, 0, 0]


# Losses and scores.


def test_the_loss_is_the_weighted_sum_of_its_terms(tokenizer):
    images = images_like()
    reconstruction = tokenizer(images, losses.ENTROPY_TEMPERATURE)
    config = TokenizerTrainConfig(
        model=dataclasses.replace(CONFIG, image_size=32),
        l1_weight=2.0,
        l2_weight=3.0,
        entropy_weight=0.1,
        adversarial_weight=0.5,
    )
    terms = losses.generator_losses(images, reconstruction, config, fake_scores=torch.tensor([1.0, 3.0]))
    weights = {"l1": 2, "l2": 3, "codebook": 1, "commitment": 0.25, "entropy": 0.1, "adversarial": 0.5}
    assert terms["adversarial"] == -2
    assert torch.allclose(terms["loss"], sum(weight * terms[name] for name, weight in weights.items()))


def test_the_discriminator_is_patchgan_with_a_hinge():
    discriminator = losses.PatchDiscriminator()
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert discriminator(images_like(height=64, width=64)).shape == (2, 1, 6, 6)
    assert losses.discriminator_loss(torch.tensor([2.0]), torch.tensor([-1.0])) == 0
    assert losses.discriminator_loss(torch.tensor([0.0]), torch.tensor([0.5])) == 1.25


@pytest.fixture(scope="module")
def lpips_weights(tmp_path_factory):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in vgg16(weights=None).state_dict().items() if name.startswith("features")}
    tensors = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    channels = (64, 128, 256, 512, 512)
    tensors |= {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(channels)}
    tensors["classifier.6.bias"] = torch.zeros(1000)  # ignored
    path = tmp_path_factory.mktemp("lpips") / "lpips.pt"
    torch.save(tensors, path)
    return path


def test_lpips_measures_a_frozen_distance(lpips_weights):
    lpips = losses.LPIPS(lpips_weights)
    images, others = images_like(height=32, width=32), images_like(height=32, width=32, seed=1).requires_grad_()
    distance = lpips(images, others)
    assert distance.shape == (2,) and (distance > 0).all() and not lpips(images, images).any()
    assert torch.allclose(distance, lpips(others, images), rtol=1e-4)
    distance.sum().backward()
    assert others.grad.abs().sum() > 0 and not any(p.requires_grad for p in lpips.parameters())


def test_lpips_weights_that_are_not_are_named(lpips_weights, tmp_path):
    with pytest.raises(UserError, match="no file"):
        losses.LPIPS(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(IntegrityError, match="text.pt"):
        losses.LPIPS(tmp_path / "text.pt")
    tensors = torch.load(lpips_weights, weights_only=True)
    del tensors["lin3.model.1.weight"]
    torch.save(tensors, tmp_path / "part.pt")
    with pytest.raises(MismatchError, match="lacks 'lin3.model.1.weight'"):
        losses.LPIPS(tmp_path / "part.pt")


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory):
    """A small network with random weights, whose normalisation has something to do."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained=False)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_the_perceptual_distance_is_that_of_timms_own_features(timm_weights):
    """Against timm's feature extractor, a second way to the same layers, with the distance written out."""
    import timm
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    images, others = images_like(height=32, width=32), images_like(height=32, width=32, seed=1)
    network = timm.create_model("test_efficientnet", pretrained=False, features_only=True, out_indices=(1, 3)).eval()
    state = {name: value for name, value in load_file(timm_weights).items() if name in network.state_dict()}
    network.load_state_dict(state)
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    both = resize(torch.cat([images, others]) / 2 + 0.5, [48, 48], InterpolationMode.BICUBIC, antialias=True)
    expected = torch.zeros(2)
    for features in network((both - mean) / std):
        unit = features / features.norm(dim=1, keepdim=True)
        expected += (unit[:2] - unit[2:]).square().sum(1).flatten(1).mean(1)
    distance = TimmDistance("timm:test_efficientnet@48", str(timm_weights), (1, 3))
    assert torch.allclose(distance(images, others), expected, rtol=1e-4)
    as_they_are = TimmDistance("timm:test_efficientnet", str(timm_weights), (1, 3))
    assert not torch.allclose(as_they_are(images, others), expected)


def test_the_perceptual_distance_trains_the_reconstruction_alone(timm_weights):
    distance = TimmDistance("timm:test_efficientnet", str(timm_weights))
    images, others = images_like(height=64, width=64).requires_grad_(), images_like(height=64, width=64, seed=1)
    others.requires_grad_()
    assert not distance(images, images).any()
    distance(images, others).sum().backward()
    assert images.grad is None and others.grad.abs().sum() > 0
    distance.train()  # as a module within one that trains
    assert not any(p.requires_grad for p in distance.parameters()) and not distance.network.training


def test_perceptual_networks_that_do_not_serve_are_named(timm_weights):
    with pytest.raises(UserError, match="perceptual_stages has 9, expected 0 to 4"):
        TimmDistance("timm:test_efficientnet", str(timm_weights), (0, 9))
    with pytest.raises(UserError, match="did you mean"):
        TimmDistance("timm:test_eficientnet", str(timm_weights))
    with pytest.raises(UserError, match="needs perceptual_network=timm:NAME"):
        TokenizerTrainConfig(perceptual_weight=1.0)
    with pytest.raises(UserError, match="expected timm:NAME"):
        TokenizerTrainConfig(perceptual_weight=1.0, perceptual_network="vgg16")


def test_psnr_and_ssim_of_known_images():
    black, grey = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 51, dtype=torch.uint8)
    assert psnr(black, grey).item() == pytest.approx(-20 * math.log10(0.2))
    assert psnr(grey, grey).item() == 100 and ssim(grey, grey).item() == pytest.approx(1)
    # Two constant images: the structure term is 1, the luminance term is what remains.
    assert ssim(black, grey).item() == pytest.approx(0.01**2 / (0.2**2 + 0.01**2))
    noise = to_uint8(images_like(height=32, width=32))
    assert ssim(noise, noise.flip(-1)).max() < 0.2


def test_the_grid_pairs_each_image_with_its_reconstruction():
    originals = torch.zeros(10, 3, 16, 16, dtype=torch.uint8)
    picture = np.asarray(side_by_side(originals, originals + 100, columns=8))
    middle = picture[:, picture.shape[1] - 20 - 7 * 132]  # a column of pixels through the first image of each row
    shades = [int(middle[66 + 132 * row].max()) for row in range(4)]
    assert shades == [0, 100, 0, 100]
    named = np.asarray(side_by_side(originals + 200, originals + 200, names=[f"class {i}" for i in range(10)]))
    pitch = (named.shape[0] - 4) // 4
    words = [(named[4 + row * pitch + 130 :][: pitch - 130, -8 * 132 :] < 60).sum() for row in range(4)]
    assert words[0] > words[2] > 0 == words[1] == words[3], "eight names under the first row, two under the third"
