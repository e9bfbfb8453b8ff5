"""Where pretrained weights come from: a folder or mirror of yours, this package, the cache, the Hub, the authors."""
import base64
import http.client
import json
import logging
import lzma
import os
import sys
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import torch.nn as nn
from huggingface_hub.errors import EntryNotFoundError
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    register_model,
    resolve_pretrained_cfg,
)
from torch.hub import get_dir

from nbn_timm.errors import InputError, without_password
from nbn_timm.files import atomic_write, file_sha256, read_json_object, watched, write_text_atomic

from ._released import Recognized, checkpoint_filter_fn, convert_checkpoint, recognize, without_wrapper
from .hub_files import hub_file
from .model_folder import read_weights
from .weight_files import DIGEST, check_weights, read_state_dict, refuse_other_types, save_weights, weights_digest

__all__ = ['AUTHORS_ARCHIVE', 'HUB_FILES', 'HubFile', 'build_zoo_model', 'cache_dir', 'find_weights',
           'register_aliases', 'shipped_file', 'shipped_names', 'shipped_settings', 'weights_record', 'write_zoo_file']

_logger = logging.getLogger(__name__)

# The checkpoints that the NBN authors published (README of yuxiangbao/NBN).
AUTHORS_ARCHIVE = 'https://drive.google.com/uc?id=1ebEgsvbp00AvKcfa2JQRK8rVoQ6Ab38C'

WEIGHTS_VARIABLE = 'NBN_TIMM_WEIGHTS'


@dataclass(frozen=True)
class HubFile:
    """A weights file on the Hugging Face Hub and the SHA-256 that it must have."""
    repo_id: str
    filename: str
    sha256: str


# Published weights by 'arch.tag'. An entry needs its digest.
HUB_FILES: dict[str, HubFile] = {}

# Weights that come with the package, each with a record of how they were trained beside it.
_SHIPPED = Path(__file__).parents[1] / 'weights'

_PATIENCE = 20.0  # seconds without a byte until a mirror is given up

_SUFFIXES = ('.pth', '.pt', '.tar', '.bin', '.ckpt', '.safetensors')

ModelT = TypeVar('ModelT', bound=nn.Module)


def build_zoo_model(
        model_cls: type[ModelT] | Callable[..., ModelT],
        variant: str,
        pretrained: bool,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs,
) -> ModelT:
    """timm's `build_model_with_cfg`, with this package's sources of weights and its conversion of released files.

    Sources that the caller names (`file`, `state_dict`, `hf-hub:`, `local-dir:`, another `url`) are timm's matter, but
    files are read here first, as timm's reader compares no checksums, and weights that nothing can be computed with are
    refused. A model takes no state dict that would be cast to other numbers, see `refuse_other_types`.

    Raises:
        InputError: No weights can be had, or they are damaged or of something else.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        file = None if cfg.file == shipped_file(f'{variant}.{cfg.tag}') else cfg.file
        named_by_caller = cfg.source or file or cfg.state_dict or overlay.get('url') or overlay.get('hf_hub_id')
        if not named_by_caller:
            overlay['file'] = str(find_weights(f'{variant}.{cfg.tag}', str(cfg.url or '')))
        elif file and not cfg.source:
            overlay['file'] = file
        elif cfg.source and not cfg.hf_hub_filename:
            read_weights(f'{cfg.source}:{cfg.hf_hub_id or cfg.file}')
        weights = read_state_dict(overlay['file']) if 'file' in overlay else cfg.state_dict
        recognized = recognize(without_wrapper(weights)) if weights else None
        if recognized is not None:
            # timm would drop the classifier of weights with another number of classes than the tag's silently.
            overlay.setdefault('num_classes', recognized.num_classes)
            if recognized.arch == variant:
                kwargs = _like_the_file(overlay.get('file', 'state_dict'), recognized, kwargs)
    classes = overlay.get('num_classes', cfg.num_classes) if pretrained else None

    def fit(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        fitting = checkpoint_filter_fn(state_dict, model, new_head=model.num_classes != classes)
        check_weights(fitting, str(overlay.get('file') or cfg.file or cfg.hf_hub_id or cfg.url or 'state_dict'))
        return fitting

    if isinstance(kwargs.get('num_experts'), int):
        overlay.setdefault('classifier', tuple(f'fc.{expert}' for expert in range(kwargs['num_experts'])))
    model = build_model_with_cfg(
        model_cls, variant, pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay or None,
        pretrained_filter_fn=fit, **kwargs)
    model.register_load_state_dict_pre_hook(refuse_other_types)
    return model


def _like_the_file(file: str, recognized: Recognized, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments completed by what the weights say, such as the number of experts.

    Raises:
        InputError: The caller wants something else than the weights are of.
    """
    for key, value in recognized.model_args.items():
        if kwargs.get(key, value) != value:
            raise InputError(f"'{file}' has weights for {recognized.arch} with {key}={value!r}, but "
                             f'{key}={kwargs[key]!r} was asked for: leave {key} out or give other weights')
    return {**recognized.model_args, **kwargs}


