"""SGLang's own command-line flags: which exist, and whether given words parse.

SGLang is imported only when a word that is not ours turns up, for it takes seconds.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
from collections.abc import Iterable
from typing import Any, NoReturn


class UsageError(ValueError):
    """The person who started the program wrote something it does not know."""


def check(argv: list[str], mapping: dict[str, Any], our_options: list[str]) -> list[str]:
    """`mapping` (flag names to YAML values) as words, then `argv`, flags in full; together they parse as SGLang's.

    A flag of `mapping` that `argv` sets as well is left out. Nothing is added: SGLang's defaults,
    and its one required flag `--model-path`, are the caller's business.

    Raises:
        UsageError: an unknown flag (with the nearest known one, SGLang's or ours) or a bad value.
    """
    parser = _parser()
    actions = parser._option_string_actions
    on_command_line = set()
    full: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            # `--tp 2` is how everybody writes `--tp-size 2`: argparse takes a prefix of one flag.
            meant = [option] if option in actions else [a for a in actions if a.startswith(option)]
            if len(meant) != 1:
                raise UsageError(unknown("flag", option, [*our_options, *actions]))
            on_command_line.add(actions[meant[0]].dest)
            word = meant[0] + equals + value
        full.append(word)
    words: list[str] = []
    for key, value in mapping.items():
        option = "--" + str(key).replace("_", "-")
        if option not in actions:
            raise UsageError(unknown("key under sglang:", str(key), [a[2:] for a in actions]))
        if actions[option].dest not in on_command_line:
            words += _to_words(option, value, actions[option])
    parser.parse_args(words + full)
    return words + full


def help_text() -> str:
    """SGLang's `--help`."""
    return _parser().format_help()


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A message that names the nearest known word, if one is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unknown {what} {name}" + (f"; did you mean {close[0]}?" if close else "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    from alchemist.server import cpu

    cpu.prepare()
    from sglang.srt.server_args import ServerArgs

    parser = _Parser(prog="alchemist", add_help=False)
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        action.required = False
    return parser


def _to_words(option: str, value: object, action: argparse.Action) -> list[str]:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise UsageError(f"{option[2:]} under sglang: is {value!r}; allowed: true or false")
        if not value and isinstance(action, argparse.BooleanOptionalAction):
            return [f"--no-{option[2:]}"]
        return [option] if value else []
    if isinstance(value, dict):
        return [option, json.dumps(value)]
    return [option, *(str(v) for v in (value if isinstance(value, list) else [value]))]
