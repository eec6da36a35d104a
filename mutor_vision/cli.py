"""The command `mutor`, and what every command shares: one line for a user's mistake and its exit code, output whose
reader may leave, and the settings of a training run from a preset, --set and flags."""

import argparse
import dataclasses
import errno
import importlib
import io
import json
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mutor_vision.errors import UserError, short
from mutor_vision.names import printable
from mutor_vision.progress import QUIET
from mutor_vision.settings import override, preset

if TYPE_CHECKING:
    from mutor_vision.config import TokenizerTrainConfig, TrainConfig

Training = TypeVar("Training", "TokenizerTrainConfig", "TrainConfig")

LONGEST = 4000  # characters of an error, in which a file's own names may stand
_MEMORY = re.compile("out of memory|can't allocate memory")  # of CUDA, of the CPU; torch's errors
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # full, over a quota, of small files (FAT), read-only


def run_command(main: Callable[[], None]) -> None:
    """Run a command: a UserError becomes one line on stderr and its exit code; MUTOR_DEBUG=1 keeps the traceback. Under
    torchrun the error is also what its summary shows as root cause. A closed pipe (`| head`) is no error: the command
    goes on to its end, and what it prints is lost."""
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal's encoding has no character for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # Pillow's, of a large image that is refused in our own line. Its class is not named, so as not to import Pillow.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit", RuntimeWarning)
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more --workers than cores
    sys.stdout, sys.stderr = _unbreakable(sys.stdout, sys.__stdout__), _unbreakable(sys.stderr, sys.__stderr__)
    try:
        _recorded(_peers_told(_shortage_told(main)))()
    except UserError as error:
        if os.environ.get("MUTOR_DEBUG") == "1":
            raise
        print(_one_line(error), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from what was saved", file=sys.stderr, flush=True)
        sys.exit(130)


def choose_settings(presets: dict[str, Training], name: str, settings: list[str], **flags: Any) -> Training:
    """The preset `name` with the user's changes, as settings.override takes them. A run shorter than its warm-up
    gets a shorter one, and a line says so."""
    config = override(preset(presets, name), settings, **flags)
    asked = any(setting.startswith("warmup_steps=") for setting in settings)
    if config.warmup_steps > config.steps and not asked:
        if os.environ.get("RANK", "0") == "0":  # on stderr: stdout may be JSON
            print(f"warm-up shortened from {config.warmup_steps} steps to all {config.steps}", file=sys.stderr)
        config = dataclasses.replace(config, warmup_steps=config.steps)
    return config


def _one_line(error: UserError) -> str:
    rank = os.environ.get("RANK")
    where = f"error [rank {rank}]" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else "error"
    # Line ends alone: runs of blanks may be a part of a file's name.
    text = re.sub(r"\s*[\r\n]\s*", " ", str(error)).strip()
    return f"{where}: {printable(text, LONGEST)}"


def _shortage_told(main: Callable[[], None]) -> Callable[[], None]:
    """main, in which memory that is short, or a disk that has become full or read-only since it was tried, is a user's
    matter, not a bug."""

    def run() -> None:
        try:
            main()
        except UserError:  # which may say more of the disk
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
                raise UserError(
                    f"memory is short ({short(error)}); do less at once: --batch-size, --set micro_batch=N, "
                    "--set activation_checkpointing=true, fewer images of a grid"
                ) from error
            # What torch.save raises says nothing of the disk, what came before it does.
            failed: BaseException | None = error
            while failed is not None and _disk_number(failed) not in _DISK:
                failed = failed.__context__
            if failed is None:
                raise
            name = getattr(failed, "filename2", None) or getattr(failed, "filename", None)
            where = f" ({os.fsdecode(name)})" if isinstance(name, (str, bytes)) else ""
            reason = os.strerror(_disk_number(failed) or 0)
            raise UserError(
                f"results cannot be written: {reason}{where}; make space or mend the disk, then repeat the command"
            ) from error

    return run


def _peers_told(main: Callable[[], None]) -> Callable[[], None]:
    """main, in which the end of another process of the job is one line that names it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return main  # without importing torch

    def run() -> None:
        try:
            main()
        except RuntimeError as raised:
            from mutor_vision.runtime import blamed

            error = blamed(raised)
            if error is not raised:
                raise error from None
            raise

    return run


def _disk_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # safetensors has a kind of its own, shutil.copytree raises a list of what failed: the number is in their text.
    told = re.search(r"os error (\d+)|\[Errno (\d+)\]", str(error))
    return int(told[1] or told[2]) if told else None


def _recorded(main: Callable[[], None]) -> Callable[[], None]:
    """main, which under torchrun leaves its error where torchrun looks for the root cause: a UserError as one line,
    anything else with its traceback."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main  # without importing torch
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

    class OneLine(ErrorHandler):
        def record_exception(self, error: BaseException) -> None:
            path = self._get_error_file_path()
            if not isinstance(error, UserError) or path is None:
                return super().record_exception(error)
            message = {"message": _one_line(error), "extraInfo": {"timestamp": str(int(time.time()))}}
            self._write_error_file(path, json.dumps({"message": message}))

    return record(main, OneLine())


class _Discarding(io.FileIO):
    """A file descriptor that takes everything, also when nobody reads it any more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def _unbreakable(stream, original):
    """Standard output or error as it is, unless it is a pipe: then one whose closing is no error."""
    if stream is None or stream is not original or not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.flush()
    raw = _Discarding(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with mistakes as UserError."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.register("type", Path, _path)  # what `type=Path` means

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def _path(text: str) -> Path:
    if not text:  # an empty variable of a script, which Path takes for the current folder
        raise argparse.ArgumentTypeError("'' is given, expected a path; give one")
    return Path(text)


# Subcommand of `mutor`, in the order of the pipeline -> what it does, for --help, and the script that is its door. Each
# is a module of commands/ with `add_arguments(parser)` and `main(arguments)`, imported only when it is asked for.
COMMANDS = {
    "train-tokenizer": "images -> a tokenizer (tokenizers/train_vq.py)",
    "reconstruct": "how well a tokenizer reconstructs images (tokenizers/reconstruct.py)",
    "encode": "images -> a token set (tokenizers/encode.py)",
    "plan": "what a training costs: FLOPs, memory, days",
    "train": "a token set -> a transformer (train/imagenet.py)",
    "plot": "curves of trainings as a picture",
    "sample": "an image grid, or a set of images for evaluation",
    "show": "a page in the browser: what a run draws, as it grows",
    "features": "train a feature network of one's own (eval/train_features.py)",
    "reference": "statistics of images to compare with (eval/reference.py)",
    "fid": "FID and the rest of ADM's suite, of images or of a run (eval/fid.py)",
    "sweep": "the guidance scale of the lowest FID (eval/cfg_sweep.py)",
    "demo": "all of it on handwritten digits, in minutes, with a page of pictures (train/demo.py)",
    "info": "say what a run, checkpoint or token set is",
    "merge": "a base and its LoRA adapter -> a plain run",
    "export": "a run -> a folder that diffusers loads, with a model card",
    "convert": "LlamaGen's checkpoints and codes in, our checkpoints out",
    "shell-completion": "a script with which bash completes these commands",
}


def main() -> None:
    """Entry point of the command `mutor` and of `python -m mutor_vision` (which torchrun starts with -m)."""
    run_command(_main)


def _main() -> None:
    parser = Parser(
        prog="mutor", description="From images to a trained model, its samples and their scores.",
        epilog="mutor COMMAND --help says more. Exit codes: 0 done, 1 a fault of this program, 2 a wrong setting,\n"
               "3 images or weights that cannot be read, 4 a damaged file, 5 things that do not belong together,\n"
               "7 a directory that another job has, 75 asked to stop, and saved.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    name, parsers = sys.argv[1] if len(sys.argv) > 1 else "", {}
    for each, text in COMMANDS.items():
        parsers[each] = commands.add_parser(each, help=text)
    if name in COMMANDS:
        command = _command(name)
        parsers[name].description = command.__doc__
        _add_arguments(parsers[name], command)
    arguments = parser.parse_args()
    _call(command, arguments)


def door(name: str, script: str) -> None:
    """The command `mutor name` as a script of its own, called `script` in its messages."""

    run_command(lambda: _call(_command(name), parser_of(name, script).parse_args()))


def parser_of(name: str, program: str = "") -> Parser:
    """The parser of the command `name`, called `program` in its messages."""
    command = _command(name)
    parser = Parser(prog=program or f"mutor {name}", description=command.__doc__)
    _add_arguments(parser, command)
    return parser


def _add_arguments(parser: Parser, command) -> None:
    command.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _call(command, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "out", None) == "":
        raise UserError("out is '', expected a path; give one")
    if arguments.quiet:
        os.environ[QUIET] = "1"
    command.main(arguments)


def _command(name: str):
    return importlib.import_module(f"mutor_vision.commands.{name.replace('-', '_')}")
