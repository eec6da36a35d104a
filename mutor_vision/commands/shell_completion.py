"""Completion of commands, options and presets for bash, and for zsh after `bashcompinit`. Once, and after an update:

    mutor shell-completion > ~/.local/share/bash-completion/completions/mutor
"""

import argparse

from mutor_vision.cli import COMMANDS, parser_of
from mutor_vision.presets import TOKENIZERS, TRANSFORMERS

_PRESETS = {"train": list(TRANSFORMERS), "plan": list(TRANSFORMERS), "train-tokenizer": list(TOKENIZERS)}
# What follows an option or a word of no option is a file's name, which bash itself completes (-o default).
_SCRIPT = """_mutor() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" options= presets=
  COMPREPLY=()
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [[ $COMP_CWORD == 1 ]]; then options="{commands}"
  elif [[ $before == --preset ]]; then options=$presets
  elif [[ $word != -* ]]; then return
  fi
  COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -F _mutor mutor"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(arguments: argparse.Namespace) -> None:
    cases = []
    for name in COMMANDS:
        options = [option for action in parser_of(name)._actions for option in action.option_strings]
        cases.append(f'    {name}) options="{" ".join(options)}" presets="{" ".join(_PRESETS.get(name, []))}" ;;')
    print(_SCRIPT.format(cases="\n".join(cases), commands=" ".join(COMMANDS)))
