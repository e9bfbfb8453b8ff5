"""Files that are written whole or not at all, and the digests that identify them."""
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from nbn_timm.errors import InputError


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file through a temporary neighbour, so that a crash at any moment leaves the old file or the new one.

    Args:
        path: Destination; its folder is created.
        write: Called with the temporary path, which it must fill.

    Raises:
        InputError: The file system refused (disk full, no permission); a previous file at `path` is untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # afterwards, as safetensors replaces the file by one of its own
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        reason = _refusal(error)
        if reason is None:
            raise
        kept = 'the file of that name that was there before is intact' if path.exists() else 'no file was left behind'
        raise InputError(
            f"cannot write '{path}' ({reason}; {kept}): free some space or choose another output folder") from error


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding='utf-8')

    atomic_write(path, write)


def write_folder(folder: str | Path, fill: Callable[[Path], None], replaceable: Collection[str] = ()) -> None:
    """Write a folder through a temporary neighbour, so that it appears whole or not at all.

    Args:
        folder: Destination; the folder it lies in is created.
        fill: Called with the temporary folder, which it must fill with files.
        replaceable: Names of files that an older folder in that place may have, and nothing else; it is replaced.

    Raises:
        InputError: There is a folder with other content, or the file system refused; what was there is untouched.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: choose another output folder")
    _check_replaceable(folder, replaceable)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', suffix='.tmp', dir=folder.parent))
        new, old = temporary / 'new', temporary / 'old'
        new.mkdir()
        fill(new)
        for path in new.iterdir():
            os.chmod(path, 0o666 & ~_umask())  # safetensors makes its files private
            with open(path, 'rb') as file:
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    except BaseException as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise InputError(
            f"cannot write '{folder}' ({reason}): free some space or choose another output folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, replaceable: Collection[str]) -> None:
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = next((name for name in there if name not in replaceable), None)
    if foreign is not None:
        remedy = 'choose another output folder' if replaceable else 'choose another output folder or add --overwrite'
        raise InputError(f"the folder '{folder}' is not empty (it has '{foreign}'): {remedy}")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, and nothing that could keep its reader waiting: no pipe, socket or device.

    Raises:
        OSError: It is not there, may not be read, or is something else than a file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, 'it is a pipe or a device and no regular file', os.fspath(path))
        return os.fdopen(handle, 'rb')
    except BaseException:
        os.close(handle)
        raise


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else _digest(file)


def git_blob_id(path: str | Path) -> str:
    """The id git gives a file of this content (SHA-1 over `blob <size>\\0<content>`)."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refusal(error: BaseException) -> str | None:
    """The operating system's reason if `error` is, or wraps, a refused write."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save's zip writer reports a failed write as a RuntimeError, sometimes without the cause.
    if isinstance(error, RuntimeError) and 'PytorchStreamWriter' in str(error):
        return 'the write was cut short, as by a full disk'
    return None
