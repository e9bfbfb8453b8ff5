"""Files of a server that the user names: kept when they have come whole and right, and only as long as it has them."""
import atexit
import base64
import hashlib
import http.client
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from nbn_timm.errors import InputError, in_words, quoted, without_password
from nbn_timm.files import atomic_write, file_sha256, read_json_object, watched, write_text_atomic

__all__ = ['NoSuchFile', 'fetched', 'is_address']

_LONGEST = 120  # characters of a name in the cache; what is longer is told by a digest

# As in PyTorch's files: the beginning of the SHA-256 before the suffix. What has no letter is a date or a step.
_NAMED_DIGEST = re.compile(r'-(?!\d+\.)([0-9a-f]{8,64})\.[a-z.]+$')

_logger = logging.getLogger(__name__)


class NoSuchFile(Exception):
    """A server answers that it does not have a file."""


class _Unreachable(InputError):
    """A server cannot be had, or refuses."""


class _Unchanged(Exception):
    """A server answers that it has what it had."""


@dataclass(frozen=True)
class _Origin:
    """What is known of a file in the cache, in a JSON file beside it.

    Attributes:
        sha256: Of the file.
        etag, last_modified: By which its server tells whether it has changed.
    """

    sha256: str
    etag: str | None = None
    last_modified: str | None = None

    @classmethod
    def of(cls, path: Path) -> '_Origin | None':
        """Of a file in the cache; None where it is not there, or not as it was fetched."""
        try:
            entries = read_json_object(_origin_file(path), '', '')
            found = cls(entries['sha256'], entries.get('etag'), entries.get('last_modified'))
            return found if file_sha256(path) == found.sha256 else None
        except (InputError, KeyError, OSError):
            return None

    @property
    def conditions(self) -> dict[str, str]:
        """Headers that ask for the file only if it has changed."""
        if self.etag:
            return {'If-None-Match': self.etag}
        return {'If-Modified-Since': self.last_modified} if self.last_modified else {}


def is_address(place: str) -> bool:
    """Whether a place is one of a web server."""
    return place.lower().startswith(('http://', 'https://'))


def fetched(url: str, folder: Path, check: Callable[[Path], object], remedy: str, patience: float) -> Path:
    """A file of a server, fetched unless the cache has it and the server says that it has not changed.

    A server that gives neither ETag nor Last-Modified cannot say that. Where it cannot be had, what it gave before is
    taken, with a warning. What is in a cache that cannot be written is taken as it is, and what is not there is kept as
    long as this process lives.

    Args:
        url: Http(s) address, with user and password if need be.
        folder: The cache, in which each folder of each server has one of its own.
        check: Raises an `InputError` about a file that is not to be kept.
        remedy: For the sentence about what cannot be had.
        patience: Seconds without an answer, or beyond what a slow connection needs, until it is given up.

    Raises:
        NoSuchFile: The server answers that it has none.
        InputError: It does not answer, or not with the whole file, or with another one than is wanted.
    """
    shown = without_password(url)
    target = folder / _short(shown.partition('://')[2].partition('?')[0].rpartition('/')[0]) / _local_name(shown)
    kept = _Origin.of(target)
    origin: _Origin | None = None
    if not _can_be_written(target.parent):
        if kept is None:
            return fetched(url, _own_folder(), check, remedy, patience)
        _logger.warning("'%s' cannot be written, so the file there is taken without asking %s whether it has changed.",
                        target.parent, shown)
        return target

    def write(temporary: Path) -> None:
        nonlocal origin
        origin = _fetch(url, temporary, kept, remedy, patience)
        check(temporary)

    try:
        atomic_write(target, write)
    except _Unchanged:
        return target
    except _Unreachable as error:
        if kept is None:
            raise
        _logger.warning('%s. Until then, what it gave before is taken.', error)
        return target
    assert origin is not None
    write_text_atomic(_origin_file(target), json.dumps(asdict(origin), indent=2) + '\n')
    return target


def _can_be_written(folder: Path) -> bool:
    while not folder.exists():
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


@cache
def _own_folder() -> Path:
    """A folder that goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix='nbn_timm-')
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _origin_file(path: Path) -> Path:
    return path.with_name(f'{path.name}.origin.json')


def _local_name(url: str) -> str:
    """A name for a file of an address in the cache, with its suffix."""
    parts = urlsplit(url)
    name = _short(unquote(parts.path.rpartition('/')[2]) or 'file')
    return f'{_digest(parts.query)}-{name}' if parts.query else name


def _short(name: str) -> str:
    found = quote(name, safe='')
    return found if len(found) <= _LONGEST else f'{_digest(found)}-{found[-_LONGEST:]}'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]


def _fetch(url: str, target: Path, kept: _Origin | None, remedy: str, patience: float) -> _Origin:
    """Copy a file of a server, and compare its length, and its digest if the name has one.

    Raises:
        _Unchanged: The server still has the file that is kept.
    """
    shown = quoted(without_password(url))
    try:
        request = _request(url, {} if kept is None else kept.conditions)
        # A little longer than the socket waits, which says better what is wrong.
        headers, got = watched(partial(_copy, request, target, patience), target, 1.25 * patience)
    except HTTPError as error:
        if error.code == 304 and kept is not None:
            raise _Unchanged from error
        if error.code in (404, 410):
            raise NoSuchFile(in_words(error)) from error
        raise _Unreachable(f'{shown} cannot be had ({in_words(error)}): {remedy}') from error
    except (URLError, TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
        reason = f'no answer within {patience:g} seconds' if 'timed out' in str(error) else in_words(error)
        raise _Unreachable(f'{shown} cannot be had ({reason}): {remedy}') from error
    length = headers.get('Content-Length')
    if length is not None and length.isdecimal() and got != int(length):
        raise _Unreachable(f'{shown} broke off after {got} of {length} bytes: {remedy}')
    digest, named = file_sha256(target), _NAMED_DIGEST.search(urlsplit(url).path)
    if named is not None and not digest.startswith(named[1]):
        raise InputError(f'{shown} has SHA-256 {digest} instead of {named[1]}, which its name says: it is damaged or '
                         f'was replaced, so {remedy}')
    return _Origin(digest, headers.get('ETag'), headers.get('Last-Modified'))


def _copy(request: Request, target: Path, patience: float) -> tuple[http.client.HTTPMessage, int]:
    """Copy what a server answers into a file; returns the headers and the length that came."""
    got = 0
    with urlopen(request, timeout=patience) as response, open(target, 'wb', buffering=0) as file:
        while block := response.read1(1 << 20):
            file.write(block)
            got += len(block)
        return response.headers, got


def _request(url: str, headers: dict[str, str]) -> Request:
    """The request for an address, whose user and password go into a header."""
    request = Request(without_password(url), headers={'User-Agent': 'nbn_timm', **headers})
    user = urlsplit(url).netloc.rpartition('@')[0]
    if user:  # not handed on where the server sends us elsewhere
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {token}')
    return request
