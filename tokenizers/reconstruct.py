"""How well a tokenizer reconstructs images: `mutor reconstruct` as a script (mutor_vision/commands/reconstruct.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("reconstruct", "tokenizers/reconstruct.py")
