"""What a command says of its work, by the standard library's `logging` on standard error.

Every module logs to `logging.getLogger(__name__)`. A program that imports the package sets logging up as it likes.
"""

from __future__ import annotations

import logging
import os
import sys

LEVEL = "LORAFUSION_LOG_LEVEL"  # in the environment: from the command line to the processes that it starts


class _StandardError(logging.Handler):
    """Plain lines: a message as it is, a warning with that word before it, and on DEBUG the time and the logger."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if logging.getLogger("lorafusion").level <= logging.DEBUG:
            text = f"{self.formatter.formatTime(record)} {record.name}: {text}" if self.formatter else text
        print(text, file=sys.stderr, flush=True)


def start_logging(level: int | None = None) -> None:
    """Send this package's messages of a level or above to standard error, and those of the processes that this one
    starts. level: by default that of the process that started this one, or else INFO."""
    level = level or int(os.environ.get(LEVEL, logging.INFO))
    os.environ[LEVEL] = str(level)
    logger = logging.getLogger("lorafusion")
    logger.setLevel(level)
    if not logger.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter())
        logger.addHandler(handler)
