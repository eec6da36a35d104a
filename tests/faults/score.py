"""What the tests of promises found, for docs/reliability.md: a line of JSON a test, in the file that MUTOR_SCORE is."""

import json
import os


def record(promise: str, what: str, held: int, tried: int) -> None:
    """promise: a title of report.PROMISES; what: the case, such as a command; held of tried."""
    if path := os.environ.get("MUTOR_SCORE"):
        with open(path, "a") as file:  # one short line: appended whole, by whichever worker
            file.write(json.dumps({"promise": promise, "what": what, "held": held, "tried": tried}) + "\n")


def everything() -> bool:
    """Whether all cases are tried (`make test-slow`), or a sample of them."""
    return os.environ.get("MUTOR_FAULTS") == "all"
