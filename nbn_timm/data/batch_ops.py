"""PIL's operations on pictures, on a batch of them, each with an argument of its own.

All take and give uint8 [B, 3, H, W], on any device, and are equal to Pillow 13's results for single images to the bit
(`tests/test_batch_ops.py`), whose sources fix the roundings. `operate` is the way in.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

Operation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FEW = 32  # images, which with what they need in between a processor's cache can hold


@dataclass(frozen=True)
class Warp:
    """How pictures are resampled by the operations that move pixels.

    Args:
        fill: Colour of what moves in from outside the picture.
        interpolation: One of `INTERPOLATIONS`.
    """

    fill: tuple[int, ...] = (0, 0, 0)
    interpolation: str = 'nearest'


def operate(images: torch.Tensor, operations: torch.Tensor, arguments: torch.Tensor, warp: Warp) -> torch.Tensor:
    """Change each image by the operation chosen for it, in place.

    Args:
        images: uint8 [B, 3, H, W].
        operations: Indices into `OPERATIONS`, int64 [B] on the CPU; -1 leaves an image as it is.
        arguments: Of the operations, float64 [B] on the CPU.
        warp: For the operations that move pixels.

    Returns:
        `images`.
    """
    order = torch.argsort(operations, stable=True)
    sizes = torch.bincount(operations + 1, minlength=len(OPERATIONS) + 1).tolist()
    back, arguments = torch.argsort(order).to(images.device), arguments[order].to(images.device)
    images = images.index_select(0, order.to(images.device))
    groups = {}  # of the images that get the same operation, in the order of OPERATIONS
    end = sizes[0]
    for name, size in zip(OPERATIONS, sizes[1:], strict=True):
        start, end = end, end + size
        if size:
            groups[name] = images[start:end], arguments[start:end]
    parts = [images[:sizes[0]]]
    if tables := [BY_TABLE[name](*group) for name, group in groups.items() if name in BY_TABLE]:
        looked_up = torch.cat(tables)
        parts.append(_look_up(images[sizes[0]:sizes[0] + len(looked_up)], looked_up))
    parts += [BY_NEIGHBOURS[name](*group) for name, group in groups.items() if name in BY_NEIGHBOURS]
    if matrices := [BY_MATRIX[name](values, *images.shape[2:])
                    for name, (_, values) in groups.items() if name in BY_MATRIX]:
        moved = torch.cat(matrices)
        parts.append(_warped(images[-len(moved):], moved, warp))
    return torch.cat(parts).index_select(0, back)


def _look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace value v of channel c of image b by tables[b, c, v]."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


# Operations by table give uint8 [B, 3, 256].

def _ramp(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=images.device)


def _same_for_all_channels(table: torch.Tensor) -> torch.Tensor:
    return table.to(torch.uint8)[:, None].expand(-1, 3, -1)


def _invert(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return (255 - _ramp(images)).to(torch.uint8).expand(len(images), 3, -1)


def _posterize(images: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    lost = 2 ** (8 - bits.long())[:, None] - 1
    return _same_for_all_channels(_ramp(images) & ~lost)


def _solarize(images: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    ramp = _ramp(images)
    return _same_for_all_channels(torch.where(ramp < threshold[:, None], ramp, 255 - ramp))


def _solarize_add(images: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """timm's: the dark half becomes brighter."""
    ramp = _ramp(images)
    return _same_for_all_channels(torch.where(ramp < 128, (ramp + added.long()[:, None]).clamp(max=255), ramp))


def _brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _same_for_all_channels(_blend(torch.zeros((), device=images.device), _ramp(images).float(), factor[:, None]))


def _contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    total = _grey(images).flatten(1).sum(1)
    mean = (total.double() / images[0, 0].numel() + 0.5).floor().float()
    return _same_for_all_channels(_blend(mean[:, None], _ramp(images).float(), factor[:, None]))


def _autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    values, ramp = images.flatten(2), _ramp(images)
    low, high = values.amin(2, keepdim=True).double(), values.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255).div_(high - low)  # `255 / tensor` would round twice; one value stays as it is
    stretched = (ramp * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, ramp.double()).to(torch.uint8)


def _equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    values = images.flatten(2)
    one = torch.ones((), dtype=torch.int32, device=images.device).expand(values.shape)
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, values.long(), one)
    brightest = histogram.gather(2, values.amax(2, keepdim=True).long())
    step = (values.shape[2] - brightest) // 255
    below = histogram.cumsum(2, dtype=torch.int32) - histogram
    equal = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equal, _ramp(images).int()).to(torch.uint8)


