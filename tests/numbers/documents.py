"""The documents as they are."""

from __future__ import annotations

from lorafusion.core.config import CONFIGS

ROOT = CONFIGS.parent


def read(document: str) -> str:
    return (ROOT / document).read_text()