def register_aliases(module_name: str, default_cfgs: dict[str, DefaultCfg]) -> None:
    """Register `arch_tag` for each `arch.tag` of a module, as in `resnext50_nbn_imagenet_lt`.

    An alias is an entry point of its own with an untagged cfg, so it lists, resolves and loads like any model.
    """
    module = sys.modules[module_name]
    for arch, default in list(default_cfgs.items()):
        for tag in default.tags:
            alias = f'{arch}_{tag}'
            default_cfgs[alias] = _untagged(default, tag)
            register_model(_alias_entry_point(getattr(module, arch), alias, tag, module))


def _untagged(default: DefaultCfg, tag: str) -> DefaultCfg:
    cfg = default.cfgs[tag]
    alias = DefaultCfg(cfgs={'': cfg}, is_pretrained=bool(cfg.has_weights))
    alias.tags.append('')
    return alias


def _alias_entry_point(entry_point: Callable[..., nn.Module], alias: str, tag: str, module) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        pretrained_cfg = kwargs.pop('pretrained_cfg', None) or tag
        return entry_point(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)

    create.__name__ = create.__qualname__ = alias
    create.__module__ = module.__name__
    create.__doc__ = f'{entry_point.__doc__} Configured as `{entry_point.__name__}.{tag}`.'
    setattr(module, alias, create)
    return create


def cache_dir() -> Path:
    """Folder that keeps converted weights: `nbn_timm` beside torch's own checkpoints (moved by TORCH_HOME)."""
    return Path(get_dir()) / 'checkpoints' / 'nbn_timm'


def find_weights(name: str, archive_url: str = '') -> Path:
    """The local file with the weights of a zoo entry, downloaded if need be.

    Tried in this order: the folder or address in the environment variable NBN_TIMM_WEIGHTS, the files that come with
    the package, the cache, the Hugging Face Hub (entries of `HUB_FILES`), the authors' archive. A folder or address
    that says that it has no such file is passed over; one that cannot answer is an error.

    Args:
        name: `arch.tag`.
        archive_url: Address of an archive of released checkpoints that may contain this entry.

    Raises:
        InputError: No source has the weights; the message lists what was tried and the command that helps.
    """
    tried: list[str] = []
    for source in (_from_named_source, _from_package, _from_cache, _from_hub):
        path = source(name, tried)
        if path is not None:
            return path
    path = _from_archive(name, archive_url, tried)
    if path is not None:
        return path
    raise InputError(
        f"no weights for '{name}' could be had (tried: {'; '.join(tried)}): get a released checkpoint and run "
        f"`nbn-convert CHECKPOINT.pth.tar '{cache_dir() / _filename(name)}'`, or put {_filename(name)} into a folder "
        f'and set {WEIGHTS_VARIABLE} to it, or use pretrained=False')


def shipped_names() -> list[str]:
    """`arch.tag` of the weights that come with the package."""
    return sorted(path.name.removesuffix('.safetensors') for path in _SHIPPED.glob('*.safetensors'))


