"""Progress bars, where a person watches."""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

QUIET = "MUTOR_QUIET"  # environment variable that --quiet sets to 1: no bars


def progress(iterable: Iterable | None = None, **settings) -> tqdm:
    """tqdm(iterable, **settings), which shows nothing but in the first process, and there on a terminal alone: in a log
    file a bar would be thousands of lines."""
    shown = os.environ.get("RANK", "0") == "0" and sys.stderr.isatty() and os.environ.get(QUIET) != "1"
    return tqdm(iterable, disable=not shown, dynamic_ncols=True, **settings)
