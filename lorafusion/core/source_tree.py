"""Which state of this project a number comes from: its commit, and a hash of its source files.

The hash is the same with and without a repository, so that what was measured in a copy without history can be tied to a
commit: `lorafusion lab tree-hash COMMIT` prints that of a commit.
"""

import hashlib
import os
import subprocess
from pathlib import Path

from lorafusion.core.schema import UserError

# Of the checkout; where the package was installed without one, the folder of all packages.
ROOT = Path(__file__).parents[2]
IS_CHECKOUT = (ROOT / "configs" / "systems.yaml").is_file()
SOURCES = ("lorafusion", "kernels", "baselines", "configs", "workflow", "Snakefile", "pyproject.toml",
           "requirements.lock")  # fmt: skip
# What installing and running leave among the sources.
MADE = {"__pycache__", "build", "dist"}


def state(root: Path = ROOT) -> dict[str, str | bool | None]:
    """`git_sha` and `git_dirty`, None where the project is not a repository of its own, and `tree_hash`."""
    digest = tree_hash(root)
    if not is_repository(root):
        return {"git_sha": None, "git_dirty": None, "tree_hash": digest}
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changed = commit is None or bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    return {"git_sha": commit, "git_dirty": changed or commit_tree_hash("HEAD", root) != digest, "tree_hash": digest}


def is_repository(root: Path) -> bool:
    """Is a folder the top level of a repository? One that encloses the folder is somebody else's."""
    top = _git(root, "rev-parse", "--show-toplevel")
    return top is not None and Path(top).resolve() == root.resolve()


def tree_hash(root: Path = ROOT) -> str:
    """Sixteen hexadecimal digits that change with the name or the content of any source file."""
    blobs = {}
    for name in SOURCES:
        for path in _files(root / name):
            content = path.read_bytes()
            # As git names a content, which it then need not read again to name a commit's.
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            blobs[path.relative_to(root).as_posix()] = blob
    return _hash(blobs)


def commit_tree_hash(commit: str, root: Path = ROOT) -> str:
    """The hash of the source files of a commit of the repository at `root`."""
    listed = _git(root, "ls-tree", "-r", "-z", f"{commit}^{{commit}}", "--", *SOURCES)
    if listed is None:
        raise UserError(f"{root}: git finds no commit {commit!r} there")
    blobs = {}
    for line in filter(None, listed.split("\0")):
        (_, _, blob), path = line.partition("\t")[0].split(), line.partition("\t")[2]
        if _is_source(Path(path)):
            blobs[path] = blob
    return _hash(blobs)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if _is_source(Path(name))]
        files += [Path(folder) / name for name in names if _is_source(Path(name))]
    return files


def _is_source(path: Path) -> bool:
    generated = any(part in MADE or part.startswith(".") or part.endswith(".egg-info") for part in path.parts)
    return not generated and path.suffix != ".pyc"


def _hash(blobs: dict[str, str]) -> str:
    lines = "".join(f"{blob} {path}\n" for path, blob in sorted(blobs.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _git(root: Path, *arguments: str) -> str | None:
    """What git says of the folder itself, whatever the environment says of another; None where it says nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
