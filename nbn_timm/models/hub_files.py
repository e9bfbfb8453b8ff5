"""Files of the Hugging Face Hub, fetched with a limit to how slow the Hub or a mirror of it may be."""
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from nbn_timm.files import watched
from nbn_timm.key_values import reason_of

__all__ = ['hub_file']

_PATIENCE = 60.0  # seconds in which nothing needs to come, as the Hub's client writes large blocks


def hub_file(repo_id: str, filename: str, revision: str | None = None) -> Path:
    """A file of a repository, in the Hub's cache.

    Raises:
        EntryNotFoundError: The repository does not have it, or it is not in the cache and there is no connection.
        HFValidationError: The repository's name is none.
        OSError: It cannot be had, or comes too slowly.
    """
    folder = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}")
    try:
        return Path(watched(partial(hf_hub_download, repo_id, filename, revision=revision), folder, _PATIENCE))
    except (EntryNotFoundError, HFValidationError, OSError):
        raise
    except Exception as error:  # of the client that the Hub's library is built on, which has changed before
        raise OSError(reason_of(error)) from error
