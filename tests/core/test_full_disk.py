"""An error of a full disk says which file, and how much is free."""

from __future__ import annotations

import errno
import os
import re

import pytest
from safetensors import SafetensorError

from lorafusion.core.files import FullDiskError, whole, write, writing


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space (os error 28)")]
)
def test_it_names_the_file_and_the_room(tmp_path, error):
    path = tmp_path / "new" / "file"
    with pytest.raises(FullDiskError) as caught, whole(path), writing(tmp_path / "inner"):
        raise error
    assert caught.value.filename == str(tmp_path / "inner")
    assert re.fullmatch(r"No space left on device, \d+\.\d MiB are free there", caught.value.strerror)
    assert not path.exists()


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(SafetensorError, match="not contiguous"), writing(tmp_path):
        raise SafetensorError("not contiguous")
    with pytest.raises(PermissionError), writing(tmp_path):
        raise PermissionError(errno.EACCES, "no", "other")
    write(tmp_path / "file", "text")
