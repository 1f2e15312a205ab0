"""What --quiet and --verbose leave and add."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from lorafusion.core.log import LEVEL, Lasting, start_logging

LOGGER = logging.getLogger("lorafusion.train.run")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.setenv(LEVEL, str(logging.INFO))
    yield
    start_logging(logging.INFO)


def lines(capsys, level: int) -> list[str]:
    start_logging(level)
    LOGGER.debug("detail")
    LOGGER.info("progress")
    LOGGER.warning("trouble")
    return capsys.readouterr().err.splitlines()


def test_a_level_says_what_is_at_least_as_grave(capsys):
    assert lines(capsys, logging.WARNING) == ["warning: trouble"]
    assert lines(capsys, logging.INFO) == ["progress", "warning: trouble"]


def test_detail_has_time_and_place(capsys):
    said = lines(capsys, logging.DEBUG)
    assert len(said) == 3
    assert re.fullmatch(r"[\d-]+ [\d:,]+ lorafusion\.train\.run: detail", said[0])


def test_a_process_that_is_started_has_the_same_level():
    start_logging(logging.WARNING)
    code = (
        "import logging; from lorafusion.core.log import start_logging; start_logging(); "
        "LOGGER = logging.getLogger('lorafusion.engine.worker'); LOGGER.info('progress'); LOGGER.error('broken')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "error: broken\n"


def test_a_stream_whose_reader_is_gone_ends_nothing():
    outer, inner = os.pipe()
    stream = Lasting(os.fdopen(inner, "w", buffering=1))
    os.close(outer)
    for _ in range(3):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert not stream.isatty()
    stream.close()
