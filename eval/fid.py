"""FID and the rest of ADM's suite: `mutor fid` as a script (mutor_vision/commands/fid.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("fid", "eval/fid.py")
