"""Seals of JSON and YAML files: a digest of what was written, so that what has changed since, by whatever, is told.

These files may be edited, so a broken seal is no error. That of JSON is over the values and not over the bytes; that of
YAML is a comment above what it is of.
"""
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = 'content_sha256'

_logger = logging.getLogger(__name__)
_COMMENT = re.compile(rf'# {SEAL}: ([0-9a-f]{{64}})\n')
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
    if not is_as_written(content):
        _tell(what, _digest(content), f"its entry '{SEAL}'")


def sealed_text(text: str) -> str:
    """The text of a YAML file below its seal."""
    return f'# {SEAL}: {_sha256(text)}\n{text}'


def is_text_as_written(text: str) -> bool:
    """`is_as_written` of a YAML file."""
    seal = _COMMENT.search(text)
    return seal is None or seal[1] == _sha256(text[seal.end():])


def tell_text_changes(text: str, what: str) -> None:
    """`tell_changes` of a YAML file."""
    if not is_text_as_written(text):
        _tell(what, _sha256(text), f"the line '# {SEAL}'")


def _tell(what: str, digest: str, seal: str) -> None:
    if (what, digest) not in _told:
        _told.add((what, digest))
        _logger.warning('%s is not as it was written: it was edited, or is damaged. If it is right as it is, take %s '
                        'out.', what[:1].upper() + what[1:], seal)


def _digest(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != SEAL}))
    return _sha256(json.dumps(plain, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()
