"""The whole pipeline on handwritten digits: `mutor demo` as a script (mutor_vision/commands/demo.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("demo", "train/demo.py")
