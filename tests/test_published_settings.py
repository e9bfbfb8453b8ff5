"""Shipped configs beside what their authors' code sets: the same, or said in the comment; and the page made of it."""
import re
from pathlib import Path
from typing import Any

import pytest

from nbn_timm.config import shipped_configs
from nbn_timm.losses import LOSSES
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
published_settings = pytest.importorskip('published_settings')

SOURCES, RECIPES = published_settings.read_published()
UNPUBLISHED = {'min_lr', 'sampler', 'color_jitter', 'decay_1d', 'loss'}  # written out although they are the default


@pytest.mark.parametrize('name', shipped_configs())
def test_every_setting_is_the_published_one_or_the_comment_says_so(name):
    published, comment = RECIPES[name], published_settings.header(name)
    differing = published_settings.differing(name, published)
    if published.ours is not None:
        assert published.ours in comment and not published.settings
        return
    told = {key.partition('.')[0] for key in differing}
    assert told <= set(published.departs), {key: differing[key] for key in differing}
    for words in (*published.departs.values(), *published.says):
        assert words in comment, words
    if 'none known' in published_settings.departures(name):
        assert not differing and not published.says and not published.departs


@pytest.mark.parametrize('name', [name for name in shipped_configs() if RECIPES[name].ours is None])
def test_no_setting_is_without_a_source(name):
    """But for those that are the default here, and for those that the comment tells as departures."""
    published, own = RECIPES[name], published_settings.own_settings(name)
    usual = published_settings.defaults()
    unknown = {key: value for key, value in own.items() if key not in published.settings
               and key.partition('.')[0] not in published.departs
               and not (key in UNPUBLISHED and value == usual.get(key))}
    assert not unknown


def test_the_data_name_what_there_is():
    known = set(TrainSettings.declared())
    assert RECIPES.keys() == shipped_configs().keys()
    for published in RECIPES.values():
        assert {key.partition('.')[0] for key in (*published.settings, *published.departs)} <= known
        assert {source for _, (source, _) in published.settings.values()} <= SOURCES.keys()
    for name in shipped_configs():
        repository_of = {SOURCES[source]['commit'] for _, (source, _) in RECIPES[name].settings.values()}
        assert RECIPES[name].ours or any(commit in published_settings.header(name) for commit in repository_of)


def test_the_page_is_what_the_script_makes():
    page = published_settings.page()
    assert (ROOT / 'docs' / 'recipes.md').read_text(encoding='utf-8') == page
    assert page.count('\n### ') == len(shipped_configs())


OF_BENCHMARK = {'inat18': ('inaturalist', 'inat18', 'ina2018'), 'places_lt': ('places',), 'imagenet_lt': ('imagenet',),
                'cifar100_lt': ('cifar100', 'cifar-100'), 'cifar10_lt': ('cifar10/', 'cifar10_', 'cifar-10_')}


@pytest.mark.parametrize('name', [name for name in shipped_configs() if RECIPES[name].ours is None])
def test_no_value_comes_from_the_file_of_another_benchmark(name):
    """CMO's script for iNaturalist 2018 decays at another epoch than that for ImageNet-LT, which its recipe had."""
    benchmark = next((of for of in OF_BENCHMARK if of in name), 'imagenet_lt')
    for setting, (_, (_, file)) in RECIPES[name].settings.items():
        marked = {of for of, marks in OF_BENCHMARK.items() if any(mark in file.lower() for mark in marks)}
        assert not marked or benchmark in marked, (setting, file)


@pytest.mark.parametrize(('name', 'setting', 'value', 'file'), [
    ('inat18/resnet50_cmo', 'decay_milestones', [76], 'inat18_train.py'),  # its epochs, from 0, are lower from 75 on
    ('resnet50_cmo', 'decay_milestones', [61, 81], 'imagenet_train.py'),
    ('inat18/resnet50_ride_distilled', 'kd_temperature', 1.5, 'configs/config_iNaturalist_resnet50_distill_ride.json'),
    ('resnext50_ride_routing', 'lr', 0.01, 'configs/config_imagenet_lt_resnext50_ride_ea.json'),
    ('places_lt/resnet152_marc', 'lr', 0.05, 'marc/config/Places_LT/MARC.yaml'),
    ('lift/inat18_in21k_vit_b16', 'tune', 'adaptformer', 'scripts/run_tab17to23_backbones.sh'),
])
def test_settings_that_were_taken_from_the_wrong_file(name, setting, value, file):
    found, (_, place) = RECIPES[name].settings[setting]
    assert (found, place) == (value, file)
    assert published_settings.own_settings(name)[setting] == value


def recipes(key: str) -> dict[str, dict[str, Any]]:
    """What the configs set that set this key."""
    found = {name: published_settings.own_settings(name) for name in shipped_configs()}
    return {name: settings for name, settings in found.items() if key in settings}


def test_every_loss_has_a_cifar_recipe_or_is_named_as_one_that_has_not():
    sentence = re.search(r'There is a recipe for each but (.+?) under', (ROOT / 'docs/losses.md').read_text('utf-8'))[1]
    used = {settings['loss'] for name, settings in recipes('loss').items() if name.startswith('cifar100_lt/')}
    assert set(re.findall(r'`(\w+)`', sentence)) == set(LOSSES) - used


def test_every_second_stage_lets_batch_norm_drift_or_is_named_as_one_that_does_not():
    page = ' '.join((ROOT / 'docs/second_stages.md').read_text('utf-8').split())
    stages, named = re.search(r'so the recipes of (.+?) have `freeze_bn: false`, but for (.+?)\. The', page).groups()
    of_stages = set(re.findall(r'`(\w+)`', stages))
    assert set(re.findall(r'`([\w/]+)`', named)) == {
        name for name, settings in recipes('stage').items()
        if settings['stage'] in of_stages and settings.get('freeze_bn', True)}


def test_crt_and_lws_draw_as_their_sources_do():
    """Kang et al.'s cls_crt.yaml and cls_lws.yaml have ClassAwareSampler with four images; Bag of Tricks has not."""
    for name, settings in recipes('stage').items():
        if name.endswith(('_crt', '_lws')):
            cifar = name.startswith('cifar100_lt/')
            assert (settings['sampler'], settings.get('sampler_kwargs.k')) == (
                ('class_balanced', None) if cifar else ('class_aware', 4))