def shipped_file(name: str) -> str | None:
    """The file of weights that come with the package, by `arch.tag`; None where there is none."""
    path = _SHIPPED / _filename(name)
    return str(path) if path.is_file() else None


def shipped_settings(name: str) -> dict[str, Any]:
    """The training settings of weights that come with the package, by `arch.tag`; empty where there are none."""
    file = shipped_file(name)
    return json.loads(Path(file).with_suffix('.json').read_text(encoding='utf-8'))['settings'] if file else {}


def weights_record(name: str) -> dict[str, Any] | None:
    """How the weights behind a zoo name, tagged or an alias, were trained; None where that is not known.

    It is known of weights that come with the package. Where NBN_TIMM_WEIGHTS has others under their name, a JSON file
    of that name beside them says it.

    A record says by a digest which weights it is of; of others it is not told.

    Returns:
        As the file has it, for `NetworkRecord.from_dict`.
    """
    cfg = get_pretrained_cfg(name) if is_model(name) else None
    if cfg is None or not cfg.file or Path(cfg.file).parent != _SHIPPED:
        return None
    shipped = Path(cfg.file)
    instead = _from_named_source(shipped.stem, [])
    path = shipped.with_suffix('.json') if instead is None else _record_beside(instead, f'{shipped.stem}.json')
    record = _read_record(path) if path is not None and path.is_file() else None
    if record is None or record.get(DIGEST) != weights_digest(read_state_dict(instead or shipped)):
        return None
    return record


def _read_record(path: Path) -> dict[str, Any]:
    return read_json_object(path, f"the record '{path}' of weights", 'correct or remove it')


def _record_beside(weights: Path, filename: str) -> Path | None:
    """The record of weights in a folder or mirror of the user's."""
    place = os.environ[WEIGHTS_VARIABLE]
    return _download(place, filename, []) if _is_address(place) else weights.with_name(filename)


def _filename(name: str) -> str:
    return f'{name}.safetensors'


def _from_named_source(name: str, tried: list[str]) -> Path | None:
    place = os.environ.get(WEIGHTS_VARIABLE, '')
    if not place:
        tried.append(f'{WEIGHTS_VARIABLE} is not set')
        return None
    if _is_address(place):
        return _download(place, _filename(name), tried)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise InputError(f"{WEIGHTS_VARIABLE} is '{place}', which is no folder: set it to a folder or an http address")
    exact = folder / _filename(name)
    if exact.is_file():
        return exact
    found = _checkpoints_by_name(folder).get(name, [])
    if len(found) > 1:
        listed = ', '.join(f"'{path.name}'" for path in found)
        raise InputError(
            f"{WEIGHTS_VARIABLE} '{place}' holds several checkpoints for '{name}' ({listed}): rename the one you mean "
            f'to {_filename(name)} with nbn-convert')
    if found:
        return found[0]
    tried.append(f"no {_filename(name)} and no checkpoint of this kind in '{folder}'")
    return None


def _from_package(name: str, tried: list[str]) -> Path | None:
    path = shipped_file(name)
    if path is None:
        tried.append('this package ships none')
        return None
    if os.environ.get(WEIGHTS_VARIABLE):
        _logger.warning("%s has no weights for '%s', so those that come with the package are taken.", WEIGHTS_VARIABLE,
                        name)
    recorded = _read_record(Path(path).with_suffix('.json')).get(DIGEST)
    damaged = f"the weights '{path}', which come with this package, are damaged: install it again"
    try:
        digest = weights_digest(read_state_dict(path))
    except InputError as error:
        raise InputError(damaged) from error
    if recorded != digest:
        raise InputError(damaged)
    return Path(path)


def _from_cache(name: str, tried: list[str]) -> Path | None:
    path = cache_dir() / _filename(name)
    if path.is_file():
        return path
    tried.append(f"not in the cache '{cache_dir()}'")
    return None