BY_TABLE: dict[str, Operation] = {
    'invert': _invert,
    'posterize': _posterize,  # bits that are kept
    'solarize': _solarize,  # threshold from which values are inverted
    'solarize_add': _solarize_add,  # what is added below 128
    'brightness': _brightness,  # factor, and so are those of the other enhancements: 1 changes nothing
    'contrast': _contrast,
    'autocontrast': _autocontrast,
    'equalize': _equalize,
}


# Operations by neighbouring pixels or channels give images.

def _color(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(_grey(images)[:, None].float(), images.float(), factor[:, None, None, None]).to(torch.uint8)


def _sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    values = images.float()
    smooth = values.clone()  # at the border, as PIL does
    inner = values[..., 1:-1, 1:-1]
    columns = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    box = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    smooth[..., 1:-1, 1:-1] = ((box + 4 * inner) / 13 + 0.5).floor()  # no multiple of 1/13 is near a half
    return _blend(smooth, values, factor[:, None, None, None]).to(torch.uint8)


def _hue(images: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """torchvision's, by way of PIL's HSV, which has bytes for all three."""
    hue, saturation, value = _to_hsv(images)
    added = (turn.double() * 255).trunc().int()[:, None, None]
    return _to_rgb(hue + added & 255, saturation, value)


def _to_hsv(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hue, saturation and value from 0 to 255, int32 [B, H, W] each."""
    red, green, blue = images.int().unbind(1)
    value, least = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    spread = value - least
    ahead = torch.where(red == value, green - blue, torch.where(green == value, blue - red + 512, red - green + 1024))
    hue = _hue_table(images.device).index_select(0, (spread * 1536 + ahead + 255).flatten())
    return hue.view(red.shape).int(), (spread * 255.0 / value.clamp(min=1)).int(), value


def _to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Images uint8 [B, 3, H, W] of what `_to_hsv` gives."""
    index = (hue * 256 + saturation).flatten()
    shares = [_channel_share(offset, hue.device).index_select(0, index).view(hue.shape) for offset in (0, 4, 2)]
    return torch.stack([(value * share + 0.5).to(torch.uint8) for share in shares], dim=1)


@cache
def _hue_table(device: torch.device) -> torch.Tensor:
    """Of spread * 1536 + 512 * (which channel is the highest) + 255 + how far the next channel is ahead of the third.

    PIL divides each distance from the highest by the spread, in single precision, before it subtracts them.
    """
    spread, channel = (torch.arange(size).view(shape) for size, shape in ((256, (256, 1, 1)), (3, (1, 3, 1))))
    ahead = torch.arange(-255, 257)
    divisor = spread.clamp(min=1).float()
    # One of both channels is the lowest, and so as far from the highest as the spread.
    nearer = (spread - ahead.abs()).clamp(min=0).float() / divisor
    farther = (spread > 0).float()
    third, following = torch.where(ahead > 0, farther, nearer), torch.where(ahead > 0, nearer, farther)
    difference = torch.where(channel == 0, (third - following).double(), third.double() + 2.0 * channel - following)
    hue = (difference.float().double() / 6 + 1).remainder(1).float()
    return ((hue.double() * 255).trunc() * (spread > 0)).to(torch.uint8).flatten().to(device)


@cache
def _channel_share(offset: int, device: torch.device) -> torch.Tensor:
    """What a channel has of the value, float64, by hue * 256 + saturation.

    Args:
        offset: Sixths of a turn by which it is before red: 0 for red, 4 for green, 2 for blue.
        device: Where the table is wanted.
    """
    sixths = (torch.arange(256).float().double() * 6 / 255)[:, None]
    sextant = sixths.floor()
    within = (sixths - sextant).float().double()
    share = (torch.arange(256).double() / 255).float().double()
    parts = torch.ones_like(within), within, 1 - within
    low, falling, rising = ((1 - share * part).expand(256, 256) for part in parts)
    full = torch.ones_like(low)
    order = torch.stack([full, falling, low, low, rising, full])
    chosen = order.gather(0, ((sextant.long() + offset) % 6).expand(256, 256)[None])[0]
    return torch.where(share == 0, 1.0, chosen).flatten().to(device)


def _blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """PIL's Gaussian blur: three box blurs along rows and three along columns, in fixed point of 24 bits.

    The width of the boxes is by Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by Extended Box
    Filtering", SSVM 2011, in single precision as there.
    """
    passes = 3
    variance = sigma.float() * sigma.float() / passes
    length = (12.0 * variance.double() + 1.0).sqrt().float()
    whole = ((length.double() - 1.0) / 2.0).floor().float()
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) * (whole + 1)))
    radius = whole + rest
    inner = ((1 << 24) / (radius * 2 + 1)).int()
    reach = radius.int()
    outer = ((1 << 24) - (reach * 2 + 1) * inner) // 2
    values = images.int()
    for axis in (3, 2):
        for _ in range(passes):
            values = _box_blur(values, axis, *(part[:, None, None, None] for part in (reach, inner, outer)))
    return values.to(torch.uint8)


