"""Systems under names that are not theirs, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from lorafusion.core import config

NEUTRAL = "arm-x"


@contextmanager
def named(names: dict[str, str]) -> Iterator[None]:
    """Within it systems.yaml has its entries under other names: names has the new one of each that has another."""
    read = config.read_entries

    def renamed(path, model):
        entries = read(path, model)
        return {names.get(name, name): entry for name, entry in entries.items()}

    with patch.object(config, "read_entries", renamed):
        yield


def exchanged(one: str, other: str):
    """Two systems have each other's names."""
    return named({one: other, other: one})
