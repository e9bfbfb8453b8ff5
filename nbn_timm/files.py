"""Files that are written whole or not at all, and the digests that identify them."""
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from nbn_timm.errors import InputError, in_words, quoted

T = TypeVar('T')

_LOCK = '.nbn_timm-lock'  # in a folder of unfinished files; held as long as the process that writes them lives
_SLOWEST = 10_000  # bytes per second that a server has to keep up
_MOST_LINKS = 40  # that a system follows
_DESCRIPTOR = re.compile(r'/dev/(stdout|stderr)|(?:/dev|/proc/self)/fd/(\d+)')


def atomic_write(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file through a temporary one beside it, so that a crash at any moment leaves the old file or the new one.

    What `path` names keeps its kind: a link still points to its file, which is replaced and keeps its permissions; a
    pipe, a device or /dev/stdout is written into when the content is complete.

    Args:
        path: Destination; its folder is created.
        write: Called with a temporary path of the same file name, which it must fill.

    Raises:
        InputError: The file system refused (disk full, no permission); a previous file at `path` is untouched.
    """
    path = _destination(path)
    special = _descriptor(path) is not None or (path.exists() and not (path.is_file() or path.is_dir()))
    try:
        if special:
            _write_into(path, write)
        else:
            _replace_file(Path(os.path.realpath(path)), write)
    except BrokenPipeError:
        raise
    except BaseException as error:
        reason = _refusal(error)
        if reason is None:
            raise
        kept = '' if special else ('; the file of that name that was there before is intact' if path.exists() else
                                   '; no file was left behind')
        raise InputError(
            f"cannot write '{path}' ({reason}{kept}): free some space or choose another output folder") from error


def _replace_file(path: Path, write: Callable[[Path], None]) -> None:
    with _workspace(path) as folder:
        new = folder / path.name
        new.touch(mode=0o600)
        write(new)
        # Afterwards, as safetensors replaces the file by one of its own.
        os.chmod(new, path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        _flush(new)
        os.replace(new, path)


def _write_into(path: Path, write: Callable[[Path], None]) -> None:
    """Write into what is no regular file; a descriptor of this process goes on where it is."""
    with tempfile.TemporaryDirectory() as folder:
        complete = Path(folder, path.name)
        complete.touch()
        write(complete)
        descriptor = _descriptor(path)
        target: int | Path = path
        if descriptor is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            target = os.dup(descriptor)
        with open(target, 'wb') as there, open(complete, 'rb') as here:
            shutil.copyfileobj(here, there)


def _destination(path: str | Path) -> Path:
    """A path to write to.

    Raises:
        InputError: No file can be called so.
    """
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # ValueError of a null character
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f'nothing can be written to {quoted(str(path))} '
                             f'({getattr(error, "strerror", None) or error}): choose another name') from error
    return Path(path)


def _descriptor(path: Path) -> int | None:
    """The descriptor of this process that a path names, itself or through links; None if there is none."""
    for _ in range(_MOST_LINKS):
        if (found := _DESCRIPTOR.fullmatch(str(path))) is not None:
            return {'stdout': 1, 'stderr': 2}[found[1]] if found[1] else int(found[2])
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    return None


@contextmanager
def prints_beside(*outputs: str | Path | None) -> Iterator[None]:
    """Print to the standard error within the body where one of the outputs is the standard output."""
    if any(output is not None and _is_standard_output(output) for output in outputs):
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def _is_standard_output(path: str | Path) -> bool:
    try:
        there, out, nowhere = os.stat(path), os.fstat(1), os.stat(os.devnull)
    except OSError:  # one of them is not there
        return False
    return os.path.samestat(there, out) and not os.path.samestat(there, nowhere)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_bytes_atomic(path, text.encode('utf-8'))


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content`, whole or not at all."""
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    atomic_write(path, write)


def write_folder(folder: str | Path, fill: Callable[[Path], None], replaceable: Collection[str] = ()) -> None:
    """Write a folder through a temporary neighbour, so that it appears whole or not at all.

    An older folder is there until the new one is: where the system can, the two change places in one step. Where it
    cannot, a crash between two steps leaves both beside that place, and the next call puts the old one back.

    Args:
        folder: Destination; the folder it lies in is created.
        fill: Called with the temporary folder, which it must fill with files.
        replaceable: Names of files that an older folder in that place may have, and nothing else; it is replaced.

    Raises:
        InputError: There is a folder with other content, or the file system refused; what was there is untouched.
    """
    folder = _destination(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"'{folder}' is a file: choose another output folder")
    target = Path(os.path.realpath(folder))
    try:
        with _workspace(target) as temporary:
            _check_replaceable(folder, replaceable)
            new = temporary / 'new'
            new.mkdir()
            fill(new)
            for path in new.iterdir():
                os.chmod(path, 0o666 & ~_umask())  # safetensors makes its files private
                _flush(path)
            if target.exists():
                os.chmod(new, target.stat().st_mode & 0o7777)
            _put_in_place(new, target, temporary / 'old')
    except BaseException as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise InputError(
            f"cannot write '{folder}' ({reason}): free some space or choose another output folder") from error


def _put_in_place(new: Path, target: Path, old: Path) -> None:
    if target.exists() and _exchange(new, target):
        return
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one step; false where the system cannot."""
    at_cwd, exchange = -100, 2  # of Linux
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path` for what is to become it; what killed processes left of theirs is cleared away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    folder, lock = _own_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            lock.release()


def _own_folder(path: Path) -> tuple[Path, FileLock | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent))
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:  # another process took it for a leftover
            continue
        except (OSError, NotImplementedError):  # a file system without locks
            return folder, None
        return folder, lock


def clear_leftovers(path: Path) -> None:
    """Remove the unfinished files for `path` whose writers are dead, and put back a folder that one had taken away."""
    for leftover in path.parent.glob(f'.{glob.escape(path.name)}.{"?" * 8}.tmp'):
        if not (leftover / _LOCK).exists():
            with suppress(OSError):
                leftover.rmdir()  # its writer died before it had begun; not empty, it is none of ours
            continue
        with suppress(Timeout, OSError, NotImplementedError), FileLock(leftover / _LOCK).acquire(timeout=0):
            if (leftover / 'old').is_dir() and not path.exists():
                os.replace(leftover / 'old', path)
            shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, 'rb') as file:
        os.fsync(file.fileno())


def _check_replaceable(folder: Path, replaceable: Collection[str]) -> None:
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = next((name for name in there if name not in replaceable), None)
    if foreign is not None:
        remedy = 'choose another output folder' if replaceable else 'choose another output folder or add --overwrite'
        raise InputError(f"the folder '{folder}' is not empty (it has '{foreign}'): {remedy}")


def refuse_no_file(*paths: str | os.PathLike[str], or_folder: bool = False) -> None:
    """Refuse what is there in the place of a file, but is none, as a pipe that the shell makes of `<(command)`.

    Args:
        paths: Where a file may be.
        or_folder: A folder is right too.

    Raises:
        InputError: Names the first.
    """
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except (OSError, ValueError):  # it is not there, or no file can be called so
            continue
        if stat.S_ISREG(mode) or (or_folder and stat.S_ISDIR(mode)):
            continue
        kinds = {stat.S_ISDIR: 'folder', stat.S_ISFIFO: 'pipe', stat.S_ISSOCK: 'socket'}
        kind = next((kind for test, kind in kinds.items() if test(mode)), 'device')
        wanted = 'a file or a folder' if or_folder else 'a file'
        raise InputError(f'{quoted(os.fspath(path))} is a {kind} and no file: give {wanted}')


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading, and nothing that could keep its reader waiting: no pipe, socket or device.

    Raises:
        OSError: It is not there, may not be read, or is something else than a file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_BINARY', 0))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.EINVAL, 'it is a socket and no regular file', os.fspath(path)) from error
        raise
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


def read_json_object(path: str | os.PathLike[str], what: str, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: Of the file.
        what: The file, in words for people.
        remedy: What to do about one that is damaged or something else, for the sentence.

    Raises:
        InputError: It is not there, cannot be read, or holds something else.
    """
    try:
        with open_regular(path) as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f'{what} cannot be read ({in_words(error)}): {remedy}') from error
    if not isinstance(data, dict):
        raise InputError(f'{what} is no JSON object: {remedy}')
    return data


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those it lies in, unless it is there.

    Raises:
        InputError: It cannot be made, as where a file is in its place.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise InputError(f'the folder {quoted(str(path))} cannot be made ({reason}): choose another one') from error


def watched(download: Callable[[], T], place: Path, patience: float) -> T:
    """Run a download, of whosever code, that must not only trickle.

    It runs in a thread. Where it is given up, the thread stays behind, since what waits for a server cannot be stopped,
    and ends with the process at the latest.

    Args:
        download: Makes a file or folder grow.
        place: That file or folder.
        patience: Seconds that the whole may take beyond what a slow connection needs.

    Returns:
        What `download` returns.

    Raises:
        TimeoutError: It takes longer. What `download` raises is raised as well.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(download())
        except BaseException as error:  # is raised below
            result.set_exception(error)

    begun, before = time.monotonic(), _size(place)
    Thread(target=run, daemon=True).start()
    while not wait([result], timeout=min(1.0, patience / 10)).done:
        got = max(0, _size(place) - before)
        if time.monotonic() - begun > patience + got / _SLOWEST:
            raise TimeoutError(f'it is slower than {_SLOWEST / 1000:g} kB/s')
    return result.result()


def _size(place: Path) -> int:
    """Bytes of a file, or of all files in and below a folder; 0 where there is none."""
    total = 0
    for path in [place, *place.rglob('*')]:
        with suppress(OSError):  # it has been renamed meanwhile
            found = path.stat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


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
