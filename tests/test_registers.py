import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from mutor_vision.config import RegisterConfig
from mutor_vision.errors import UserError
from mutor_vision.objectives.registers import add_registers, crosses_edge, offset_pairs, place_registers, raster_offset
from mutor_vision.objectives.sequence import NO_TARGET, next_token_sequence

INDEX = np.arange(3)


def sequence_of(config, grid=(4, 4), batch=3, seed=0, **settings):
    # Every token is its own 1-based raster index, so a target says where it came from.
    codes = torch.arange(1, grid[0] * grid[1] + 1).reshape(1, *grid).expand(batch, -1, -1)
    return add_registers(next_token_sequence(codes), codes, config, register_token=999, seed=seed,
                         sample_index=np.arange(batch), **settings)  # fmt: skip


def test_every_row_of_the_reference_vectors(shared):
    rows = json.loads((shared / "golden" / "registers.json").read_text())
    assert len(rows) == 620
    for row in rows:
        height, width = row["grid"]
        pair = np.array([row["d_h"], row["d_w"]])
        assert raster_offset(pair, width) == row["offset"]
        # Force this one pair, with a register at every slot, and read the register of this slot.
        config = RegisterConfig("2d", height * width, max_offset=max(row["max_offset"], *pair))
        seed = next(s for s in range(10_000) if (_drawn_pair(config, (height, width), s) == pair).all())
        sequence = sequence_of(config, (height, width), batch=1, seed=seed)
        register = height * width + row["slot"]
        assert sequence.pattern.last_visible[0, row["slot"]] == row["slot"]
        if row["target_token"] is None:
            assert sequence.targets[0, register] == NO_TARGET
        else:
            assert bool(crosses_edge(np.array(row["slot"]), pair, width)) == row["wraps"]
            assert sequence.targets[0, register] == row["target_token"]
            assert sequence.positions[0, register] == row["position_slot"]


def _drawn_pair(config, grid, seed):
    return place_registers(config, grid, seed=seed, sample_index=np.zeros(1, dtype=int))[1][0, 0]


def test_slots_of_the_reference_vectors_without_a_target_get_none():
    for d in range(1, 5):
        config = RegisterConfig("1d", 9, max_offset=4)
        seed = next(s for s in range(1000) if raster_offset(_drawn_pair(config, (3, 3), s), 3) == d)
        targets = sequence_of(config, (3, 3), batch=1, seed=seed).targets[0, 9:]
        assert targets.tolist() == [t + d if t + d <= 9 else NO_TARGET for t in range(9)]


def test_no_registers_is_plain_next_token_prediction():
    sequence = next_token_sequence(torch.arange(1, 17).reshape(1, 4, 4))
    assert sequence.pattern is None
    assert sequence.tokens[0].tolist() == list(range(1, 16))
    assert sequence.targets[0].tolist() == list(range(1, 17))
    assert sequence.positions[0].tolist() == list(range(16))


def test_every_register_obeys_its_definition(registers):
    """Target x_(t+d) at the position of slot t+d-1 with one of the allowed offsets, for every kind of register."""
    sequence = sequence_of(registers, seed=1)
    allowed = set(raster_offset(offset_pairs(registers), 4).tolist())
    for b in range(3):
        slots = sequence.pattern.last_visible[b].tolist()
        assert slots == sorted(set(slots)), "without replacement"
        for slot, target, position in zip(
            slots, sequence.targets[b, 16:].tolist(), sequence.positions[b, 16:].tolist(), strict=True
        ):
            if target != NO_TARGET:
                assert target - slot in allowed
                assert position == target - 1
    assert (sequence.tokens[:, 15:] == 999).all()
    assert sequence.tokens.shape[1] == 15 + registers.count


def test_offsets_are_uniform_over_the_fifteen_neighbours():
    config = RegisterConfig("2d", 1)
    _, pairs = place_registers(config, (16, 16), seed=0, sample_index=np.arange(30_000))
    counts = Counter(map(tuple, pairs[:, 0].tolist()))
    assert len(counts) == 15 and (1, 1) not in counts
    assert all(abs(count - 2000) < 6 * 2000**0.5 for count in counts.values())


def test_slots_are_uniform_over_those_with_a_target():
    config = RegisterConfig("1d", 4, max_offset=1)
    placed, _ = place_registers(config, (3, 3), seed=0, sample_index=np.arange(9000))
    counts = Counter(placed.flatten().tolist())
    assert set(counts) == set(range(9)), "slots 0..8 have x_1..x_9 as targets"
    assert all(abs(count - 4000) < 6 * 4000**0.5 for count in counts.values())


