"""torchrun, which starts a node's processes and watches them; it ends as the first of them that failed did.

By itself torchrun ends with status 1, whatever happened. The launcher must know whether a process was killed from
outside or crashed.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from lorafusion.launch.heartbeat import FIRST

AT_ONCE = 5  # seconds; those that torchrun itself kills have had 30 to end


def main() -> None:
    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        rank, _ = error.get_first_failure()
        with suppress(OSError):  # of a full disk, say
            (Path(sys.argv[-1]) / FIRST).write_text(str(rank))  # the last argument is the folder of reports
        end_as(error)


def end_as(error: ChildFailedError) -> None:
    """End this process by SIGKILL if one of the first to fail was, else with status 1."""
    first = min(failure.timestamp for failure in error.failures.values())
    codes = [failure.exitcode for failure in error.failures.values() if failure.timestamp < first + AT_ONCE]
    if -signal.SIGKILL in codes:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(1)


if __name__ == "__main__":
    main()
