"""How sure the model was of each token of an image."""

import torch
from torch import Tensor

from mutor_vision.model.transformer import Transformer
from mutor_vision.objectives.sequence import next_token_sequence
from mutor_vision.sampling.decode import both_streams, guided, num_guided_tokens, streams
from mutor_vision.sampling.draw import SampleSettings, filtered_probabilities, guidance_scales


@torch.no_grad()
def token_entropies(model: Transformer, codes: Tensor, labels: Tensor, settings: SampleSettings) -> Tensor:
    """codes (B, h, w) int64, labels (B,) -> (B, h, w) float32: the entropy in nats of the distribution that each token
    is drawn from, after guidance and filtering. 0 = it was certain, ln V = anything."""
    scales = guidance_scales(settings, codes[0].numel())
    num_guided = num_guided_tokens(scales)
    sequence = next_token_sequence(codes)
    tokens = both_streams(sequence.tokens) if num_guided else sequence.tokens
    logits = model(tokens, streams(model, labels, num_guided), sequence.positions, sequence.pattern).float()
    if num_guided:
        logits = guided(logits, torch.tensor(scales, device=logits.device)[None, :, None])
    probabilities = filtered_probabilities(logits.flatten(0, 1), settings)
    return torch.special.entr(probabilities).sum(-1).view(codes.shape)
