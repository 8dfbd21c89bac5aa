"""What a vote can be trained with: the names that options, messages and the trainer share."""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Callable
from typing import Any, Literal

OBJECTIVES = ("kto", "apo_zero_unpaired", "dpo", "sft")
"""Losses of our own, beside a user's `module:function`."""

LossType = Literal["sigmoid", "robust", "ipo"]
"""Which dpo."""

Reference = Literal["served", "base"]
"""What the log-ratio is taken against: the version that answered, or the base model."""

ALLOWED = ", ".join(OBJECTIVES) + " or module:function"
"""The allowed values of an objective's name, in words."""


def is_function(name: str) -> bool:
    """Whether an objective's name is that of a user's function."""
    return re.fullmatch(r"[\w.]+:[\w.]+", name) is not None


def is_allowed(name: str) -> bool:
    """Whether an objective may be called that; a function need not exist."""
    return name in OBJECTIVES or is_function(name)


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; its module is imported.

    Raises:
        ValueError: there is none; the message names the objective and what is wrong.
    """
    try:
        module, _, attribute = name.partition(":")
        function = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"objective {name}: {error}") from None
    except Exception as error:
        # The module is the user's: importing it may raise anything.
        raise ValueError(f"objective {name}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"objective {name}: not a function")
    found: Callable[..., Any] = function
    return found
