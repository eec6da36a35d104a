"""The command `mutor`, and what every command shares: one line for a user's mistake, and its exit code."""

import argparse
import os
import sys
from collections.abc import Callable

from mutor_vision.errors import UserError
from mutor_vision.names import printable


def run_command(main: Callable[[], None]) -> None:
    """Run a command: a UserError becomes one line on stderr and its exit code; MUTOR_DEBUG=1 keeps the traceback."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a name may hold what the terminal's encoding, or any, has no character for
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        if os.environ.get("MUTOR_DEBUG") == "1":
            raise
        rank = os.environ.get("RANK")
        where = f"error [rank {rank}]" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else "error"
        print(f"{where}: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)  # the reader of a pipe has gone, as with `| head`


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with mistakes as UserError."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def main() -> None:
    """Entry point of the command `mutor` and of `python -m mutor_vision` (which torchrun starts with -m)."""
    run_command(_main)


def _main() -> None:
    # Each subcommand's module is imported only when it is asked for: `mutor info` needs no image library.
    parser = Parser(prog="mutor", description="Sample from a trained model, or ask what a folder holds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    sample_parser = commands.add_parser("sample", help="make an image grid, or a set of images for evaluation")
    info_parser = commands.add_parser("info", help="say what a run, checkpoint or token set is")
    info_parser.add_argument("path")
    convert_parser = commands.add_parser("convert", help="LlamaGen's checkpoints and codes in, our checkpoints out")
    merge_parser = commands.add_parser("merge", help="a base and its LoRA adapter -> a plain run")
    plot_parser = commands.add_parser("plot", help="curves of one or more training runs as a picture")
    plan_parser = commands.add_parser("plan", help="what a training run costs: FLOPs, memory, days")
    if sys.argv[1:2] == ["sample"]:
        from mutor_vision import sample

        sample.add_arguments(sample_parser)
        sample.main(parser.parse_args())
    elif sys.argv[1:2] == ["convert"]:
        from mutor_vision import convert

        convert.add_arguments(convert_parser)
        convert.main(parser.parse_args())
    elif sys.argv[1:2] == ["plot"]:
        from mutor_vision import plots

        plots.add_arguments(plot_parser)
        plots.main(parser.parse_args())
    elif sys.argv[1:2] == ["merge"]:
        from mutor_vision import lora

        lora.add_arguments(merge_parser)
        lora.main(parser.parse_args())
    elif sys.argv[1:2] == ["plan"]:
        from mutor_vision import plan

        plan.add_arguments(plan_parser)
        plan.main(parser.parse_args())
    else:
        from mutor_vision.info import describe

        print(describe(parser.parse_args().path))
