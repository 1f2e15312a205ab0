"""The files of a model or a tokenizer, in a local folder or in a repository of the Hugging Face hub, which its cache
stands for where there is no network. Code that lies among them is never run, and none is read that lies elsewhere."""

import logging
import os
from pathlib import Path, PurePosixPath

import httpx
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lorafusion.core.files import read_json
from lorafusion.core.schema import UserError

LOGGER = logging.getLogger(__name__)
# No such repository, no access to it, no connection, offline mode: all of them the user's to mend.
HUB_ERRORS = (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError)


def file_of(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a local folder or a repository, which is fetched; None where it has none of this name."""
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        if not os.path.lexists(path):
            return None
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: expected a regular file, found a folder, a pipe or a link to nothing")
        return _inside(path, folder)
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError as error:
        # Else it is asked for each file that the cache lacks, for half a minute.
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            LOGGER.warning("the Hugging Face hub cannot be reached; its cache has to do")
            constants.HF_HUB_OFFLINE = True
            os.environ["HF_HUB_OFFLINE"] = "1"
        return None
    except HUB_ERRORS as error:
        reason, at = " ".join(str(error).split())[:120], f" of revision {revision!r}" if revision else ""
        message = f"model {source!r}{at}: neither a local folder nor to be had from the hub ({reason})"
        raise UserError(message) from None


def file_at_hand(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file as `file_of` has it, where it need not be fetched. Raises `UserError` for one that cannot be."""
    if Path(source).is_dir():
        path = file_of(source, name)
        missing = "the folder has no such file"
    else:
        cached = try_to_load_from_cache(source, name, revision=revision)
        path = Path(cached) if isinstance(cached, str) else None
        missing = "the hub's cache has no such file, and the hub is not asked" if constants.HF_HUB_OFFLINE else ""
    if path is None and missing:
        raise UserError(f"{source}: {name}: {missing}")
    return path


def is_inside(name: str) -> bool:
    """Does a name lead to a file of the folder that it is relative to?"""
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def read_settings(source: str, name: str, revision: str | None = None) -> dict | None:
    """The object in a JSON file of a folder or repository; None where there is none. Raises `UserError` where it asks
    for code of its own to be run."""
    path = file_of(source, name, revision)
    if path is None:
        return None
    settings = read_json(path, "model configuration")
    if settings.get("auto_map"):
        raise UserError(
            f"{source}/{name}: auto_map: it names code of its own, which is never run; expected a model and a "
            "tokenizer that transformers has itself"
        )
    return settings


def require_no_links(source: str) -> None:
    """Raise `UserError` where a file of a local folder is a link out of it."""
    folder = Path(source)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and path.is_file():
            _inside(path, folder)


def absent(source: str, names: str, hint: str = "") -> UserError:
    """The error of a model that has none of some files."""
    if Path(source).is_dir():
        return UserError(f"{source}: {names}{hint}")
    at = "it is not asked (HF_HUB_OFFLINE) or not reached, and its cache has" if constants.HF_HUB_OFFLINE else "it has"
    return UserError(f"model {source!r}: neither a local folder nor to be had from the hub: {at} {names}")


def _inside(path: Path, folder: Path) -> Path:
    """A path that no link leads out of its folder; those of the hub's cache lead to the files beside its folders."""
    root, place = folder.resolve(), path.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(place.is_relative_to(allowed) for allowed in roots):
        raise UserError(f"{path}: a link to {place}, expected a file of the folder itself")
    return path
