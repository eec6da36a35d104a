import io

import pytest

from mutor_vision.progress import QUIET, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, environment, shown",
    [
        (Terminal(), {}, True),
        (Terminal(), {"RANK": "0"}, True),
        (Terminal(), {"RANK": "1"}, False),
        (Terminal(), {QUIET: "1"}, False),
        (io.StringIO(), {}, False),  # a log file
    ],
)
def test_bars_are_for_terminals_of_the_first_process(monkeypatch, stream, environment, shown):
    for name in ("RANK", QUIET):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", stream)
    assert list(progress(range(3), desc="steps")) == [0, 1, 2]
    assert ("steps" in stream.getvalue()) == shown


def test_quiet_is_a_flag_of_every_command(command, monkeypatch, tmp_path):
    monkeypatch.setenv(QUIET, "0")  # which monkeypatch restores
    assert command("mutor", "plan", "--preset", "digits-next-token", "--gpu", "cpu", "--quiet").code == 0
    import os

    assert os.environ[QUIET] == "1"
    assert "--quiet" in command("eval/fid.py", "--help").out
