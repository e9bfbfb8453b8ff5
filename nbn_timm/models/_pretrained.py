"""Where pretrained weights come from: a folder or mirror of yours, this package, the cache, the Hub, the authors."""
import json
import logging
import lzma
import os
import sys
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch.nn as nn
from huggingface_hub.errors import EntryNotFoundError
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    is_model,
    register_model,
    resolve_pretrained_cfg,
)
from torch.hub import get_dir

from nbn_timm.errors import InputError, quoted, without_password
from nbn_timm.files import (
    atomic_write,
    file_sha256,
    read_json_object,
    refuse_no_file,
    watched,
    write_text_atomic,
)

from ._fetching import NoSuchFile, fetched, is_address
from ._released import Recognized, StateDict, checkpoint_filter_fn, convert_checkpoint, recognize, without_wrapper
from .hub_files import hub_file
from .model_folder import FOLDER, HUB, WEIGHTS_NAMES, find_weights_file
from .weight_files import (
    DIGEST,
    check_weights,
    read_state_dict,
    refuse_other_types,
    save_weights,
    weights_digest,
    weights_in,
)

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

# Entries of a cfg that name weights, in timm's order, and those that a source needs.
_NAMES = ('state_dict', 'file', 'hf_hub_id', 'url')
_OF_SOURCES = {'hf-hub': 'hf_hub_id', 'local-dir': 'file'}

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

    Where weights come from is decided here, and timm gets what was chosen, read and found to fit: what the caller
    names (`state_dict`, `file`, `hf_hub_id` or `url` in the overlay, else in a `pretrained_cfg` of the caller's, or a
    model name with `hf-hub:` or `local-dir:`), else what `find_weights` has. An entry that is None names nothing.

    A classifier for other classes than the weights have is new, with a warning. `num_classes=-1` in the overlay asks
    for a new one in any case. A model takes no state dict that would be cast to other numbers, see
    `refuse_other_types`.

    Raises:
        InputError: No weights can be had, or they are damaged or of something else.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    chosen = None
    head_wanted = not kwargs.get('features_only') and kwargs.get('num_classes') != 0
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
        chosen = _choose_weights(variant, cfg, overlay)
        overlay |= chosen.entries
        kwargs = _like_the_weights(chosen, variant, cfg, overlay, kwargs)

    def fit(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
        assert chosen is not None
        described = overlay.get('num_classes', cfg.num_classes)
        try:
            fitting = checkpoint_filter_fn(state_dict, model, model.num_classes != described)
        except InputError as error:
            raise InputError(f'{quoted(chosen.where)}: {error}') from error
        check_weights(fitting, chosen.where)
        if head_wanted and described > 0:
            _tell_new_head(chosen, model.num_classes, described, cfg.classifier)
        return fitting

    if isinstance(kwargs.get('num_experts'), int):
        overlay.setdefault('classifier', tuple(f'fc.{expert}' for expert in range(kwargs['num_experts'])))
    model = build_model_with_cfg(
        model_cls, variant, pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay or None,
        pretrained_filter_fn=fit, **kwargs)
    model.register_load_state_dict_pre_hook(refuse_other_types)
    return model


@dataclass(frozen=True)
class _Chosen:
    """The weights that a model is to have.

    Attributes:
        where: They come from, for messages.
        weights: None where only timm can find them.
        entries: Of the cfg, by which timm takes these weights and no others.
        declared: Their number of classes, as who describes them says; None if nobody does.
    """

    where: str
    weights: StateDict | None
    entries: dict[str, Any]
    declared: int | None = None

    def classes(self, classifier: str | Sequence[str] | None) -> int | None:
        """Their number of classes by what they are; None where they have no classifier.

        Args:
            classifier: Name of the classifier, or names, of architectures that are not recognised.
        """
        assert self.weights is not None
        recognized = recognize(self.weights)
        if recognized is not None:
            return recognized.num_classes
        name = classifier if isinstance(classifier, str) else next(iter(classifier or ()), '')
        weight = without_wrapper(self.weights).get(f'{name}.weight')
        return None if weight is None or not weight.ndim else int(weight.shape[0])


def _choose_weights(variant: str, cfg: PretrainedCfg, overlay: Mapping[str, Any]) -> _Chosen:
    """The one place that decides from where weights come.

    Args:
        variant: Name of the architecture.
        cfg: With the entries of the overlay.
        overlay: Of the caller.

    Raises:
        InputError: What the caller names does not serve, or nothing does.
    """
    key = _named_in_overlay(overlay)
    if key is None and cfg.source in _OF_SOURCES:  # by the name of the model, whose files timm finds itself
        key = _OF_SOURCES[cfg.source]
        path = find_weights_file(f'{cfg.source}:{getattr(cfg, key)}', cfg.hf_hub_filename)
        where = f'{cfg.source}:{getattr(cfg, key)}'
        return _Chosen(where, None if path is None else read_state_dict(path), {}, cfg.num_classes)
    if key is None:
        key = next((key for key in _NAMES if getattr(cfg, key) and not _is_own(key, getattr(cfg, key))), None)
    if key == 'state_dict':
        weights = weights_in(cfg.state_dict or {}, 'state_dict')
        return _Chosen('state_dict', weights, dict(state_dict=weights, source=''), overlay.get('num_classes'))
    if key is None:
        path, weights = _zoo_weights(variant, cfg)
    else:
        path = _named_file(key, getattr(cfg, key), overlay.get('source'), cfg.hf_hub_filename)
        weights = read_state_dict(path)
    where = without_password(str(cfg.url)) if key == 'url' else str(path)
    return _Chosen(where, weights, dict(file=str(path), state_dict=None, source=''), overlay.get('num_classes'))


def _named_in_overlay(overlay: Mapping[str, Any]) -> str | None:
    """The entry of an overlay that names weights; None if there is none.

    Raises:
        InputError: It is empty or of a wrong type, or there are several.
    """
    named = [key for key in _NAMES if overlay.get(key) is not None and not _is_own(key, overlay[key])]
    for key in named:
        kind, what = (Mapping, 'state dict') if key == 'state_dict' else (str | os.PathLike, 'name')
        if not isinstance(overlay[key], kind) or not overlay[key]:
            raise InputError(f"'{key}' in the overlay of the pretrained cfg is no {what}, or is empty: give one, or "
                             'leave it out')
    if len(named) > 1:
        raise InputError(f"the overlay of the pretrained cfg names weights by {' and by '.join(named)}: leave one out")
    needed = _OF_SOURCES.get(overlay.get('source') or '')
    if needed is not None and named != [needed]:
        raise InputError(f"the overlay of the pretrained cfg has the source '{overlay['source']}' without '{needed}': "
                         f'give it, or leave the source out')
    return named[0] if named else None


def _is_own(key: str, value: Any) -> bool:
    """Whether an entry is one of this package's cfgs, from which `find_weights` begins."""
    if key == 'file':
        return isinstance(value, str) and Path(value).parent == _SHIPPED
    return key == 'url' and value == AUTHORS_ARCHIVE


def _named_file(key: str, name: Any, source: str | None, filename: str | None) -> Path:
    """The file that a caller's entry of the cfg stands for, fetched if need be.

    Args:
        key: Of the entry.
        name: Its value.
        source: That it was given with; of 'local-dir' the file is a folder.
        filename: In a folder or repository; None takes the usual ones.
    """
    if key == 'file' and source != 'local-dir':
        return Path(name)
    if key == 'url':
        return _fetch_named(str(name))
    place = f'{HUB if key == "hf_hub_id" else FOLDER}{name}'
    path = find_weights_file(place, filename)
    if path is None:
        names = ' or '.join([filename] if filename else WEIGHTS_NAMES)
        raise InputError(f"'{place}' has no {names}, or cannot be asked: check the name and the connection")
    return path


def _fetch_named(url: str) -> Path:
    shown, remedy = quoted(without_password(url)), 'try again, or correct url'
    if not is_address(url):
        raise InputError(f'the url {shown} is no http or https address: correct it, or give a path as file')
    try:
        return fetched(url, cache_dir() / 'mirrors', partial(_check_readable, url, remedy), remedy, _PATIENCE)
    except NoSuchFile as error:
        raise InputError(f'{shown} cannot be had ({error}): {remedy}') from error


def _zoo_weights(variant: str, cfg: PretrainedCfg) -> tuple[Path, StateDict]:
    """The file of a zoo entry, and its weights.

    Raises:
        InputError: There is none, or it is of something else.
    """
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if cfg.file:  # of an alias, which has no tag
        name = Path(cfg.file).stem
    path = find_weights(name, str(cfg.url or ''))
    weights = read_state_dict(path)
    why = _why_other(name, weights)
    if why:
        raise InputError(f"'{path}' cannot serve as the weights of '{name}', since {why}: remove or correct it")
    return path, weights


def _why_other(name: str, weights: StateDict) -> str | None:
    """Why weights are not those of `arch.tag`, in words; None where nothing speaks against it."""
    found, cfg = recognize(weights), _zoo_cfg(name)
    if found is None or cfg is None or _is_for(found, name):
        return None
    return (f'it is of {found.arch} with {found.num_classes} classes and not of {name.partition(".")[0]} with '
            f'{cfg.num_classes}')


def _like_the_weights(
        chosen: _Chosen,
        variant: str,
        cfg: PretrainedCfg,
        overlay: dict[str, Any],
        kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Constructor arguments completed by what the weights say, such as the number of experts.

    timm drops a classifier where the cfg and the model have other numbers of classes, so the cfg gets the number that
    the weights have.

    Args:
        chosen: The weights.
        variant: Name of the architecture.
        cfg: With the entries of the overlay.
        overlay: Of the cfg, to which `num_classes` is added.
        kwargs: Constructor arguments of the caller.

    Raises:
        InputError: The caller wants something else than the weights are of.
    """
    if chosen.weights is None:
        return kwargs
    recognized = recognize(chosen.weights)
    if recognized is not None and recognized.arch == variant and not (cfg.source and not chosen.entries):
        kwargs = _with_their_arguments(chosen.where, recognized, kwargs)
    there = chosen.classes(cfg.classifier)
    if there is not None and chosen.declared is None:
        overlay['num_classes'] = there
    return kwargs


def _tell_new_head(chosen: _Chosen, num_classes: int, described: int, classifier: str | Sequence[str] | None) -> None:
    """Warn of a classifier that is new because the weights have other classes.

    Args:
        chosen: The weights.
        num_classes: Of the model.
        described: Classes of the weights, as the cfg says.
        classifier: See `_Chosen.classes`.

    Raises:
        InputError: They have no classifier, or one for another number than is said.
    """
    where = quoted(chosen.where)
    there = described if chosen.weights is None else chosen.classes(classifier)
    if there is None:
        raise InputError(f'the weights in {where} have no classifier: give num_classes=-1 in the overlay of the '
                         'pretrained cfg for a new one, or num_classes=0 for a model without')
    if there != described:
        raise InputError(f'the weights in {where} have {there} classes, and their description says {described}: '
                         'correct num_classes there (the overlay or the config.json; that of the model may be another)')
    if num_classes != there:
        _logger.warning('The weights in %s have %d classes and %d were asked for, so the classifier is new and has to '
                        'be trained.', where, there, num_classes)


def _with_their_arguments(where: str, recognized: Recognized, kwargs: dict[str, Any]) -> dict[str, Any]:
    for key, value in recognized.model_args.items():
        if kwargs.get(key, value) != value:
            raise InputError(f"'{where}' has weights for {recognized.arch} with {key}={value!r}, but "
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
    path = _from_named_source(name, tried)
    if path is not None:
        return path
    for source in (_from_package, _from_cache, _from_hub, partial(_from_archive, archive_url)):
        path = source(name, tried)
        if path is None:
            continue
        if os.environ.get(WEIGHTS_VARIABLE):
            _logger.warning("%s has no weights for '%s', so '%s' is taken.", WEIGHTS_VARIABLE, name, path)
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
    return _download(place, filename, []) if is_address(place) else weights.with_name(filename)


def _filename(name: str) -> str:
    return f'{name}.safetensors'


def _from_named_source(name: str, tried: list[str]) -> Path | None:
    place = os.environ.get(WEIGHTS_VARIABLE, '')
    if not place:
        tried.append(f'{WEIGHTS_VARIABLE} is not set')
        return None
    if is_address(place):
        return _download(place, _filename(name), tried)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise InputError(f"{WEIGHTS_VARIABLE} is '{place}', which is no folder: set it to a folder or an http address")
    exact = folder / _filename(name)
    if exact.is_file():
        return exact
    refuse_no_file(exact)
    if exact.is_symlink():
        raise InputError(f"'{exact}' is a link to what is not there: correct or remove it, or unset {WEIGHTS_VARIABLE}")
    found = [(path, recognized) for path, recognized in _checkpoints(folder)
             if _zoo_name(path) is None and _is_for(recognized, name)]
    listed, remedy = ', '.join(f"'{path.name}'" for path, _ in found), f'to {_filename(name)} with nbn-convert'
    if len(found) > 1:
        raise InputError(f"{WEIGHTS_VARIABLE} '{place}' holds several checkpoints for '{name}' ({listed}): rename the "
                         f'one you mean {remedy}')
    if found and found[0][1].name != name:
        raise InputError(f"{WEIGHTS_VARIABLE} '{place}' holds {listed}, {found[0][1]}, which may be '{name}' or "
                         f'something else of {found[0][1].num_classes} classes: rename it {remedy}, or to what it is')
    if found:
        return found[0][0]
    tried.append(f"no {_filename(name)} and no checkpoint of this kind in '{folder}'")
    return None


def _zoo_name(path: Path) -> str | None:
    """The `arch.tag` that a file is called after; None where its name says nothing."""
    name = path.name.removesuffix(path.suffix)
    return name if '.' in name and _zoo_cfg(name) is not None else None


def _zoo_cfg(name: str) -> PretrainedCfg | None:
    """Of `arch.tag`; None where there is no such architecture or tag."""
    try:
        return get_pretrained_cfg(name) if is_model(name) else None
    except RuntimeError:  # of timm, about the tag
        return None


def _is_for(recognized: Recognized, name: str) -> bool:
    """Whether weights may be those of `arch.tag`, by their architecture and number of classes."""
    cfg = _zoo_cfg(name)
    return recognized.arch == name.partition('.')[0] and cfg is not None and recognized.num_classes == cfg.num_classes


def _from_package(name: str, tried: list[str]) -> Path | None:
    path = shipped_file(name)
    if path is None:
        tried.append('this package ships none')
        return None
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


def _download(place: str, filename: str, tried: list[str]) -> Path | None:
    """Fetch one file of a mirror into a cache folder of that mirror's own, so that mirrors do not mix.

    Returns:
        None if the mirror answers that it has no such file.

    Raises:
        InputError: The mirror does not answer, or not with the whole file, or with another one.
    """
    url = f"{place.rstrip('/')}/{filename}"  # a host may have several, as repositories of a Hub
    remedy = f'try again, or correct or unset {WEIGHTS_VARIABLE}'

    def check(path: Path) -> None:
        weights = _check_readable(url, remedy, path)
        why = weights and _why_other(filename.removesuffix('.safetensors'), weights)
        if why:
            raise InputError(f'what {quoted(without_password(url))} gives cannot serve, since {why}: correct the file '
                             f'there, or correct or unset {WEIGHTS_VARIABLE}')

    try:
        return fetched(url, cache_dir() / 'mirrors', check, remedy, _PATIENCE)
    except NoSuchFile as error:
        tried.append(f'{without_password(url)}: {error}')
        return None


def _check_readable(url: str, remedy: str, path: Path) -> StateDict | None:
    """Refuse what was fetched if it is not what its name says; returns the weights if they are."""
    try:
        if path.suffix != '.json':
            return read_state_dict(path)
        _read_record(path)
    except InputError as error:
        raise InputError(f'what {quoted(without_password(url))} gives is damaged or something else, as a page that '
                         f'asks for a login: {remedy}') from error
    return None


def _from_archive(url: str, name: str, tried: list[str]) -> Path | None:
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
        found: dict[str, list[Path]] = {}
        for path, recognized in _checkpoints(extracted):
            found.setdefault(recognized.name, []).append(path)
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


def _checkpoints(folder: Path) -> Iterator[tuple[Path, Recognized]]:
    """The checkpoints of zoo networks below a folder, told by their keys."""
    for path in sorted(path for path in folder.rglob('*') if path.is_file() and path.suffix in _SUFFIXES):
        try:
            recognized = recognize(read_state_dict(path))
        except InputError as error:
            _logger.warning('%s', error)
            continue
        if recognized is not None and is_model(recognized.arch) and not recognized.added_head:
            yield path, recognized


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
