"""Seals of JSON files: a digest of what was written, so that what has changed since, by whatever, is told.

These files may be edited, so a broken seal is no error. The digest is over the values and not over the bytes.
"""
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = 'content_sha256'

_logger = logging.getLogger(__name__)
_told: set[tuple[str, str]] = set()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a JSON file with its seal."""
    return {**content, SEAL: _digest(content)}


def seal_file(path: Path) -> None:
    """Put a seal into a JSON file that another program has written."""
    path.write_text(json.dumps(sealed(json.loads(path.read_text(encoding='utf-8'))), indent=2) + '\n', encoding='utf-8')


def is_as_written(content: Mapping[str, Any]) -> bool:
    """Whether a seal holds; what has none, as of earlier versions or other programs, is taken as it is."""
    return SEAL not in content or content[SEAL] == _digest(content)


def tell_changes(content: Mapping[str, Any], what: str) -> None:
    """Warn, once, where a seal does not hold.

    Args:
        content: Of the file.
        what: The file, in words.
    """
    if not is_as_written(content) and (what, digest := _digest(content)) not in _told:
        _told.add((what, digest))
        _logger.warning("%s is not as it was written: it was edited, or is damaged. If it is right as it is, take its "
                        "entry '%s' out.", what[:1].upper() + what[1:], SEAL)


def _digest(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
