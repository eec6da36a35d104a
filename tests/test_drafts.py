import pytest
import torch
from drafts import head_drafts, register_drafts

from mutor_vision.config import ParallelHeadsConfig, RegisterConfig, TrainConfig
from mutor_vision.objectives.heads import ParallelHeads


def images(config, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(32, (count, *config.grid), generator=generator), torch.tensor([1, 4])


def distribution(model, tokens, labels, positions, scale):
    """Of the last input, from a plain causal call; the register's token id is 32."""
    streams = []
    for label in (labels, torch.full_like(labels, model.null_class)):
        with torch.no_grad():
            streams.append(model(tokens, label, torch.tensor([positions]))[:, -1])
    return (streams[1] + scale * (streams[0] - streams[1])).softmax(-1)


@pytest.mark.parametrize("edge", ["wrap", "ignore"])
@pytest.mark.parametrize("pair", [(1, 2), (2, 1), (2, 3)], ids=str)
def test_acceptance_equals_one_call_a_slot(random_model, pair, edge):
    """The register as what it is: one more input after the prefix, in a causal model that has seen nothing else."""
    codes, labels = images(random_model.config)
    tokens, d = codes.flatten(1), (pair[0] - 1) * 4 + pair[1] - 1
    found = register_drafts(random_model, codes, labels, pair, RegisterConfig("2d", 16, edge=edge), (1.0, 2.0))
    column = lambda t: (t - 1) % 4 if t else -1  # noqa: E731
    slots = [t for t in range(16) if t + d <= 16 and (edge == "wrap" or 0 <= column(t) + pair[1] - 1 < 4)]
    assert found.acceptance.shape == (2, 2, len(slots))
    register = torch.full((2, 1), 32)
    for i, t in enumerate(slots):
        for s, scale in enumerate((1.0, 2.0)):
            q = distribution(random_model, torch.cat([tokens[:, :t], register], 1), labels, [*range(t + 1), t + d - 1],
                             scale)  # fmt: skip
            p = distribution(random_model, tokens[:, : t + d - 1], labels, list(range(t + d)), scale)
            assert torch.allclose(found.acceptance[s, :, i], torch.minimum(p, q).sum(-1), atol=1e-5)
            if scale == 1:
                truth = tokens[:, t + d - 1, None]
                assert torch.allclose(found.loss[:, i], -q.gather(1, truth)[:, 0].log(), atol=1e-4)
                assert torch.allclose(found.next_token_loss[:, i], -p.gather(1, truth)[:, 0].log(), atol=1e-4)


def test_acceptance_of_heads_and_of_a_draft_that_is_the_target(random_model):
    codes, labels = images(random_model.config)
    tokens = codes.flatten(1)
    own = ParallelHeadsConfig(3)
    heads = ParallelHeads(own, TrainConfig(model=random_model.config, parallel_heads=own))
    with torch.no_grad():
        found = head_drafts(random_model, heads, codes, labels, 3)
        hidden = random_model.hidden(tokens[:, :-1], labels, torch.arange(16)[None])
        q = random_model.logits(heads.ahead(hidden, random_model.rope)[1]).softmax(-1)
        p = random_model.logits(hidden).softmax(-1)
    for t in range(14):  # slot t and x_(t+3)
        assert torch.allclose(found.acceptance[0, :, t], torch.minimum(p[:, t + 2], q[:, t]).sum(-1), atol=1e-5)
    assert (found.acceptance < 0.999).any() and found.acceptance.shape == (1, 2, 14)

    class Same:  # a "head" that knows the future: the draft is the target
        def ahead(self, hidden, rope):
            return [hidden[:, 1:]]

    same = head_drafts(random_model, Same(), codes, labels, 2, (1.0, 3.0))
    assert torch.allclose(same.acceptance, torch.ones_like(same.acceptance), atol=1e-5)
    assert torch.equal(same.loss, same.next_token_loss) and torch.isfinite(same.loss).all()
