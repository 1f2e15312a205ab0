"""No option of any command takes a number that is none or beyond all use, nor an empty word."""

from __future__ import annotations

import inspect
from types import NoneType
from typing import NamedTuple, get_args, get_type_hints

import pytest

from tests.cli.test_cli import lorafusion
from tests.cli.test_outputs import ALL


class Parameter(NamedTuple):
    """A parameter of a command: its place in the signature, as typer shall read it, and the kinds of its values."""

    command: str
    name: str
    default: object
    info: object
    kinds: set[type]

    @property
    def is_option(self) -> bool:
        return type(self.info).__name__ == "OptionInfo"

    @property
    def words(self) -> list[str]:
        """How an option is named on a command line; none for an argument."""
        named = [word for word in self.info.param_decls or () if word.startswith("--")]
        return (named or [f"--{self.name.replace('_', '-')}"]) if self.is_option else []


def parameters() -> list[Parameter]:
    out = []
    for command, registered in ALL.items():
        hints = get_type_hints(registered.callback, include_extras=True)
        for name, parameter in inspect.signature(registered.callback).parameters.items():
            kind, info, *_ = get_args(hints[name])
            out.append(Parameter(command, name, parameter.default, info, set(get_args(kind) or [kind]) - {NoneType}))
    return out


PARAMETERS = parameters()
NUMBERS = [parameter for parameter in PARAMETERS if parameter.kinds & {int, float}]
WORDS = [parameter for parameter in PARAMETERS if bool not in parameter.kinds]


def call(parameter: Parameter, value: str):
    """A command with a value for one of its parameters, and something for those that it must have."""
    others = [other for other in PARAMETERS if other.command == parameter.command and other != parameter]
    line = [*parameter.command.split(), *parameter.words, value]
    for other in others:
        if other.default is inspect.Parameter.empty or (not parameter.is_option and not other.is_option):
            line += [*other.words, "2" if other.kinds & {int, float} else "none"]
    return lorafusion(*line)


@pytest.mark.parametrize("parameter", NUMBERS, ids=lambda parameter: f"{parameter.command} {parameter.name}")
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0", "1e30", "1" + "0" * 30, "9" * 5000, "x"])
def test_a_number_is_in_its_range(parameter, value):
    assert parameter.info.min is not None
    assert parameter.info.max is not None
    if value == "0" and parameter.info.min <= 0:
        return
    done = call(parameter, value)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: Invalid value for '{parameter.words[0]}': ")
    assert f"(found '{value}')" in line or len(value) > 80
    assert len(line) <= 300


@pytest.mark.parametrize("parameter", WORDS, ids=lambda parameter: f"{parameter.command} {parameter.name}")
def test_nothing_is_no_value(parameter):
    done = call(parameter, "")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert len(line) <= 300
