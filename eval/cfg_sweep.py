"""Find the guidance scale with the lowest FID: `mutor sweep` as a script (mutor_vision/commands/sweep.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("sweep", "eval/cfg_sweep.py")
