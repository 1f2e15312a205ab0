"""Progress bars."""

from rich.console import Console
from rich.progress import Progress


def progress(show: bool = True) -> Progress:
    """A bar on standard error for work that takes long, where that is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not (show and console.is_terminal))
