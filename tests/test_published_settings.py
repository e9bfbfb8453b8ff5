"""Shipped configs beside what their authors' code sets: the same, or said in the comment; and the page made of it."""
import sys
from pathlib import Path

import pytest

from nbn_timm.config import shipped_configs
from nbn_timm.training.settings import TrainSettings

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / 'benchmarks'))
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