def test_sparse_registers_all_have_a_target_where_enough_slots_do():
    sequence = sequence_of(RegisterConfig("2d", 80), (16, 16), batch=50)
    assert (sequence.targets[:, 256:] != NO_TARGET).all()


def test_placement_all_leaves_some_without_a_target():
    sequence = sequence_of(RegisterConfig("2d", 80, placement="all"), (16, 16), batch=50)
    share = (sequence.targets[:, 256:] == NO_TARGET).float().mean()
    assert 0.05 < share < 0.2  # 10.2 % of slots have no target at m = 4, w = 16


def test_an_ignored_edge_gives_no_target_across_it():
    config = RegisterConfig("2d", 16, edge="ignore", offset_per="register")
    placed, pairs = place_registers(config, (4, 4), seed=0, sample_index=INDEX)
    targets = sequence_of(config).targets[:, 16:].numpy()
    crossing = crosses_edge(placed, pairs, 4)
    assert crossing.any()
    assert (targets[crossing] == NO_TARGET).all()


def test_offsets_are_drawn_per_sequence_register_or_batch():
    def distinct(kind, **settings):
        config = RegisterConfig("2d", 100, offset_per=kind)
        pairs = place_registers(config, (16, 16), seed=0, sample_index=np.arange(40), **settings)[1]
        offsets = raster_offset(pairs, 16)
        return [len(set(row)) for row in offsets.tolist()], len(set(offsets.flatten().tolist()))

    assert distinct("sequence")[0] == [1] * 40 and distinct("sequence")[1] > 5
    assert min(distinct("register")[0]) > 5
    assert distinct("batch")[1] == 1
    assert len({raster_offset(place_registers(RegisterConfig("2d", 1, offset_per="batch"), (16, 16), seed=0,
               sample_index=INDEX, step=step)[1], 16)[0, 0] for step in range(50)}) > 5  # fmt: skip


def test_draws_depend_on_the_sample_and_not_on_its_batch(registers):
    registers = dataclasses.replace(registers, offset_per=registers.offset_per.replace("batch", "sequence"))
    together = place_registers(registers, (4, 4), seed=3, sample_index=np.arange(10))
    alone = [place_registers(registers, (4, 4), seed=3, sample_index=np.array([i])) for i in range(10)]
    for part in (0, 1):
        assert (together[part] == np.concatenate([a[part] for a in alone])).all()


def test_more_registers_than_slots_are_refused():
    with pytest.raises(UserError, match="17, but a 4x4 grid has 16"):
        sequence_of(RegisterConfig("2d", 17))
    with pytest.raises(UserError, match="has 15 slots"):
        sequence_of(RegisterConfig("2d", 16, class_slot=False))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="3d", count=1), "3d"),
        (dict(kind="2d", count=0), "positive count"),
        (dict(kind="none", count=3), "kind none"),
        (dict(kind="2d", count=3, weight=1.5), "0 to 1"),
        (dict(kind="2d", count=3, edge="mirror"), "wrap or ignore"),
        (dict(kind="2d", count=3, max_offset=1), "leaves no 2d offset"),
        (dict(kind="1d", count=3, max_offset=1, next_token=False), "leaves no offset"),
        (dict(kind="1d", count=3, min_offset_w=0), "only 2d"),
    ],
)
@pytest.mark.bad_input("settings")
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RegisterConfig(**settings)


def test_a_list_of_offsets_is_drawn_from_as_its_shares_say():
    """right and below as a pair of MuToR's, and a distribution over three offsets."""
    config = RegisterConfig("2d", 1, offsets="right below")
    assert offset_pairs(config).tolist() == [[1, 2], [2, 1]]
    assert raster_offset(offset_pairs(config), 16).tolist() == [1, 16], "the next token, and the token below"
    config = RegisterConfig("2d", 1, offsets="right:1 below:2.5 2,-1:0.5")
    _, pairs = place_registers(config, (16, 16), seed=0, sample_index=np.arange(20_000))
    counts = Counter(map(tuple, (pairs[:, 0] - 1).tolist()))
    assert set(counts) == {(0, 1), (1, 0), (2, -1)}
    for offset, share in (((0, 1), 0.25), ((1, 0), 0.625), ((2, -1), 0.125)):
        assert abs(counts[offset] - 20_000 * share) < 6 * (20_000 * share) ** 0.5


