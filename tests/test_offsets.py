"""Where losses look: offsets as text, and their cells by a walk over the grid; weights by step."""

import pytest

from mutor_vision.config import AlignedStatesConfig, PrivateBlocksConfig, TrainConfig
from mutor_vision.errors import UserError
from mutor_vision.offsets import look_ahead, parse_offsets
from mutor_vision.schedule import weight_factor
from mutor_vision.settings import override


def test_offsets_are_read_by_name_or_number():
    found = parse_offsets("same right below:2.5 1,-1 2,0:3", "offsets")
    assert found == {(0, 0): 1.0, (0, 1): 1.0, (1, 0): 2.5, (1, -1): 1.0, (2, 0): 3.0}


@pytest.mark.parametrize(
    "text, message",
    [
        ("left", "has 'left', expected same, right, below or ROWS,COLUMNS"),
        ("1;0", "has '1;0', expected"),
        ("-1,0", "has '-1,0', expected"),
        ("below 1,0", "has '1,0' twice"),
        ("below:0", "has 'below:0' with share 0"),
        ("0,-1", "has '0,-1' which is behind the token"),
    ],
)
@pytest.mark.bad_input("settings")
def test_other_text_is_refused(text, message):
    with pytest.raises(UserError, match=f"^private_blocks.offsets {message}"):
        PrivateBlocksConfig(offsets=text)


@pytest.mark.parametrize("own", [PrivateBlocksConfig, AlignedStatesConfig])
def test_a_loss_for_each_offset_takes_no_distribution(own):
    with pytest.raises(UserError, match="without shares"):
        own(offsets="below:2 right")
    with pytest.raises(UserError, match="one offset or more"):
        own(offsets="")


def test_a_token_that_has_been_read_is_no_target():
    with pytest.raises(UserError, match="has been read"):
        PrivateBlocksConfig(offsets="same below")


@pytest.mark.parametrize("edge", ["wrap", "ignore"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6), (16, 16)])
def test_cells_are_those_of_a_walk_over_the_grid(grid, edge):
    height, width = grid
    for offset in [(0, 0), (0, 1), (1, 0), (1, -1), (2, 3), (0, 4)]:
        pairs = []
        for row in range(height):
            for column in range(width):
                there = row + offset[0], column + offset[1]
                if (row, column) == (height - 1, width - 1):
                    continue  # the last token is in no slot
                if edge == "wrap":  # step by step, on to the next row at the end of one
                    place = row * width + column
                    place += offset[0] * width + offset[1]
                    there = divmod(place, width)
                if 0 <= there[0] < height and 0 <= there[1] < width:
                    pairs.append((row * width + column + 1, there[0] * width + there[1] + 1))
        if pairs:
            slots, cells = look_ahead(offset, grid, edge)
            assert list(zip(slots.tolist(), cells.tolist(), strict=True)) == pairs
        else:
            with pytest.raises(UserError, match=f"the offset {offset[0]},{offset[1]} points"):
                look_ahead(offset, grid, edge)


def test_an_offset_that_points_back_on_a_narrow_grid_is_refused():
    with pytest.raises(UserError, match="1,-6 points behind the token"):
        look_ahead((1, -6), (4, 4))


def test_mtar_has_240_targets_and_mirai_256_255_and_240_pairs(tiny_config):
    assert len(look_ahead((1, 0), (16, 16))[0]) == 240
    from dataclasses import replace

    from mutor_vision.objectives.aligned_states import AlignedStates

    config = TrainConfig(model=replace(tiny_config, grid=(16, 16)))
    own = AlignedStatesConfig(2.0)
    auxiliary = AlignedStates(own, config)
    pairs = [list(zip(auxiliary.slots[k].places.tolist(), auxiliary.places[k].places.tolist(),
                      strict=True)) for k in range(3)]  # fmt: skip
    assert [len(each) for each in pairs] == [256, 255, 240] and all(each[0] == (0, 0) for each in pairs)
    assert pairs[2][1:] == [(t, t + 16) for t in range(1, 240)]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.8, 0.6, 0.4, 0.2, 0]),
        ("0:0,2:1,4:0.5", [0, 0, 1, 1, 0.5, 0.5]),
        ("0:0,1.5e:1,2e:0.5", [0, 0, 0, 1, 0.5, 0.5]),  # an epoch has 2 steps
        ("~60%:0", [1, 2 / 3, 1 / 3, 0, 0, 0]),
        ("0:0,~2:1,3:1,~5:0", [0, 0.5, 1, 1, 0.5, 0]),
    ],
)
def test_weights_by_step(schedule, expected):
    assert [weight_factor(schedule, step, 6, epoch_steps=2.0) for step in range(6)] == pytest.approx(expected)
    own = AlignedStatesConfig(2.0, schedule)
    assert [own.weight_at(step, 6, 2.0) for step in range(6)] == pytest.approx([2 * each for each in expected])


@pytest.mark.parametrize("schedule", ["cosine", "", "10", "5:2", "~:0", "1x:0"])
@pytest.mark.bad_input("settings")
def test_a_schedule_that_is_none_is_refused(schedule):
    with pytest.raises(UserError, match=f"^aligned_states.weight_schedule is '{schedule}', expected constant"):
        override(TrainConfig(), [f"aligned_states.weight_schedule={schedule}"])
