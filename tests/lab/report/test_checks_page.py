"""The page of checks reads verdicts to the letter: what is no verdict, or does not bear itself out, is not shown."""

from __future__ import annotations

import json
import math

import pytest

from lorafusion.core.schema import UserError
from lorafusion.core.seals import sealed
from lorafusion.lab.report.pages import checks_page

ERROR = "together: relative difference of a loss"
VERDICT = {
    "check": "lossless",
    "passed": True,
    "statement": "two adapters <together> equal each alone",
    "figures": {ERROR: 2e-16, "adapters": 2},
    "limits": {ERROR: 1e-7},
    "origin": {"suite": "smoke", "device": "cpu", "dtype": "float64", "gpu_name": None, "code": None},
}


@pytest.fixture
def page(tmp_path):
    def made(**changes) -> str:
        path = tmp_path / "lossless.json"
        path.write_text(json.dumps(sealed(VERDICT | changes)))
        return checks_page([path])

    return made


def test_a_verdict_is_shown_with_its_figures_and_limits(page):
    shown = page()
    assert "<span class='ok'>passed</span>" in shown
    assert "two adapters &lt;together&gt; equal" in shown
    assert "<td class='number'>2e-16</td><td class='number'>1e-07</td>" in shown


def test_a_check_that_failed_is_shown_as_failed(page):
    shown = page(passed=False, figures={ERROR: math.inf})
    assert "<span class='failed'>FAILED</span>" in shown
    assert "passed</span>" not in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passed": "no"}, "passed: input should be a valid boolean"),
        ({"passed": "yes"}, "passed: input should be a valid boolean"),
        ({"passed": 1}, "passed: input should be a valid boolean"),
        ({"passed": None}, "passed: input should be a valid boolean"),
        ({"figures": {ERROR: 2e-7}}, "passed, although .* is 2e-07, where at most 1e-07 is allowed"),
        ({"figures": {ERROR: math.nan}}, "passed, although .* is nan"),
        ({"figures": {ERROR: 0.0, "norm": math.inf}}, "passed, although 'norm' is inf"),
        ({"figures": {ERROR: "2e-16"}}, "figures"),
        ({"figures": {"adapters": 2}}, "limits: no figure"),
        ({"check": ""}, "check"),
        ({"origin": None}, "origin"),
        ({"more": 1}, "more"),
    ],
)
def test_a_verdict_that_is_none_is_refused(page, changes, message):
    with pytest.raises(UserError, match=rf"lossless\.json: .*{message}"):
        page(**changes)


@pytest.mark.parametrize("key", [name for name in VERDICT if name != "limits"])
def test_a_verdict_without_a_key_is_refused(tmp_path, key):
    path = tmp_path / "verdict.json"
    path.write_text(json.dumps({name: value for name, value in VERDICT.items() if name != key}))
    with pytest.raises(UserError, match=key):
        checks_page([path])


@pytest.mark.parametrize("text", ["", "{", '{"passed": false, "passed": true}', "[]"])
def test_a_file_that_was_cut_or_says_two_things_is_refused(tmp_path, text):
    path = tmp_path / "verdict.json"
    path.write_text(text)
    with pytest.raises(UserError, match="verdict"):
        checks_page([path])
