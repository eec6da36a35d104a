"""Where a loss that looks ahead looks: offsets in two dimensions, the same for every loss.

Slot t holds token x_t, which is in cell t of the h x w grid (slot 0 holds the class); slot t predicts x_(t+1). The
offset (r, c) at slot t is the cell r rows below the cell of x_t and c columns to its right, in raster order
t + r * w + c: its token, the state of its slot, or the features of that part of the image.

    same   (0, 0)   for states and features only: the token has been read at slot t, so nothing is left to predict
    right  (0, 1)   the next token, which slot t predicts anyway
    below  (1, 0)

MuToR's pairs (d_h, d_w) count from 1: (r, c) is (d_h, d_w) = (r + 1, c + 1).
"""

import re

import numpy as np

from mutor_vision.errors import UserError

NAMED = {"same": (0, 0), "right": (0, 1), "below": (1, 0)}
_OFFSET = re.compile(r"(?:(?P<name>[a-z]+)|(?P<r>\d+),(?P<c>-?\d+))(?::(?P<share>\d+(?:\.\d+)?))?")


def parse_offsets(text: str, setting: str) -> dict[tuple[int, int], float]:
    """'right below:2 1,-1' -> {(0, 1): 1.0, (1, 0): 2.0, (1, -1): 1.0}: offsets by name or as ROWS,COLUMNS, separated
    by blanks, each with its share of a distribution, 1 where none is given. setting: its name, for the UserError."""
    found = {}
    for word in text.split():
        match = _OFFSET.fullmatch(word)
        if match is None or (match["name"] and match["name"] not in NAMED):
            raise UserError(f"{setting} has '{word}', expected {', '.join(NAMED)} or ROWS,COLUMNS, each perhaps with "
                            ":SHARE, separated by blanks")  # fmt: skip
        offset = NAMED[match["name"]] if match["name"] else (int(match["r"]), int(match["c"]))
        share = float(match["share"] or 1)
        if offset in found or not share or offset < (0, 0):
            reason = "twice" if offset in found else "with share 0" if not share else "which is behind the token"
            raise UserError(f"{setting} has '{word}' {reason}; drop it")
        found[offset] = share
    return found


def look_ahead(offset: tuple[int, int], grid: tuple[int, int], edge: str = "wrap") -> tuple[np.ndarray, np.ndarray]:
    """(P,) slots t in 1 .. N - 1 that have a cell at `offset`, and (P,) those cells, in 1 .. N.

    edge: at the end of a row 'wrap' goes on in raster order; 'ignore' leaves out cells beside the grid. Raises
    UserError for an offset that points back, or that no slot has."""
    height, width = grid
    rows, columns = offset
    slots = np.arange(1, height * width)
    cells = slots + rows * width + columns
    column = (slots - 1) % width + columns
    kept = (cells <= height * width) & ((edge == "wrap") | ((column >= 0) & (column < width)))
    if rows * width + columns < 0 or not kept.any():
        raise UserError(f"the offset {rows},{columns} points behind the token or out of a {height}x{width} grid; "
                        "give a nearer one")  # fmt: skip
    return slots[kept], cells[kept]
