"""Everything in a training's folder is changed, one thing at a time: the same command then ends with the right bits, or
refuses in one line.

`python -m tests.torture.training_damage COUNT SEED FOLDER` prints what went wrong.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.torture.toy_training import MOST_SECONDS, SETTINGS, Command, adopting, jobs_file, left_behind, reap, results

DONE, STOPPED, MOST_CHARACTERS = 0, 75, 300
Damage = Callable[[Path], None]


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << int(place * 7919) % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_link(path: Path) -> None:
    """To what it was."""
    target = path.with_name(f"{path.name}-moved")
    path.rename(target)
    path.symlink_to(target.name)


def change_a_digit(path: Path) -> None:
    """The first digit of a file of text, else its last byte: what stays readable."""
    data = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(data) if chr(byte).isdigit()] or [len(data) - 1]
    data[places[0]] = ord("1") + (data[places[0]] - ord("0")) % 9
    path.write_bytes(data)


CHANGES: dict[str, Damage] = {
    "a bit at the beginning": lambda path: flip(path, 0.02),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "a bit at the end": lambda path: flip(path, 0.999),
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "grown": grow,
    "deleted": lambda path: path.unlink(),
    "a folder": become_a_folder,
    "a link": become_a_link,
    "another digit": change_a_digit,
}  # fmt: skip


def exchanged(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def slots(folder: Path) -> list[Path]:
    return sorted(folder.glob("out/runs/*/checkpoints/slot-*"))


def of_the_folder(folder: Path) -> dict[str, Damage]:
    """Damages to more than one file."""
    damages: dict[str, Damage] = {}
    for path in [*slots(folder), *(path for path in folder.glob("out/*") if path.is_dir()), folder / "out/runs/000"]:
        name = str(path.relative_to(folder))
        damages[f"{name}: deleted"] = lambda root, name=name: shutil.rmtree(root / name)
        damages[f"{name}: renamed"] = lambda root, name=name: (root / name).rename(root / f"{name}1")
        damages[f"{name}: emptied"] = lambda root, name=name: [
            path.unlink() for path in (root / name).rglob("*") if path.is_file()
        ]
    for pattern in ("out/state/*", "out/runs/*/checkpoints/slot-*", "out/adapters/*", "out/runs/*/*.json",
                    "out/runs/*/checkpoints/slot-*/*"):  # fmt: skip
        paths = sorted(folder.glob(pattern))
        for first, second in zip(paths, paths[1:], strict=False):
            names = [str(path.relative_to(folder)) for path in (first, second)]
            damages[" and ".join(names) + ": exchanged"] = lambda root, names=names: exchanged(
                *(root / name for name in names)
            )
    return damages


def of_its_files(folder: Path) -> dict[str, Damage]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and path.parent != folder]
    names = sorted(str(path.relative_to(folder)) for path in files if "tmp" not in path.relative_to(folder).parts)
    return {
        f"{name}: {what}": lambda root, name=name, change=change: change(root / name)
        for name in names
        for what, change in CHANGES.items()
    }


def stopped(folder: Path, run: str, **changes) -> None:
    """Train in a folder until a run has two checkpoints, and have it save and end then."""
    command = Command(jobs_file(folder, **changes))
    while command.wait(0.005) is None:
        if len(list(folder.glob(f"out/runs/{run}/checkpoints/slot-*/manifest.json"))) >= 2:
            command.process.send_signal(signal.SIGTERM)
            break
    if command.wait(MOST_SECONDS) != STOPPED:
        raise RuntimeError(f"{folder}: {command.output}")


def run(count: int, seed: int, folder: Path) -> list[str]:
    """Do `count` different damages to trainings that were stopped, that go on after a change of jobs, and that have
    ended; what went wrong, a line each."""
    return [f"{name}: {failure}" for name, failure in tried(count, seed, folder).items() if failure]


def tried(count: int, seed: int, folder: Path) -> dict[str, str]:
    """What was tried, with what went wrong."""
    outcomes: dict[str, str] = {}
    with adopting():
        sources = _sources(folder)
        damages = {
            f"{name}, {what}": (source, change)
            for name, source in sources.items()
            for what, change in (of_its_files(source) | of_the_folder(source)).items()
        }
        for index, name in enumerate(random.Random(seed).sample(sorted(damages), min(count, len(damages)))):
            source, change = damages[name]
            place = folder / f"damaged-{index}"
            shutil.copytree(source, place, symlinks=True)
            change(place)
            outcomes[name] = _outcome(place, source.with_name(f"{source.name}-whole"))
            if not outcomes[name]:
                shutil.rmtree(place)
    return outcomes


def _sources(folder: Path) -> dict[str, Path]:
    """Trainings to be damaged, each beside one that was not and has ended, `NAME-whole`."""
    folder.mkdir(parents=True, exist_ok=True)
    stopped(folder / "stopped", "000")
    shutil.copytree(folder / "stopped", folder / "changed")
    stopped(folder / "changed", "001", jobs=[*SETTINGS["jobs"], {"name": "late", "seed": 3}])
    shutil.copytree(folder / "stopped", folder / "ended")
    for name in ("stopped", "changed", "ended"):
        whole = folder / f"{name}-whole"
        shutil.copytree(folder / name, whole)
        if Command(whole / "jobs.yaml").wait(MOST_SECONDS) != DONE:
            raise RuntimeError(f"{whole}: a training without damage failed")
    shutil.rmtree(folder / "ended")
    shutil.copytree(folder / "ended-whole", folder / "ended")
    return {name: folder / name for name in ("stopped", "changed", "ended")}


def _outcome(place: Path, whole: Path) -> str:
    command = Command(place / "jobs.yaml")
    code = command.wait(MOST_SECONDS)
    reap()
    lines = command.output.splitlines()
    if code == DONE:
        ours, theirs = results(place), results(whole)
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        left = left_behind(place)
        return f"not the right bits: {different}" if different else f"left behind: {left}" if left else ""
    if code not in (1, 2) or not lines or not lines[-1].startswith("error: ") or len(lines[-1]) > MOST_CHARACTERS:
        return f"ended with {code}: {' '.join(command.output[-600:].split())}"
    return ""


if __name__ == "__main__":
    begin = time.monotonic()
    outcomes = tried(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print(*(f"{name}: {failure}" for name, failure in outcomes.items() if failure), sep="\n")
    print(f"{len(outcomes)} damages in {time.monotonic() - begin:.0f} s")
