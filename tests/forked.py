"""Runs of tests that ask what is computed, and not how processes are started: forked ones, of one thread."""

from __future__ import annotations

import os
from functools import partial

from lorafusion.runtime import forked

# pytest: it is the main module of these processes, too.
forked.preload("pytest")


class Forked(forked.Forked):
    """Sums do not depend on how many threads there were."""

    def __init__(self, *arguments) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        super().__init__(*arguments)


launch = partial(forked.launch_any, start=Forked)
place_of = forked.place_of