def test_equal_shares_draw_as_no_shares_do():
    plain, shared_out = (RegisterConfig("2d", 5, offsets=text) for text in ("right below", "right:3 below:3"))
    drawn = [place_registers(each, (4, 4), seed=0, sample_index=np.arange(50)) for each in (plain, shared_out)]
    assert all((one == other).all() for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "2d", "offsets": "same right"}, "has been read"),
        ({"kind": "1d", "offsets": "right"}, "only 2d registers"),
        ({"kind": "2d", "offsets": "right", "next_token": False}, "says nothing beside it"),
        ({"kind": "2d", "offsets": "up"}, "registers.offsets has 'up'"),
    ],
)
@pytest.mark.bad_input("settings")
def test_offsets_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RegisterConfig(count=4, **settings)


def test_offsets_that_point_back_on_this_grid_are_refused():
    with pytest.raises(
        UserError, match="registers.offsets '1,-4' points at or before the token itself on a grid 4 wide"
    ):
        sequence_of(RegisterConfig("2d", 4, offsets="1,-4"))


def test_the_loss_of_each_offset_is_that_of_its_registers(random_model):
    """A walk over the registers of a batch; together they are the whole."""
    import torch.nn.functional as F

    from mutor_vision.config import TrainConfig
    from mutor_vision.objectives.objective import Objective
    from mutor_vision.objectives.register_loss import RegisterLoss

    own = RegisterConfig("2d", 9, offsets="right below 1,1", offset_per="register", edge="ignore", placement="all")
    auxiliary = RegisterLoss(own, TrainConfig(model=random_model.config, registers=own))
    objective = Objective(random_model, [auxiliary]).on_held_out(random_model)
    assert objective.names == ["next_token", "register", "register 0,1", "register 1,0", "register 1,1"]
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(32, (3, 4, 4), generator=generator), torch.tensor([0, 1, 4])
    sequence = objective.sequence(codes, seed=0, sample_index=INDEX)
    sums, counts = objective(labels, sequence), objective.counts(sequence)
    logits = random_model(sequence.tokens, labels, sequence.positions, sequence.pattern)
    placed, pairs = place_registers(own, (4, 4), seed=0, sample_index=INDEX)
    expected, found = Counter(), Counter()
    for image in range(3):
        for register in range(9):
            row, column = divmod(placed[image, register] - 1, 4) if placed[image, register] else (0, -1)
            rows, columns = pairs[image, register] - 1
            if row + rows < 4 and 0 <= column + columns < 4:
                name = f"register {rows},{columns}"
                target = codes[image, row + rows, column + columns]
                expected[name] += F.cross_entropy(logits[image, 16 + register], target).item()
                found[name] += 1
    assert set(expected) == set(objective.names[2:])
    for name in expected:
        assert sums[name].item() == pytest.approx(expected[name], rel=1e-4) and counts[name] == found[name]
    assert counts["register"] == found.total() and sums["register"].item() == pytest.approx(expected.total(), rel=1e-4)
    assert objective.weights(0) == {"next_token": 0.5, "register": 0.5} | dict.fromkeys(expected, 0.0)


def test_a_schedule_of_the_largest_offset_goes_from_near_to_far(random_model):
    """m in training by step; held-out registers have all offsets, so that their losses compare."""
    from mutor_vision.config import TrainConfig
    from mutor_vision.objectives.objective import Objective
    from mutor_vision.objectives.register_loss import RegisterLoss

    own = RegisterConfig("2d", 9, max_offset=4, max_offset_schedule="0:0.25,25%:0.75,~75%:1", offset_per="register")
    assert [own.max_offset_at(step, 9) for step in range(9)] == [2, 2, 3, 3, 4, 4, 4, 4, 4]  # 3.5 is rounded to even
    config = TrainConfig(model=random_model.config, registers=own, steps=9)
    objective = Objective(random_model, [RegisterLoss(own, config)])
    codes = torch.arange(1, 17).reshape(1, 4, 4).expand(60, -1, -1)

    def largest(**step):
        sequence = objective.sequence(codes, seed=0, sample_index=np.arange(60), **step)
        plain = dataclasses.replace(own, max_offset=int(sequence.offsets.max()), max_offset_schedule="constant")
        assert torch.equal(sequence.targets, sequence_of(plain, batch=60, **step).targets)
        return plain.max_offset

    assert [largest(step=step) for step in (0, 1, 2, 4, 8)] == [2, 2, 3, 4, 4] and largest() == 4


@pytest.mark.parametrize("more", [{"offsets": "below"}, {"min_offset_w": 2}, {"max_offset_schedule": "0:2"}])
@pytest.mark.bad_input("settings")
def test_a_schedule_of_the_largest_offset_goes_with_nothing_else(more):
    with pytest.raises(UserError, match="registers.max_offset_schedule is"):
        RegisterConfig("2d", 4, **{"max_offset_schedule": "0:0.5,50%:1", **more})
