"""Files to a model repository on the Hugging Face Hub, or on a mirror that HF_ENDPOINT names, as one commit."""
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from nbn_timm.errors import InputError, in_words

_HUB = 'https://huggingface.co'

# A refused answer is a HfHubHTTPError; what goes wrong before there is an answer is an error of the HTTP library, which
# differs by release: requests' are OSErrors, httpx's have a base class in common with HfHubHTTPError.
_HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base for base in HfHubHTTPError.__mro__
    if issubclass(base, Exception) and base not in (Exception, HfHubHTTPError))

_FAILURES: tuple[type[Exception], ...] = (*_HTTP_ERRORS, RuntimeError, ValueError)


def check_destination(repo_id: str, api: HfApi) -> None:
    """Refuse at once what cannot be pushed to.

    Raises:
        InputError: The name is none of a repository, or there is no token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"'{repo_id}' is no name of a repository ({_one_line(error)}): give user/name") from error
    if not (api.token or get_token()):
        raise InputError(f'there is no token for {api.endpoint}: set HF_TOKEN to one with write access, or log in '
                         'with huggingface_hub')


def push_files(
        folder: str | Path,
        names: Iterable[str],
        repo_id: str,
        *,
        api: HfApi | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str,
) -> str:
    """Upload files to a model repository, as one commit; the repository and the branch are created if need be.

    Args:
        folder: That has the files.
        names: Of the files; others in the repository stay.
        repo_id: 'user/name', or 'name' of the token's user.
        api: Endpoint and token; by default those of the environment.
        private: Create a private repository, and accept no public one.
        revision: Branch; None is the main one.
        message: Of the commit.

    Returns:
        Address of the commit.

    Raises:
        InputError: No token, no connection, no right to write, a wrong name, metadata that the Hub refuses.
    """
    api = api or HfApi()
    check_destination(repo_id, api)
    try:
        repo_id = api.create_repo(repo_id, private=True if private else None, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise InputError(f"'{repo_id}' exists and is public, which --private does not change: make it private in "
                             'its settings, or give another name')
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = [CommitOperationAdd(name, _content(Path(folder, name), api)) for name in names]
        return api.create_commit(repo_id, files, commit_message=message, revision=revision).commit_url
    except InputError:
        raise
    except _FAILURES as error:
        raise InputError(_sentence(error, repo_id, str(api.endpoint))) from error


def _content(path: Path, api: HfApi) -> str | BytesIO:
    # What has no path goes by plain HTTP (git LFS), which mirrors know; few have the Hub's Xet storage.
    return str(path) if api.endpoint == _HUB else BytesIO(path.read_bytes())


def _sentence(error: Exception, repo_id: str, endpoint: str) -> str:
    # A failed upload comes wrapped in a RuntimeError.
    cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
    response = getattr(cause, 'response', None)
    status = getattr(response, 'status_code', None)
    reason = _one_line(getattr(cause, 'server_message', None) or cause)
    if status == 401:
        return f'{endpoint} does not accept the token ({reason}): set HF_TOKEN to a valid one with write access'
    if status == 403:
        return (f"the token may not write to '{repo_id}' on {endpoint} ({reason}): give a repository of your own, or a "
                'token with write access to that one')
    if status == 404:
        return (f"'{repo_id}' was not found on {endpoint} ({reason}): check the name, and that the token may see it")
    if status is not None:
        return f"{endpoint} refused '{repo_id}' ({reason}): try again later, or correct what it names"
    if isinstance(cause, ValueError):
        return f"'{repo_id}' was refused ({reason}): correct what it names"
    if isinstance(cause, _HTTP_ERRORS):
        return (f'{endpoint} cannot be reached ({reason}): check the connection and HF_ENDPOINT, or write the folder '
                'with --output')
    return (f"the upload to '{repo_id}' on {endpoint} failed ({reason}): try again, with HF_HUB_DISABLE_XET=1 if the "
            "Hub's Xet storage cannot be reached from here")


def _one_line(error: Exception | str) -> str:
    text = in_words(error) if isinstance(error, Exception) else ' '.join(error.split())
    return text if len(text) <= 300 else f'{text[:297]}...'
