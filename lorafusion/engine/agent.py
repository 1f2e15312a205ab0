"""torchrun, which starts a node's processes and watches them; it ends as the first of them that failed did.

By itself torchrun ends with status 1, whatever happened. The launcher must know whether a process was killed from
outside or crashed.
"""

import json
import logging
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from lorafusion.core.files import write
from lorafusion.launch.heartbeat import FIRST
from lorafusion.launch.network import network_failure

AGENT_LOG = logging.getLogger("torch.distributed.elastic.agent.server.api")
AT_ONCE = 5  # seconds; those that torchrun itself kills have had 30 to end


def main() -> None:
    reports = Path(sys.argv[-1])
    # The first node's store, at which nodes wait for each other at the end, may be gone by then: that is no error.
    AGENT_LOG.addFilter(lambda record: "exit barrier" not in str(record.msg))
    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        rank, killed = first_failure(error)
        with suppress(OSError), open(reports / FIRST, "x") as file:  # OSError: a full disk, or another node was first
            file.write(str(rank))
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(1)
    except (dist.DistError, RendezvousError) as error:
        report_no_rendezvous(error, sys.argv, reports)
        raise


def report_no_rendezvous(error: Exception, arguments: list[str], reports: Path) -> None:
    """Leave a report of why no worker was started, with the place at which the nodes were to meet."""
    options = dict(argument.split("=", 1) for argument in arguments if re.match("--[a-z-]+=", argument))
    failure = {"status": "crash", "message": network_failure(f"the rendezvous at {options['--rdzv-endpoint']}", error)}
    write(reports / f"failure-node-{options.get('--node-rank', 0)}.json", json.dumps(failure))


def first_failure(error: ChildFailedError) -> tuple[int, bool]:
    """The rank that failed first, and whether SIGKILL ended it; one that was killed comes before others of about that
    time, which may only have missed it."""
    first, failure = error.get_first_failure()
    at_once = {rank: other for rank, other in error.failures.items() if other.timestamp < failure.timestamp + AT_ONCE}
    killed = [rank for rank, other in at_once.items() if other.exitcode == -signal.SIGKILL]
    return (killed[0], True) if killed else (first, False)


if __name__ == "__main__":
    main()
