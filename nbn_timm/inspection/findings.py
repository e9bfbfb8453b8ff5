"""What a look at all pictures comes to: findings, each with a number and a remedy, the worst first."""
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from nbn_timm.data.classes import look_alikes
from nbn_timm.data.pictures import extensions_of
from nbn_timm.errors import quoted
from nbn_timm.inspection.collection import Collection
from nbn_timm.inspection.facts import GREY_SIDE, PictureFacts
from nbn_timm.inspection.label_sets import common_pairs, labels_per_picture, never_apart, pairs_as_data
from nbn_timm.inspection.repeats import near_groups, same_content

Severity = Literal['stops', 'look', 'note']
TITLES: dict[Severity, str] = {'stops': 'Stops a training', 'look': 'Look at these', 'note': 'Good to know'}

SMALL_SIDE = 32  # pixels: a shorter side below it is small, if others are larger
LONG = 4.0  # times as long as wide
PLAIN = 4.0  # grey levels of standard deviation: nearly one colour
DARK = 60  # of 255: even the brightest parts lie below

_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: Its name in JSON.
        severity: 'stops' a training, is to be looked at, or is good to know.
        number: Of pictures, groups or classes.
        text: What, with the number, in words.
        remedy: What to do; '' for nothing.
        groups: Pictures, those that belong together in one group.
        names: Classes, or sentences, where it is not about pictures.
    """

    kind: str
    severity: Severity
    number: int
    text: str
    remedy: str = ''
    groups: Sequence[Sequence[int]] = ()
    names: Sequence[str] = ()


@dataclass
class Inspection:
    """A collection, what was seen of each picture, and what it comes to.

    Attributes:
        collection: What was looked at.
        facts: Of each picture, in its order.
        same: Groups of pictures with the same pixels.
        near: Groups of pictures that look nearly alike, one picture for each content.
        findings: The worst first.
    """

    collection: Collection
    facts: Sequence[PictureFacts]
    same: list[list[int]] = field(default_factory=list)
    near: list[list[int]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def stops(self) -> bool:
        """Whether a training would stop."""
        return any(finding.severity == 'stops' for finding in self.findings)


def inspect(collection: Collection, facts: Iterable[PictureFacts]) -> Inspection:
    """Draw the conclusions from what was seen of each picture of a collection."""
    seen = list(facts)
    result = Inspection(collection, seen)
    result.same = same_content([one.content for one in seen])
    repeated = {index for group in result.same for index in group[1:]}
    sound = np.array([index for index, one in enumerate(seen) if not one.fault and index not in repeated], np.int64)
    if len(sound):
        hashes = np.array([seen[index].hash for index in sound], np.uint64)
        greys = np.stack([np.frombuffer(seen[index].grey, np.uint8) for index in sound])
        result.near = [sound[group].tolist() for group in near_groups(hashes, greys)]
    found = [*_of_places(collection), *_of_label_sets(collection),
             *_of_repeats(collection, result.same, result.near), *_of_pictures(result)]
    order = list(TITLES)
    result.findings = sorted((one for one in found if one.number), key=lambda one: order.index(one.severity))
    return result


# Of classes and splits --------------------------------------------------------------------------------------------

def _of_places(collection: Collection) -> Iterable[Finding]:
    """What the places of the pictures alone tell."""
    names, splits, counted = collection.names, collection.splits, collection.counted
    train = collection.counts(counted) if counted in splits else None
    if train is None:
        yield Finding('no_training_split', 'stops', 1, 'there is no training split',
                      'put pictures as train/<class>/<picture>, or name a training list')
    else:
        empty = [collection.found_as(label) for label in range(collection.trained) if not train[label]]
        yield Finding('empty_classes', 'stops', len(empty), f'{_classes(empty)} without a training picture',
                      'add pictures in a format that Pillow reads, or remove the class', names=empty)
        yield Finding('one_class', 'stops', int(collection.trained < 2), 'only one class',
                      'give pictures of two classes or more')
    foreign = [collection.found_as(label) for label in range(collection.trained, len(names))]
    yield Finding('unknown_classes', 'stops', len(foreign),
                  f'{_classes(foreign)} that the training split does not have',
                  'rename as in the training split, or remove', names=foreign)
    alike = look_alikes(names)
    yield Finding('alike_names', 'look', len(alike), 'class names that differ by capitals, blanks and dashes only: '
                  f'{_times(len(alike))}', 'put what belongs together into one class',
                  names=[' = '.join(map(quoted, group)) for group in alike])
    for part in ('val', 'test'):
        if part in splits:
            counts = collection.counts(part)
            absent = [collection.found_as(label) for label in range(collection.trained) if not counts[label]]
            yield Finding(f'absent_in_{part}', 'look', len(absent), f'{_classes(absent)} without a {part} picture',
                          'move some there, else nothing is known of their accuracy', names=absent)
    if train is not None:
        single = [collection.found_as(label) for label in range(len(names)) if train[label] == 1]
        yield Finding('single_pictures', 'note', len(single), f'{_classes(single)} with one training picture',
                      'collect more, since none can be held back to validate', names=single)
    if 'val' not in splits:
        yield Finding('no_validation', 'note', 1, 'there is no validation split' + (' and no test split' * (
            'test' not in splits)), 'train with --val-fraction 0.2, which takes one from the training pictures')
    for part in collection.unlabelled:
        yield Finding(f'unlabelled_{part}', 'note', 1, f'the pictures of {part} have no labels', 'they are not scored')


def _classes(names: Sequence[str]) -> str:
    return f'{len(names):,} class{"es" * (len(names) != 1)}'


# Of label sets ----------------------------------------------------------------------------------------------------

def _of_label_sets(collection: Collection) -> Iterable[Finding]:
    """What is said of pictures that can be of several classes."""
    if not collection.label_sets or collection.counted not in collection.splits:
        return
    sets = collection.splits[collection.counted].targets
    where = np.flatnonzero(collection.parts == list(collection.splits).index(collection.counted))
    bare = [[index] for index in where[~sets.any(axis=1)].tolist()]
    yield Finding('of_no_class', 'note', len(bare), f'{_pictures_of(len(bare))} of no class',
                  'right if they show none of the classes; a sampler by class never draws them', bare)
    names = [f'{quoted(collection.names[one])} only with {quoted(collection.names[other])}'
             for one, other in never_apart(sets)]
    yield Finding('never_apart', 'look', len(names), f'classes that only come together with another: '
                  f'{_times(len(names))}', 'add training pictures of the first without the second, else a network may '
                  'learn the second for it', names=names)


def _pictures_of(number: int) -> str:
    return f'{number:,} training picture{"s" * (number != 1)}'


# Of repeated pictures ---------------------------------------------------------------------------------------------

def _of_repeats(collection: Collection, same: list[list[int]], near: list[list[int]]) -> Iterable[Finding]:
    """Repeats by where their pictures are: a group may be of several kinds."""
    for exact, groups in ((True, same), (False, near)):
        word = 'the same picture' if exact else 'nearly the same picture'
        where = {'across_splits': [], 'two_classes': [], 'inside_class': []}  # type: dict[str, list[list[int]]]
        for group in groups:
            if len({collection.part(index) for index in group}) > 1:
                where['across_splits'].append(group)
            if len({collection.class_name(index) for index in group}) > 1:
                where['two_classes'].append(group)
            if len({(collection.part(index), collection.class_name(index)) for index in group}) < len(group):
                where['inside_class'].append(group)
        known = 'same' if exact else 'near'
        yield _repeat(f'{known}_across_splits', where['across_splits'], f'{word} in two splits',
                      'remove from training, else the accuracy is too good to be true')
        sets = collection.label_sets
        yield _repeat(f'{known}_two_classes', where['two_classes'],
                      f'{word} {"with different labels" if sets else "under two classes"}',
                      f'decide which {"labels are" if sets else "class is"} right')
        yield _repeat(f'{known}_inside_class', where['inside_class'],
                      f'{word} twice in one {"split, with the same labels" if sets else "class and split"}',
                      'keep one of them, since it counts double' if exact else
                      'no fault if they are views of one thing; write --groups-file, by which nbn-train --val-groups '
                      'keeps them together')


def _repeat(kind: str, groups: list[list[int]], what: str, remedy: str) -> Finding:
    pictures = sum(map(len, groups))
    return Finding(kind, 'note' if kind == 'near_inside_class' else 'look', len(groups),
                   f'{what}: {_times(len(groups))}, {pictures:,} pictures', remedy, groups)


def _times(number: int) -> str:
    return 'once' if number == 1 else f'{number:,} times'


# Of single pictures -----------------------------------------------------------------------------------------------

def _of_pictures(result: Inspection) -> Iterable[Finding]:
    """What one picture alone tells."""
    facts = result.facts
    sound = [index for index, one in enumerate(facts) if not one.fault]
    damaged = [index for index, one in enumerate(facts) if one.fault]
    yield _pictures('damaged', 'stops', damaged, 'cannot be read', 'replace by intact copies, or remove')
    greys = {index: np.frombuffer(facts[index].grey, np.uint8) for index in sound}
    plain = [index for index in sound if greys[index].std() < PLAIN]
    yield _pictures('one_colour', 'look', plain, 'of nearly one colour', 'keep only what shows something')
    dark = [index for index in sound if index not in set(plain) and np.percentile(greys[index], 99) < DARK]
    yield _pictures('dark', 'look', dark, 'very dark', 'keep only what shows something')
    shorter = {index: min(facts[index].width, facts[index].height) for index in sound}
    limit = min(SMALL_SIDE, float(np.median(list(shorter.values()))) / 2) if shorter else 0
    yield _pictures('small', 'look', [index for index in sound if shorter[index] < limit],
                    f'with a side below {limit:g} pixels', 'replace by larger ones, or remove')
    long = [index for index in sound if max(facts[index].width, facts[index].height) > LONG * shorter[index]]
    yield _pictures('long', 'look', long, f'more than {LONG:g} times as long as wide',
                    'cut out what matters, since a crop shows little of the rest')
    turned = [index for index in sound if facts[index].orientation != 1]
    yield _pictures('turned', 'note', turned, 'turned by their EXIF orientation',
                    'nothing to do, all commands read them upright')
    paged = [index for index in sound if facts[index].pages > 1]
    yield _pictures('pages', 'note', paged, 'of several pages, of which the first is read',
                    'nothing to do, or --in-chans N if the pages are channels')
    misnamed = [index for index in sound if _misnamed(result.collection.path(index), facts[index].format)]
    yield _pictures('misnamed', 'note', misnamed, 'of another format than their names say',
                    'nothing to do, they are read all the same')


def _pictures(kind: str, severity: Severity, found: list[int], what: str, remedy: str) -> Finding:
    return Finding(kind, severity, len(found), f'{len(found):,} picture{"s" * (len(found) != 1)} {what}', remedy,
                   [[index] for index in found])


def _misnamed(path: str | None, format: str) -> bool:
    if path is None or not format:
        return False
    known = extensions_of(format)
    return bool(known) and not path.lower().endswith(tuple(known))


def grey_picture(facts: PictureFacts) -> np.ndarray:
    """The small grey picture, uint8 [16, 16]."""
    return np.frombuffer(facts.grey, np.uint8).reshape(GREY_SIDE, GREY_SIDE)


# Told -------------------------------------------------------------------------------------------------------------

def shots_of(collection: Collection) -> list[str]:
    """'many', 'medium' or 'few' of each class by its training pictures, '' where these are not known."""
    if collection.counted not in collection.splits:
        return [''] * len(collection.names)
    many, few = collection.shot_limits
    return ['many' if count > many else 'few' if count < few else 'medium'
            for count in collection.counts(collection.counted).tolist()]


def as_data(result: Inspection) -> dict[str, Any]:
    """All of it as plain data for JSON, with names of classes and pictures."""
    collection, facts = result.collection, result.facts
    shots = shots_of(collection)
    counts = {part: collection.counts(part).tolist() for part in collection.splits}
    splits = {part: split_summary(collection, part) for part in collection.splits}
    sizes: dict[str, Any] = {'formats': _tally(facts, 'format'), 'modes': _tally(facts, 'mode'),
                             'bytes': sum(one.size for one in facts)}
    sides = np.array([(one.width, one.height) for one in facts if not one.fault])
    if len(sides):
        sizes |= {'width': _range(sides[:, 0]), 'height': _range(sides[:, 1])}
    if moments := channel_moments(result):
        sizes |= moments
    return {
        'what': collection.what, 'pictures': len(collection), 'classes': len(collection.names), 'stops': result.stops,
        'label_sets': collection.label_sets, 'splits': splits, 'files': sizes, 'notes': collection.notes,
        **({'pairs': pairs_as_data(common_pairs(collection.splits[collection.counted].targets), collection.names)}
           if collection.label_sets and collection.counted in splits else {}),
        'per_class': {name: {**{part: counts[part][label] for part in counts}, 'shot': shots[label] or None,
                             **({'folder': collection.folders[label]} if collection.folders else {})}
                      for label, name in enumerate(collection.names)},
        'findings': [{
            'kind': one.kind, 'severity': one.severity, 'number': one.number, 'what': one.text, 'remedy': one.remedy,
            **({'names': list(one.names)} if one.names else {}),
            **({'pictures': [[_picture(result, index) for index in group] for group in one.groups]}
               if one.groups else {})} for one in result.findings],
    }


def split_summary(collection: Collection, part: str) -> dict[str, Any]:
    """Numbers of a split."""
    counts = collection.counts(part)
    there = counts[counts > 0]
    shots = shots_of(collection)
    return {
        'pictures': len(collection.splits[part]), 'classes': len(there),
        'largest': int(there.max()) if len(there) else 0, 'smallest': int(there.min()) if len(there) else 0,
        'imbalance_factor': float(there.max() / there.min()) if len(there) else None,
        **({name: shots.count(name) for name in ('many', 'medium', 'few')} if part == collection.counted else {}),
        **({'labels': labels_per_picture(collection.splits[part].targets)} if collection.label_sets else {})}


def channel_moments(result: Inspection) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel of the training pictures, in [0, 1]; none of Pillow's pictures."""
    collection = result.collection
    moments = [one.moments for index, one in enumerate(result.facts)
               if one.moments[0] and collection.part(index) == collection.counted]
    if not moments:
        return {}
    mean, square = np.mean(moments, axis=0)
    return {'mean': mean.tolist(), 'std': np.sqrt((square - mean ** 2).clip(0)).tolist()}


def _picture(result: Inspection, index: int) -> dict[str, Any]:
    facts, collection = result.facts[index], result.collection
    about = {'file': collection.name(index), 'split': collection.part(index), 'class': collection.class_name(index)}
    return about | ({'fault': facts.fault} if facts.fault else {'width': facts.width, 'height': facts.height})


def _tally(facts: Sequence[PictureFacts], name: str) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for one in facts:
        if value := getattr(one, name):
            found[value] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _range(values: np.ndarray) -> dict[str, int]:
    return {'smallest': int(values.min()), 'median': int(np.median(values)), 'largest': int(values.max())}
