"""Images to a token set: `mutor encode` as a script (mutor_vision/commands/encode.py)."""

from mutor_vision.cli import door

if __name__ == "__main__":
    door("encode", "tokenizers/encode.py")