def _from_hub(name: str, tried: list[str]) -> Path | None:
    entry = HUB_FILES.get(name)
    if entry is None:
        tried.append('no Hugging Face Hub file is recorded for it')
        return None
    try:
        path = hub_file(entry.repo_id, entry.filename)
    except (EntryNotFoundError, OSError) as error:
        tried.append(f'Hugging Face Hub {entry.repo_id}: {_first_line(error)}')
        return None
    digest = file_sha256(path)
    if digest != entry.sha256:
        raise InputError(
            f"'{entry.filename}' of {entry.repo_id} has SHA-256 {digest} instead of {entry.sha256}: the file was "
            f"damaged or replaced, so delete '{path}' and try again")
    return path


def _is_address(place: str) -> bool:
    return place.lower().startswith(('http://', 'https://'))


def _download(place: str, filename: str, tried: list[str]) -> Path | None:
    """Fetch one file of a mirror into a cache folder of that mirror's own, so that mirrors do not mix.

    Returns:
        None if the mirror answers that it has no such file.

    Raises:
        InputError: The mirror does not answer, or not with the whole file.
    """
    place = place.rstrip('/')  # a host may have several, as repositories of a Hub
    shown = without_password(place)
    target = cache_dir() / 'mirrors' / quote(shown.partition('://')[2], safe='') / filename
    if target.is_file():
        return target
    try:
        atomic_write(target, lambda temporary: _fetch(place, filename, temporary))
    except _NoSuchFile as error:
        tried.append(f'{shown}/{filename}: {error}')
        return None
    return target


class _NoSuchFile(Exception):
    """A mirror answers that it does not have a file."""


def _fetch(place: str, filename: str, target: Path) -> None:
    shown = f'{without_password(place)}/{filename}'
    remedy = f'try again, or correct or unset {WEIGHTS_VARIABLE}'
    try:
        length, got = watched(partial(_copy, _request(f'{place}/{filename}'), target), target, _PATIENCE)
    except HTTPError as error:
        if error.code in (404, 410):
            raise _NoSuchFile(_first_line(error)) from error
        raise InputError(f"'{shown}' cannot be had ({_first_line(error)}): {remedy}") from error
    except (URLError, TimeoutError, ConnectionError, http.client.HTTPException, ValueError) as error:
        reason = f'no answer within {_PATIENCE:g} seconds' if 'timed out' in str(error) else _first_line(error)
        raise InputError(f"'{shown}' cannot be had ({reason}): {remedy}") from error
    if length is not None and length.isdecimal() and got != int(length):
        raise InputError(f"'{shown}' broke off after {got} of {length} bytes: {remedy}")
    try:
        _read_record(target) if filename.endswith('.json') else read_state_dict(target)
    except InputError as error:
        raise InputError(f"what '{shown}' gives is damaged or something else, as a page that asks for a login: "
                         f'{remedy}') from error


def _copy(request: Request, target: Path) -> tuple[str | None, int]:
    """Copy what a server answers into a file; returns the length that it tells and the one that came."""
    got = 0
    with urlopen(request, timeout=_PATIENCE) as response, open(target, 'wb', buffering=0) as file:
        while block := response.read1(1 << 20):
            file.write(block)
            got += len(block)
        return response.headers.get('Content-Length'), got


def _request(url: str) -> Request:
    """The request for an address, whose user and password go into a header."""
    request = Request(without_password(url), headers={'User-Agent': 'nbn_timm'})
    user = urlsplit(url).netloc.rpartition('@')[0]
    if user:  # not handed on where the mirror sends us elsewhere
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header('Authorization', f'Basic {token}')
    return request


def _from_archive(name: str, url: str, tried: list[str]) -> Path | None:
    """Fetch the authors' archive once, convert every zoo checkpoint in it into the cache, and return the one wanted."""
    if not url:
        tried.append('the authors published none')
        return None
    contents_file = cache_dir() / 'authors_archive.json'
    if not contents_file.is_file():
        problem = _unpack_archive(url, contents_file)
        if problem:
            tried.append(problem)
            return None
    path = cache_dir() / _filename(name)
    if path.is_file():
        return path
    contents = read_json_object(contents_file, f"the list '{contents_file}' of an archive's checkpoints",
                                'delete it, and the archive is fetched again')
    tried.append(f"the authors' archive {url}, which holds {', '.join(contents)} "
                 f"(delete '{contents_file}' to fetch it again)")
    return None


