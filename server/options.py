"""Where the values of our options come from: the command line, the environment and a YAML file.

Precedence: command line over `ALCHEMIST_*` over `--config FILE.yaml` over the defaults of `Config` (the
embedded model brings its own when nothing is said of training: `TINY_OPTIONS`). Every
other flag must be one of SGLang's and is handed on as it came. This is the only file that reads our
environment variables.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from alchemist.server import sglang_flags
from alchemist.server.config import CHOICES, LINEAR_MODULES, Config, option_name
from alchemist.server.run import ENV
from alchemist.server.sglang_flags import UsageError, unknown

TINY_OPTIONS = Path(__file__).parent / "tiny" / "alchemist.yaml"
"""How the embedded model learns: in force when no model is named and nothing is said of training."""

_PREFIX = "ALCHEMIST_"
_UNITS = {"": 2**30, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Config, list[str]]:
    """Our configuration, and SGLang's arguments (those of the file first, so that `argv` wins).

    `--help` and `--help-all` print and exit with 0. A usage error (unknown flag, key or variable,
    bad value, unreadable file) prints one line to standard error and exits with 2.
    """
    try:
        if "--help" in argv or "-h" in argv or "--help-all" in argv:
            print(_help("--help-all" in argv), end="")
            raise SystemExit(0)
        given, sglang_argv = _split(argv)
        variables = _from_environ(environ)
        path = given.pop("config", None) or variables.pop("config", None)
        variables.pop("config", None)
        from_file, sglang_mapping = _from_file(path) if path else ({}, {})
        found = {**from_file, **variables, **given}
        if is_embedded(sglang_argv, sglang_mapping) and not _TRAINING & set(found):
            found = _from_file(str(TINY_OPTIONS))[0] | found
        values = {name: _read(name, value) for name, value in found.items()}
        config = Config(**values)
        if sglang_argv or sglang_mapping:
            sglang_argv = sglang_flags.check(sglang_argv, sglang_mapping, list(_OPTIONS))
    except ValueError as error:
        print(f"alchemist: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config, sglang_argv


_TRAINING = {
    *("objective", "loss_type", "label_smoothing", "optimizer", "learning_rate", "weight_decay"),
    *("max_grad_norm", "beta", "desirable_weight", "undesirable_weight", "reference"),
    *("train_batch_size", "lora_rank", "lora_alpha", "target_modules"),
}


def is_embedded(sglang_argv: Sequence[str], sglang_mapping: Mapping[str, Any]) -> bool:
    """Whether nobody has named a model, so that the embedded one is served."""
    names = {word.partition("=")[0] for word in sglang_argv}
    names |= {"--" + str(key).replace("_", "-") for key in sglang_mapping}
    # Of the longer one any beginning will do.
    return not any(
        "--model-path".startswith(name) and len(name) >= len("--model") for name in names
    )


_OPTIONS = {option_name(f.name): f.name for f in fields(Config)} | {"--config": "config"}
_SYNONYMS = {"--activation-memory": "activation_host_bytes"}


def _split(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    ours: dict[str, Any] = {}
    theirs: list[str] = []
    words = iter(argv)
    for word in words:
        option, has_value, value = word.partition("=")
        name = _OPTIONS.get(option) or _SYNONYMS.get(option)
        if name is None:
            theirs.append(word)
        elif name == "no_train":
            ours[name] = value if has_value else True
        else:
            ours[name] = value if has_value else next(words, "--")
            if ours[name].startswith("--"):
                raise UsageError(f"{option} needs a value")
    return ours, theirs


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    known = {_PREFIX + option[2:].replace("-", "_").upper(): n for option, n in _OPTIONS.items()}
    found: dict[str, Any] = {}
    for variable, value in environ.items():
        if variable.startswith(_PREFIX) and variable != ENV:
            if variable not in known:
                raise UsageError(unknown("environment variable", variable, known))
            found[known[variable]] = value
    return found


def _from_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UsageError(f"--config {path}: must hold a mapping of options to values")
    known = {o[2:]: n for o, n in _OPTIONS.items() if o != "--config"} | {"sglang": "sglang"}
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = known.get(str(key).replace("_", "-"))
        if name is None:
            raise UsageError(unknown(f"key in {path}:", str(key), known))
        found[name] = value
    sglang = found.pop("sglang", None) or {}
    if not isinstance(sglang, dict):
        raise UsageError(f"--config {path}: sglang must be a mapping of SGLang's flags to values")
    return found, sglang


def _read(name: str, value: object) -> Any:
    """The value of a field from a word (command line, environment) or a YAML scalar or list."""
    kind = _kind(name)
    if name == "activation_host_bytes":
        return _read_bytes(value)
    if name == "target_modules":
        words = value if isinstance(value, list) else str(value).split(",")
        names = tuple(str(word).strip() for word in words)
        return LINEAR_MODULES if names == ("all-linear",) else names
    if kind is bool:
        word = str(value).lower()
        if word not in ("true", "1", "yes", "on", "false", "0", "no", "off", ""):
            raise UsageError(f"{option_name(name)} is {value!r}; allowed: true or false")
        return word in ("true", "1", "yes", "on")
    if kind in (int, float):
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError
            if kind is int and isinstance(value, float):
                raise ValueError
            return kind(value)
        except ValueError:
            allowed = "a whole number" if kind is int else "a number"
            raise UsageError(f"{option_name(name)} is {value!r}; allowed: {allowed}") from None
    if not isinstance(value, str):
        raise UsageError(f"{option_name(name)} is {value!r}; allowed: a word")
    return value


def _read_bytes(value: object) -> int:
    if value == "auto":
        return -1
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(value).strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        allowed = "auto, a number in GiB, or one with a unit (512MiB, 2GiB)"
        raise UsageError(f"--activation-host-gb is {value!r}; allowed: {allowed}")
    return int(float(match[1]) * unit)


def _field_docs() -> dict[str, str]:
    """The literal under each field, so that `--help` and the code cannot part."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Config)))
    assert isinstance(tree.body[0], ast.ClassDef)
    docs = {}
    for node, after in itertools.pairwise(tree.body[0].body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[ast.unparse(node.target)] = " ".join(ast.literal_eval(after.value).split())
    return docs


def _help(is_all: bool) -> str:
    docs = _field_docs()
    lines = [
        "usage: alchemist [options] [any SGLang flag]",
        "",
        "Serves a model over the OpenAI API and trains it on the votes its users give.",
        "Without --model-path the embedded tiny model is served.",
        "",
        "Alchemist's options (also ALCHEMIST_<NAME> in the environment, and keys of the file):",
        "  --config FILE.yaml",
        "        Options as `name: value`, and SGLang's flags under `sglang:`.",
    ]
    for option, name in _OPTIONS.items():
        if name != "config":
            lines.append(f"  {option}" + ("" if name == "no_train" else f" {_metavar(name)}"))
            lines += textwrap.wrap(
                docs[name], 92, initial_indent=" " * 8, subsequent_indent=" " * 8
            )
    lines.append("\nEvery flag of SGLang is taken too; --help-all lists them.")
    text = "\n".join(lines) + "\n"
    return text + ("\n" + sglang_flags.help_text() if is_all else "")


def _kind(name: str) -> Any:
    """The type of a field; of an optional one, what it is when given."""
    kind = get_type_hints(Config)[name]
    return float if kind == float | None else kind


def _metavar(name: str) -> str:
    kind = _kind(name)
    if name in CHOICES:
        return "{" + ",".join(CHOICES[name]) + "}"
    special = {"data_dir": "DIR", "activation_host_bytes": "SIZE", "target_modules": "MODULES"}
    return special.get(name, "N" if kind is int else "X")
