"""Statistics of images to compare samples with: `mutor reference` as a script (mutor_vision/commands/reference.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("reference", "eval/reference.py")
