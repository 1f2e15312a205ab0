"""The command that a launcher starts: the worker, which ends with its launcher from the first moment on, and not only
after the seconds that its imports take."""

import sys

from lorafusion.launch.launch import end_with_launcher


def main() -> int:
    end_with_launcher()
    from lorafusion.engine import worker

    return worker.main(*sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