def _box_blur(
        values: torch.Tensor,
        axis: int,
        reach: torch.Tensor,
        inner: torch.Tensor,
        outer: torch.Tensor,
) -> torch.Tensor:
    """`inner` for the neighbours within `reach`, `outer` for the next two; the border goes on outside.

    The sum fits into 32 bits without a sign, whose arithmetic is that of int32.
    """
    most, size = int(reach.max()) + 1, values.shape[axis]
    first, last = values.narrow(axis, 0, 1), values.narrow(axis, size - 1, 1)
    padded = torch.cat([*[first] * most, values, *[last] * most], dim=axis)
    total = values * inner
    for step in range(1, most + 1):
        both = padded.narrow(axis, most - step, size) + padded.narrow(axis, most + step, size)
        total += both.mul_(torch.where(reach >= step, inner, torch.where(reach + 1 == step, outer, 0)))
    return total.add_(1 << 23).bitwise_right_shift_(24).bitwise_and_(255)


def _a_few_at_a_time(operation: Operation) -> Operation:
    """The same for `FEW` images at once on a processor, those with like arguments together."""
    def changed(images: torch.Tensor, arguments: torch.Tensor) -> torch.Tensor:
        if images.device.type != 'cpu':
            return operation(images, arguments)
        order = arguments.argsort()
        few = [operation(images.index_select(0, part), arguments.index_select(0, part)) for part in order.split(FEW)]
        return torch.empty_like(images).index_copy_(0, order, torch.cat(few))

    return changed


