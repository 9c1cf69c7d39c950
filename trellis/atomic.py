"""`atomic_path`: a file is either written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that nothing can be written any more, whatever is tried next."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` when the block ends without an error.

    The temporary file lies in the same folder (a rename across file systems would be a copy) and has the same suffix
    (writers that go by the suffix work). After an error, Ctrl-C included, it is gone and a former `path` is untouched.
    Missing parent folders are made.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: the block wrote nothing.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file; got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by the owner alone, and a rename would keep that. So are those of
    # safetensors: the permissions of an ordinary new file are looked up first and given at the end.
    temporary = path.with_name(f".{path.stem[:100]}.{secrets.token_hex(8)}{path.suffix}")
    temporary.touch()
    permissions = temporary.stat().st_mode
    temporary.unlink()
    try:
        yield temporary
        temporary.chmod(permissions)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