def _unpack_archive(url: str, contents_file: Path) -> str:
    """Fill the cache from an archive; returns why it could not be had, or an empty string."""
    try:
        import gdown
    except ImportError:
        return f"the authors' archive {url} needs gdown: pip install gdown"
    with TemporaryDirectory() as folder:
        archive = Path(folder) / 'archive'
        _logger.info("Fetching the authors' checkpoints from %s", url)
        try:
            watched(partial(gdown.download, url, str(archive), quiet=True), Path(folder), _PATIENCE)
        except Exception as error:  # gdown raises what requests, bs4 and the file system raise
            return f"the authors' archive {url}: {_first_line(error)}"
        if not archive.is_file():
            return f"the authors' archive {url}: the download gave no file"
        try:
            extracted = _extract(archive, Path(folder) / 'extracted')
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
            return f"the authors' archive {url} came damaged ({_first_line(error)})"
        found = _checkpoints_by_name(extracted)
        if not found:
            return f"the authors' archive {url}, which holds no checkpoint of a known kind"
        for name, paths in found.items():
            if len(paths) > 1:
                _logger.warning('The archive holds %d checkpoints of %s; %s is used.', len(paths), name, paths[0].name)
            write_zoo_file(paths[0], cache_dir() / _filename(name))
        write_text_atomic(contents_file, json.dumps({
            name: [str(path.relative_to(extracted)) for path in paths] for name, paths in found.items()}, indent=2))
    return ''


def _extract(archive: Path, folder: Path) -> Path:
    """Unpack a zip or tar file by its content; a bare checkpoint (which may be a zip file itself) stays as it is."""
    folder.mkdir()
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter='data')
    elif zipfile.is_zipfile(archive) and not _is_torch_zip(archive):
        with zipfile.ZipFile(archive) as zip_file:
            zip_file.extractall(folder)
    else:
        archive.rename(folder / 'checkpoint.pth')
    return folder


def _is_torch_zip(path: Path) -> bool:
    with zipfile.ZipFile(path) as zip_file:
        return any(name.endswith('/data.pkl') for name in zip_file.namelist())


def _checkpoints_by_name(folder: Path) -> dict[str, list[Path]]:
    """The zoo checkpoints below a folder by `arch.tag`, told by their keys."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.rglob('*') if path.is_file() and path.suffix in _SUFFIXES):
        try:
            recognized = recognize(read_state_dict(path))
        except InputError as error:
            _logger.warning('%s', error)
            continue
        if recognized is not None and is_model(recognized.arch):
            found.setdefault(recognized.name, []).append(path)
    return found


def write_zoo_file(checkpoint: Path, target: Path | None = None) -> tuple[Recognized, Path]:
    """Convert a checkpoint to a safetensors file with this package's keys.

    Args:
        checkpoint: A file in the released format, timm's or this package's.
        target: File to write; by default the place in the cache where `pretrained=True` looks.

    Returns:
        What the checkpoint was recognised as, and the file written.

    Raises:
        InputError: The checkpoint cannot be read, is of no known kind, or the target cannot be written.
    """
    state_dict = read_state_dict(checkpoint)
    recognized = recognize(state_dict)
    if recognized is None:
        raise InputError(f"'{checkpoint}' is no ResNet, ResNeXt or RIDE checkpoint (its first keys are "
                         f"{', '.join(list(state_dict)[:3])}): give a checkpoint of one of these")
    converted = convert_checkpoint(state_dict, recognized)
    target = target or cache_dir() / _filename(recognized.name)
    atomic_write(target, lambda temporary: save_weights(converted, temporary))
    return recognized, target


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return textwrap.shorten(text.splitlines()[0], 160, placeholder=' ...') if text else type(error).__name__
