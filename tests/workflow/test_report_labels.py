"""The labels of what the rules put into report.html, in every suite: Snakemake's page needs more than it says.

Where a label but the first has two values, each for half of a list of results, the page offers a toggle, and breaks
where a result has no counterpart. A list is a category or what a search finds, so that no care with values helps: one
label has no toggle. Two results with the same label in a category would be one line.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

import pytest

from lorafusion.core.config import CONFIGS

RULES = sorted((CONFIGS.parent / "workflow" / "rules").glob("*.smk"))
WILDCARD = re.compile(r"\{(\w+)\}")


class Result(NamedTuple):
    """A call of report() in a rule. path: with the names of settings and wildcards in braces."""

    rules: str
    path: str
    category: str
    labels: dict[str, str]


def results() -> list[Result]:
    found = []
    for rules in RULES:
        text = rules.read_text()
        for start in (match.end() - 1 for match in re.finditer(r"\breport\(", text)):
            call = ast.parse("report" + text[start : end_of_call(text, start)], mode="eval").body
            options = {keyword.arg: keyword.value for keyword in call.keywords}
            path = "".join(
                part.value if isinstance(part, ast.Constant) else "" for part in getattr(call.args[0], "values", [])
            )
            category, labels = (ast.literal_eval(options[name]) for name in ("category", "labels"))
            found.append(Result(rules.name, path, category, labels))
    return found


def end_of_call(text: str, start: int) -> int:
    """Where the parenthesis at `start` is closed; those in strings are paired too."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise AssertionError(text[start : start + 80])


RESULTS = results()


def test_all_kinds_of_rules_have_results():
    assert {result.rules for result in RESULTS} >= {"check.smk", "report.smk", "kernels.smk", "training.smk"}
    assert {result.category for result in RESULTS} == {"Checks", "Figures", "Measurements"}


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: f"{result.rules}:{result.labels.get('content')}")
def test_a_result_has_one_label_which_no_other_has(result):
    assert list(result.labels) == ["content"]
    same = [other for other in RESULTS if (other.category, other.labels) == (result.category, result.labels)]
    assert same == [result]
    assert set(WILDCARD.findall(result.path)) <= set(WILDCARD.findall(result.labels["content"]))
