"""Operations on batches of pictures against PIL's on single ones: equal to the bit."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as timm_policies
from torchvision.transforms import functional as tvf

from nbn_timm.data import batch_ops
from nbn_timm.data.batch_ops import INTERPOLATIONS, OPERATIONS, Warp, operate

FILL = (125, 123, 114)
COUNT = 48


def pictures(count=COUNT, size=32, seed=0):
    """Noise, smooth, low contrast, and drawings of one to three colours; uint8 [count, size, size, 3]."""
    random, out = np.random.default_rng(seed), []
    for index in range(count):
        low, high, coarse = ((0, 256, size), (0, 256, 6), (100, 140, 4), (0, 256, 1))[index % 4]
        image = Image.fromarray(random.integers(low, high, (coarse, coarse, 3), np.uint8))
        image = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
        if index % 8 == 3:
            image[random.integers(size):, random.integers(size):] = random.integers(0, 256, 3)
            image[random.random((size, size)) < 0.2] = 0
        out.append(image)
    return np.stack(out)


def by_the_batch(name, images, values, warp=Warp()):  # noqa: B008  (frozen)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    arguments = torch.as_tensor(values, dtype=torch.float64)
    out = operate(planes, torch.full((len(images),), OPERATIONS.index(name)), arguments, warp)
    return out.permute(0, 2, 3, 1).numpy()


def one_at_a_time(function, images, values):
    return np.stack([np.asarray(function(Image.fromarray(image), value))
                     for image, value in zip(images, np.asarray(values).tolist(), strict=True)])


def drawn(low, high, whole=False, seed=1):
    random = np.random.default_rng(seed)
    return random.integers(low, high + 1, COUNT) if whole else random.uniform(low, high, COUNT)


POINTWISE = {
    'invert': (lambda image, _: ImageOps.invert(image), drawn(0, 0)),
    'posterize': (lambda image, bits: ImageOps.posterize(image, bits), drawn(1, 8, whole=True)),
    'solarize': (lambda image, threshold: ImageOps.solarize(image, threshold), drawn(0, 256)),
    'solarize_add': (lambda image, added: timm_policies.solarize_add(image, added), drawn(0, 128, whole=True)),
    'brightness': (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), drawn(0, 2)),
    'contrast': (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), drawn(0, 2)),
    'autocontrast': (lambda image, _: ImageOps.autocontrast(image), drawn(0, 0)),
    'equalize': (lambda image, _: ImageOps.equalize(image), drawn(0, 0)),
    'color': (lambda image, factor: ImageEnhance.Color(image).enhance(factor), drawn(0, 2)),
    'sharpness': (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), drawn(0, 2)),
    'hue': (tvf.adjust_hue, drawn(-0.5, 0.5)),
    'blur': (lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)), drawn(0.1, 2.5)),
}


@pytest.mark.parametrize('size', [32, 27])
@pytest.mark.parametrize('name', POINTWISE)
def test_colours_are_pils(name, size):
    function, values = POINTWISE[name]
    images = pictures(size=size)
    wanted = one_at_a_time(function, images, values)
    assert (wanted != images).mean() > 0.2
    assert np.array_equal(by_the_batch(name, images, values), wanted)


def test_every_hue_and_saturation_is_pils():
    """Of all colours those of every fifth red, both ways."""
    first, second = (torch.arange(256).view(shape).expand(256, 256) for shape in ((256, 1), (1, 256)))
    for red in range(0, 256, 5):
        colours = torch.stack([torch.full_like(first, red), first, second])[None].to(torch.uint8)
        pixels = np.ascontiguousarray(colours[0].permute(1, 2, 0).numpy())
        hsv = np.array(Image.fromarray(pixels).convert('HSV'))
        assert np.array_equal(torch.cat(batch_ops._to_hsv(colours)).permute(1, 2, 0).numpy(), hsv)
        back = batch_ops._to_rgb(*colours.int().unbind(1))
        wanted = np.asarray(Image.frombytes('HSV', (256, 256), pixels.tobytes()).convert('RGB'))
        assert np.array_equal(back[0].permute(1, 2, 0).numpy(), wanted)


def test_factors_at_the_ends_are_pils():
    images = pictures()
    for name in ('brightness', 'contrast', 'color', 'sharpness'):
        for factor in (0.0, 1.0, 1.9):
            values = np.full(COUNT, factor)
            assert np.array_equal(by_the_batch(name, images, values),
                                  one_at_a_time(POINTWISE[name][0], images, values)), (name, factor)


def test_no_bits_are_black():
    assert not by_the_batch('posterize', pictures(), np.zeros(COUNT)).any()  # PIL refuses this since its version 13


def affine(image, angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    return tvf.affine(image, angle, list(translate), 1.0, list(shear), fill=list(FILL), center=center)


def degrees(factor):
    return float(np.degrees(np.arctan(factor)))


MOVES = {
    'shear_x': (lambda image, by: affine(image, shear=(degrees(by), 0.0), center=[0, 0]), drawn(-0.3, 0.3)),
    'shear_y': (lambda image, by: affine(image, shear=(0.0, degrees(by)), center=[0, 0]), drawn(-0.3, 0.3)),
    'translate_x': (lambda image, by: affine(image, translate=(by, 0)), drawn(-40, 40, whole=True)),
    'translate_y': (lambda image, by: affine(image, translate=(0, by)), drawn(-40, 40, whole=True)),
    'rotate': (lambda image, by: tvf.rotate(image, by, fill=list(FILL)), np.append(drawn(-200, 200)[1:], 90)),
}


@pytest.mark.parametrize('size', [32, 27])
@pytest.mark.parametrize('name', MOVES)
def test_nearest_pixels_are_torchvisions(name, size):
    function, values = MOVES[name]
    images = pictures(size=size)
    wanted = one_at_a_time(function, images, values)
    assert (wanted != images).mean() > 0.2
    assert np.array_equal(by_the_batch(name, images, values, Warp(FILL)), wanted)


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
@pytest.mark.parametrize(('name', 'function', 'sign', 'most'), [
    ('shear_x', timm_policies.shear_x, 1, 0.3), ('shear_y', timm_policies.shear_y, 1, 0.3),
    ('translate_x', timm_policies.translate_x_abs, -1, 15), ('translate_y', timm_policies.translate_y_abs, -1, 15),
    ('rotate', timm_policies.rotate, 1, 30)])
def test_interpolated_pixels_are_timms(name, function, sign, most, interpolation):
    images, values = pictures(), drawn(-most, most)
    wanted = one_at_a_time(lambda image, value: function(
        image, value, fillcolor=FILL, resample=Image.Resampling[interpolation.upper()]), images, values)
    assert np.array_equal(by_the_batch(name, images, sign * values, Warp(FILL, interpolation)), wanted)


def test_each_image_has_its_operation_and_argument():
    images, random = pictures(), np.random.default_rng(0)
    operations = random.integers(-1, len(OPERATIONS), COUNT)
    values = random.integers(1, 3, COUNT) / 2.0
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    before = planes.clone()
    out = operate(planes, torch.from_numpy(operations), torch.from_numpy(values), Warp(FILL))
    assert torch.equal(planes, before)
    for index, (operation, value) in enumerate(zip(operations, values, strict=True)):
        alone = images[index] if operation < 0 else by_the_batch(
            OPERATIONS[operation], images[index:index + 1], [value], Warp(FILL))[0]
        assert np.array_equal(out[index].permute(1, 2, 0).numpy(), alone)


def test_nothing_to_do_and_nothing_there():
    planes = torch.from_numpy(pictures()).permute(0, 3, 1, 2)
    nothing = torch.full((COUNT,), -1)
    assert torch.equal(operate(planes, nothing, torch.zeros(COUNT).double(), Warp()), planes)
    assert operate(planes[:0], nothing[:0], torch.zeros(0).double(), Warp()).shape == (0, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', OPERATIONS)
def test_a_gpu_gives_the_same_bits(name):
    planes = torch.from_numpy(pictures()).permute(0, 3, 1, 2).contiguous()
    operations, values = torch.full((COUNT,), OPERATIONS.index(name)), torch.from_numpy(drawn(0.1, 1.9))
    for interpolation in INTERPOLATIONS:
        warp = Warp(FILL, interpolation)
        assert torch.equal(operate(planes.cuda(), operations, values, warp).cpu(),
                           operate(planes, operations, values, warp))
