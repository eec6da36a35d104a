"""Train a tokenizer on images: `mutor train-tokenizer` as a script (mutor_vision/commands/train_tokenizer.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("train-tokenizer", "tokenizers/train_vq.py")
