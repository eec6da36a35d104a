"""Train a feature network of one's own: `mutor features` as a script (mutor_vision/commands/features.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("features", "eval/train_features.py")
