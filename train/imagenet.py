"""Train the transformer on a token set: `mutor train` as a script (mutor_vision/commands/train.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("train", "train/imagenet.py")
