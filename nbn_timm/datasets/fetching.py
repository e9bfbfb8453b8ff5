"""Files of a benchmark: finding them, fetching them whole or not at all, unpacking archives."""
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.utils import check_integrity

from nbn_timm.errors import InputError
from nbn_timm.files import atomic_write, open_regular, watched

TIMEOUT = 60  # seconds without a byte before a download is given up
SHOWN = 3  # missing images named per folder


def locate(source: str, folder: str, name: str) -> str:
    """Address of a file in `source`, a folder on the network or on disk, where it may lie in `folder`.

    Raises:
        InputError: `source` is on disk and does not have it.
    """
    if '://' in source:
        return '/'.join(filter(None, (source.rstrip('/'), folder, name)))
    candidates = [path for path in (Path(source) / folder / name, Path(source) / name) if path.is_file()]
    if not candidates:
        raise InputError(f"'{name}' is not in '{source}': give the folder or address that holds it as --source")
    return str(candidates[0])


def fetch(address: str, target: Path, check: Callable[[Path], None]) -> None:
    """Copy a file from an address or a path, whole or not at all.

    Args:
        address: URL or path.
        target: To write.
        check: Called with the file before it appears; it raises if the content is wrong.

    Raises:
        InputError: It cannot be had or written; what `check` raises.
    """
    def fill(temporary: Path) -> None:
        def download() -> None:
            with (urllib.request.urlopen(address, timeout=TIMEOUT) as response,
                  open(temporary, 'wb', buffering=0) as file):
                while block := response.read1(1 << 20):
                    file.write(block)

        try:
            if '://' in address:
                watched(download, temporary, TIMEOUT)
            else:
                with open_regular(address) as source, open(temporary, 'wb') as file:
                    shutil.copyfileobj(source, file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"'{address}' cannot be fetched ({getattr(error, 'reason', None) or error}): check the connection, or "
                'fetch the file elsewhere and give its folder as --source') from error
        check(temporary)

    atomic_write(target, fill)


def fetch_archive(address: str, target: Path, md5: str) -> None:
    """Fetch an archive unless it is there; its MD5 must be the published one.

    Raises:
        InputError: It cannot be had, or is another file.
    """
    def check(temporary: Path) -> None:
        if not check_integrity(temporary, md5):
            raise InputError(f"'{address}' is not the published {target.name} (MD5 differs): give another --source")

    if not check_integrity(target, md5):
        fetch(address, target, check)


@dataclass(frozen=True)
class Archive:
    """A published archive and the folder that it holds.

    Attributes:
        url: Its published place, without the file name.
        file: Its name.
        md5: Of the file.
        folder: What it unpacks to.
        marker: A file in that folder, by which it is known.
    """

    url: str
    file: str
    md5: str
    folder: str
    marker: str

    def find(self, data_dir: Path) -> Path | None:
        """The unpacked folder, which is `data_dir` or lies in it; None if it is not there."""
        return next((path for path in (data_dir, data_dir / self.folder) if (path / self.marker).is_file()), None)

    def obtain(self, data_dir: Path, source: str | None) -> Path:
        """The unpacked folder; the archive is fetched and unpacked if need be.

        Raises:
            InputError: The archive cannot be had or unpacked, or is another one.
        """
        present = self.find(data_dir)
        if present is not None:
            return present
        archive = data_dir / self.file
        if not archive.is_file():
            address = locate(source or self.url, '', self.file)
            print(f'{self.file}: from {address}', flush=True)
        else:
            address = str(archive)
        fetch_archive(address, archive, self.md5)
        self._unpack(archive, data_dir)
        return data_dir / self.folder

    def _unpack(self, archive: Path, data_dir: Path) -> None:
        """Unpack beside the final place first, so that the folder appears whole or not at all."""
        with tempfile.TemporaryDirectory(prefix=f'.{self.folder}.', suffix='.tmp', dir=data_dir) as temporary:
            try:
                if zipfile.is_zipfile(archive):
                    with zipfile.ZipFile(archive) as zipped:
                        zipped.extractall(temporary)
                else:
                    with tarfile.open(archive) as file:
                        file.extraction_filter = getattr(tarfile, 'data_filter', None)  # not in the first 3.10
                        file.extractall(temporary)
                os.replace(Path(temporary, self.folder), data_dir / self.folder)
            except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
                raise InputError(f"'{archive}' cannot be unpacked ({error}): free some space, or unpack it elsewhere "
                                 'and give that folder as --data-dir') from error


def report_missing(name: str, paths: Iterable[str], data_dir: Path) -> int:
    """Print how many images do not exist, by top folder, and return their number.

    Args:
        name: Of their list or split, for the report.
        paths: Of the images, relative to `data_dir`.
        data_dir: The data folder.
    """
    present: dict[str, int] = {}
    missing: dict[str, list[str]] = {}
    for path in paths:
        top = Path(path).parts[0]
        if os.path.isfile(data_dir / path):
            present[top] = present.get(top, 0) + 1
        else:
            missing.setdefault(top, []).append(path)
    for top in sorted(present.keys() | missing.keys()):
        absent = missing.get(top, [])
        total = present.get(top, 0) + len(absent)
        examples = ', '.join(absent[:SHOWN]) + (', ...' if len(absent) > SHOWN else '')
        print(f'{name}: {top}/: ' + (
            f'{len(absent):,} of {total:,} images missing: {examples}' if absent else f'all {total:,} images there'))
    return sum(map(len, missing.values()))