def _grey(images: torch.Tensor) -> torch.Tensor:
    """PIL's luma, int32 [B, H, W]."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(plain: torch.Tensor, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """From plain (factor 0) to values (factor 1) and beyond, float32; PIL cuts the fraction off."""
    return ((values - plain) * factor.float() + plain).clamp_(0, 255)


BY_NEIGHBOURS: dict[str, Operation] = {
    'color': _color,
    'sharpness': _sharpness,
    'hue': _a_few_at_a_time(_hue),  # part of a turn, from -0.5 to 0.5
    'blur': _a_few_at_a_time(_blur),  # standard deviation in pixels
}


# Operations by matrix give float64 [B, 6]: the source of pixel (x, y) is (a x + b y + c, d x + e y + f), pixels being
# squares between integers.

def _identity(values: torch.Tensor) -> torch.Tensor:
    return torch.eye(2, 3, dtype=torch.float64, device=values.device).flatten().repeat(len(values), 1)


def _shear_x(factor: torch.Tensor, *_: int) -> torch.Tensor:
    matrix = _identity(factor)
    matrix[:, 1] = factor
    return matrix


def _shear_y(factor: torch.Tensor, *_: int) -> torch.Tensor:
    matrix = _identity(factor)
    matrix[:, 3] = factor
    return matrix


def _translate_x(pixels: torch.Tensor, *_: int) -> torch.Tensor:
    matrix = _identity(pixels)
    matrix[:, 2] -= pixels
    return matrix


def _translate_y(pixels: torch.Tensor, *_: int) -> torch.Tensor:
    matrix = _identity(pixels)
    matrix[:, 5] -= pixels
    return matrix


def _rotate(degrees: torch.Tensor, height: int, width: int) -> torch.Tensor:
    angle = -torch.deg2rad(torch.remainder(degrees, 360))
    cos, sin = angle.cos().round(decimals=15), angle.sin().round(decimals=15)
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y], 1)


BY_MATRIX: dict[str, Callable[..., torch.Tensor]] = {
    'shear_x': _shear_x,  # columns per row
    'shear_y': _shear_y,
    'translate_x': _translate_x,  # pixels to the right
    'translate_y': _translate_y,  # pixels down
    'rotate': _rotate,  # degrees, counter-clockwise
}

OPERATIONS = (*BY_TABLE, *BY_NEIGHBOURS, *BY_MATRIX)


def _warped(images: torch.Tensor, matrix: torch.Tensor, warp: Warp) -> torch.Tensor:
    if warp.interpolation == 'nearest':
        return _nearest(images, matrix, warp.fill)
    return _interpolated(images, matrix, warp.fill, *INTERPOLATIONS[warp.interpolation])


def _nearest(images: torch.Tensor, matrix: torch.Tensor, fill: tuple[int, ...]) -> torch.Tensor:
    """Of the pixel that holds the source of a pixel's centre, in PIL's fixed point of 16 bits."""
    a, b, c, d, e, f = matrix.T
    fixed = torch.stack([a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e])
    a, b, c, d, e, f = (fixed * 65536 + 0.5).floor().int()[..., None, None].unbind()
    y, x = (axis.int() for axis in _grid(images))
    return pick(images, (f + e * y + d * x) >> 16, (c + b * y + a * x) >> 16, fill)


def pick(
        images: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        fill: tuple[int, ...] = (0, 0, 0),
) -> torch.Tensor:
    """The pixels [B, 3, H, W] at rows and columns, integers that broadcast to [B, H, W]; `fill` where there is none."""
    height, width = images.shape[2:]
    row, column = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = (row * width + column).long().expand(len(images), height, width).flatten(1)
    inside = (row == rows) & (column == columns)
    pixels = images.flatten(2).gather(2, index[:, None].expand(-1, images.shape[1], -1)).view_as(images)
    return _filled(pixels, inside, fill)


def _filled(pixels: torch.Tensor, inside: torch.Tensor, fill: tuple[int, ...]) -> torch.Tensor:
    """Colour what is not inside, [B, H, W], in place; by arithmetic, which on bytes is far faster than `where`."""
    pixels *= inside[:, None]
    if any(fill):
        pixels += torch.tensor(fill, dtype=torch.uint8, device=pixels.device)[:, None, None] * ~inside[:, None]
    return pixels


def _interpolated(
        images: torch.Tensor,
        matrix: torch.Tensor,
        fill: tuple[int, ...],
        neighbours: tuple[int, ...],
        mix: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """In PIL's order of double-precision operations, since it cuts fractions off."""
    height, width = images.shape[2:]
    a, b, c, d, e, f = (entry[:, None, None] for entry in matrix.T)
    y, x = (axis + 0.5 for axis in _grid(images))
    columns, rows = a * x + b * y + c, d * x + e * y + f
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    columns, rows = columns - 0.5, rows - 0.5
    left, top = columns.floor(), rows.floor()
    right, down = (columns - left).flatten(1)[:, None], (rows - top).flatten(1)[:, None]
    pixels, lines = images.flatten(2), []
    for step in neighbours:
        start = (top.long() + step).clamp(0, height - 1) * width
        index = [(start + (left.long() + aside).clamp(0, width - 1)).flatten(1)[:, None] for aside in neighbours]
        lines.append(mix(right, *(pixels.gather(2, source.expand(-1, 3, -1)).double() for source in index)))
    values = mix(down, *lines).clamp_(0, 255).to(torch.uint8).view_as(images)
    return _filled(values, inside, fill)


def _linear(distance: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first + (second - first) * distance


def _cubic(
        distance: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        third: torch.Tensor,
        fourth: torch.Tensor,
) -> torch.Tensor:
    """Keys' cubic convolution with a = -1, at a distance from the second of four neighbours."""
    square = 2 * (first - second) + third - fourth
    cube = second - first - third + fourth
    return second + distance * (third - first + distance * (square + distance * cube))


# The neighbours on either axis and what is made of them; nearest is exact in other ways.
INTERPOLATIONS: dict[str, tuple[tuple[int, ...], Callable[..., torch.Tensor]]] = {
    'nearest': ((0,), lambda _, value: value),
    'bilinear': ((0, 1), _linear),
    'bicubic': ((-1, 0, 1, 2), _cubic),
}


def _grid(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [H, 1] and columns [1, W]."""
    height, width = images.shape[2:]
    return (torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)[None, :])
