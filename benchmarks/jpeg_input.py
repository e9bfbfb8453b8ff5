"""How fast training pictures come out of JPEG files by each decoder, and how far their pixels are from Pillow's.

    python benchmarks/jpeg_input.py FOLDER --pictures 1000

FOLDER holds JPEG files, such as the 1,000 of github.com/EliSchwartz/imagenet-sample-images. The cases take turns on one
thread, 32 pictures each: as in a loading process, which does nothing else, code and buffers of a case are in the cache.
Time is that of the process on its processor, so that other work on the machine counts little. Ratios are to simplejpeg
decoding the same whole pictures and doing nothing else. Files are in memory.

`--profile NAME` times the parts of one decoder's way instead, from the header to a normalised batch.

The distances are over the same crops: mean absolute difference in steps of 255 and PSNR in dB, of each way to Pillow's
(as timm does it). OpenCV's two usual ways of resampling say how far apart are two pipelines that people take for the
same: networks are trained by the one and run by the other.
"""
import argparse
import io
import json
import random
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode, v2

from nbn_timm.data import DataDefaults, decoders
from nbn_timm.data.decoders import DECODERS, Box, decoded_crop, resized_part, shrink_of
from nbn_timm.data.loader import collate
from nbn_timm.data.pictures import orientation_of
from nbn_timm.data.transforms import create_transform

Case = Callable[[bytes], Any]
AT_ONCE = 32
UPRIGHT_RGB = {'RGB', 'YCbCr', 'Gray'}


def main() -> None:
    args = _parse()
    if not args.profile and find_spec('cv2') is None:
        raise SystemExit('jpeg_input.py: error: the distances need OpenCV: pip install opencv-python-headless, or give '
                         '--profile')
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in _jpegs(args.folder)[:args.pictures]]
    if args.quality:
        files = [_saved_again(data, args.quality) for data in files]
    found, files = len(files), [data for data in files if _is_for_decoders(data)]
    sizes = [simplejpeg.decode_jpeg_header(data)[:2] for data in files]
    about = (f'{len(files)} pictures of {found} (the others are CMYK or turned by EXIF, and go to Pillow), '
          f'{sum(map(len, files)) / len(files) / 1e3:.0f} kB and '
          f'{np.mean([height * width for height, width in sizes]) / 1e6:.2f} million pixels on average')
    print(about)
    if args.profile:
        _profile(files, args)
        return
    result = {'pictures': len(files), 'interpolation': args.interpolation,
              'speed': _speed(files, args), 'distance': _distances(files, sizes, args)}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + '\n')


def _saved_again(data: bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert('RGB').save(buffer, 'JPEG', quality=quality)  # colours at half the size
    return buffer.getvalue()


def _is_for_decoders(data: bytes) -> bool:
    colours = simplejpeg.decode_jpeg_header(data)[2]
    return colours in UPRIGHT_RGB and orientation_of(Image.open(io.BytesIO(data))) == 1


def _speed(files: list[bytes], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time per picture, and the throughput as a ratio."""
    cases = _cases(args.interpolation)
    seconds = dict.fromkeys(cases, 0.0)
    for turn in range(args.repeats):
        for number, first in enumerate(range(0, len(files), AT_ONCE)):
            for name in list(cases)[::1 if (turn + number) % 2 else -1]:
                case, some = cases[name], files[first:first + AT_ONCE]
                start = time.process_time()
                for data in some:
                    case(data)
                seconds[name] += time.process_time() - start
    base = seconds[next(iter(cases))]
    table = {name: {'ms': 1e3 * spent / len(files) / args.repeats, 'throughput': base / spent}
             for name, spent in seconds.items()}
    print(f"\n{'':<52}{'ms':>8}{'pictures/s':>12}{'ratio':>8}")
    for name, row in table.items():
        print(f"{name:<52}{row['ms']:>8.2f}{1e3 / row['ms']:>12,.0f}{row['throughput']:>8.2f}")
    return table


class _Decoded:
    """In the place of a decoder: a part that has been decoded."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def part(self, data: bytes, box: Box, shrink: int) -> np.ndarray:
        """The pixels."""
        return self.pixels


def _profile(files: list[bytes], args: argparse.Namespace) -> None:
    """Milliseconds per picture of the parts of a decoder's way, and their shares of simplejpeg's whole decoding.

    Each part is done for 32 pictures before the next one, with its code in the cache; picture by picture takes longer.
    """
    decoder = DECODERS[args.profile]()
    defaults = DataDefaults(input_size=(3, 224, 224), interpolation=args.interpolation)
    crop, flip, jitter, to_tensor = create_transform(defaults, is_training=True).transforms
    mode, size = InterpolationMode(args.interpolation), (224, 224)
    seconds: dict[str, float] = {}

    def each(part: str, function: Callable[..., Any], *given: Sequence[Any]) -> list[Any]:
        start = time.process_time()
        results = [function(*one) for one in zip(*given, strict=True)]
        seconds[part] = seconds.get(part, 0.0) + time.process_time() - start
        return results

    def decoded(data: bytes, box: Box) -> np.ndarray:
        decoder.size(data)
        shrink = shrink_of(box, size)
        return decoder.part(data, box.shrunken(shrink), shrink)

    for _ in range(args.repeats):
        for first in range(0, len(files), AT_ONCE):
            some = files[first:first + AT_ONCE]
            each('simplejpeg, the whole picture and nothing else', simplejpeg.decode_jpeg, some)
            each('EXIF and end of the file', decoders._is_upright_and_whole, some)
            sizes = each('header', decoder.size, some)
            boxes = each('drawing the crop', lambda size: Box(*crop.get_params(
                decoders._OfSize(size[1], size[0]), crop.scale, crop.ratio)), sizes)
            parts = each('decoding the crop, at scale', decoded, some, boxes)
            images = each('resampling', lambda pixels, box: resized_part(
                _Decoded(pixels), b'', box, size, mode), parts, boxes)  # type: ignore[arg-type]
            images = each('flip', lambda image: to_tensor(flip(image)), images)
            (batch, _), = each('collation', collate, [[(image, 0) for image in images]])
            each('normalisation, by the batch', lambda images: images.float().sub_(127.0).div_(58.0), [batch])
            each('colour jitter, in Pillow', lambda image: to_tensor(jitter(
                Image.fromarray(image.permute(1, 2, 0).numpy()))), images)
    base = seconds['simplejpeg, the whole picture and nothing else']
    print(f"\n{args.profile:<52}{'ms':>8}{'share':>8}")
    for part, spent in seconds.items():
        print(f'{part:<52}{1e3 * spent / len(files) / args.repeats:>8.3f}{spent / base:>8.2f}')


def _cases(interpolation: str) -> dict[str, Case]:
    size = (3, 224, 224)
    plain = DataDefaults(input_size=size, interpolation=interpolation, color_jitter=None)
    jittered = DataDefaults(input_size=size, interpolation=interpolation)
    crop = RandomResizedCropAndInterpolation(224, interpolation=interpolation)

    def pipeline(defaults: DataDefaults) -> Case:
        steps = create_transform(defaults, is_training=True)
        return lambda data: steps(Image.open(io.BytesIO(data)).convert('RGB'))

    def of_torchvision() -> Case:
        steps = v2.Compose([
            v2.RandomResizedCrop(224, interpolation=InterpolationMode(interpolation), antialias=True),
            v2.RandomHorizontalFlip()])
        return lambda data: steps(torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision.io.ImageReadMode.RGB))

    def by(name: str, defaults: DataDefaults) -> Case:
        decoder = DECODERS[name]()
        steps = create_transform(defaults, is_training=True).transforms[1:]

        def run(data: bytes) -> Any:
            image: Any = decoded_crop(decoder, data, crop)
            if defaults.color_jitter:
                image = Image.fromarray(image.permute(1, 2, 0).numpy())
            for step in steps:
                image = step(image)
            return image
        return run

    there = [name for name in DECODERS if DECODERS[name].available()]
    return {
        'simplejpeg, the whole picture and nothing else': lambda data: simplejpeg.decode_jpeg(data),
        'Huffman codes alone (the last row of the picture)': _last_row(),
        'Pillow, the whole picture and nothing else': lambda data: Image.open(io.BytesIO(data)).load(),
        "--decoder pillow: timm's crop and flip": pipeline(plain),
        'torchvision: decoding, its crop and flip': of_torchvision(),
        **{f'--decoder {name}: crop and flip': by(name, plain) for name in there},
        '--decoder pillow: with colour jitter': pipeline(jittered),
        **{f'--decoder {name}: with colour jitter': by(name, jittered) for name in there},
    }


def _last_row() -> Case:
    """What no decoder of parts can save above the lower end of a crop."""
    decoder = DECODERS['turbojpeg']()

    def run(data: bytes) -> Any:
        height, width = decoder.size(data)
        return decoder.part(data, Box(height - 1, 0, 1, width), 1)
    return run


def _distances(
        files: list[bytes],
        sizes: list[tuple[int, int]],
        args: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Of each way to Pillow's over the same crops."""
    import cv2

    random.seed(0)
    crop = RandomResizedCropAndInterpolation(224, interpolation=args.interpolation)
    sums: dict[str, list[tuple[float, float]]] = {}
    shrunken = 0
    for data, (height, width) in zip(files, sizes, strict=True):
        box = Box(*crop.get_params(torch.empty(1).expand(1, height, width), crop.scale, crop.ratio))
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        whole = Image.open(io.BytesIO(data)).convert('RGB')
        corners = box.left, box.top, box.left + box.width, box.top + box.height
        reference = whole.crop(corners).resize((224, 224), getattr(Image.Resampling, args.interpolation.upper()))
        ways: dict[str, np.ndarray] = {}
        for name in DECODERS:
            decoder = DECODERS[name]()
            decoder.size(data)
            ways[f'--decoder {name}'] = resized_part(
                decoder, data, box, (224, 224), InterpolationMode(args.interpolation)
            ).permute(1, 2, 0).numpy()
        part = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[rows, columns, ::-1]
        same = cv2.INTER_CUBIC if args.interpolation == 'bicubic' else cv2.INTER_LINEAR
        ways[f'OpenCV, INTER_{"CUBIC" if same == cv2.INTER_CUBIC else "LINEAR"}'] = cv2.resize(
            part, (224, 224), interpolation=same)
        ways['OpenCV, INTER_AREA'] = cv2.resize(part, (224, 224), interpolation=cv2.INTER_AREA)
        large = min(box.height, box.width) >= 448
        shrunken += large
        for name, image in ways.items():
            difference = image.astype(np.float32) - np.asarray(reference, np.float32)
            found = float(np.abs(difference).mean()), float((difference ** 2).mean())
            sums.setdefault(name, []).append(found)
            if large:
                sums.setdefault(f'{name}, large crops alone', []).append(found)
    print(f"\n{'distance to Pillow over the same crops':<52}{'mean':>8}{'PSNR dB':>12}{'largest mean':>14}")
    table = {}
    for name, found in sums.items():
        means, squares = np.array(found).T
        table[name] = {'mean_abs': float(means.mean()), 'largest_mean_abs': float(means.max()),
                       'psnr': float(np.mean(10 * np.log10(255 ** 2 / np.maximum(squares, 1e-9))))}
        print(f"{name:<52}{means.mean():>8.3f}{table[name]['psnr']:>12.1f}{means.max():>14.2f}")
    print(f'{shrunken} of {len(files)} crops were large enough to be decoded smaller')
    return table


def _jpegs(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in ('.jpg', '.jpeg'))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('--pictures', type=int, default=1000)
    parser.add_argument('--repeats', type=int, default=1)
    parser.add_argument('--quality', type=int, help='save the pictures again at this quality first')
    parser.add_argument('--interpolation', default='bilinear', choices=('bilinear', 'bicubic'))
    parser.add_argument('--profile', metavar='NAME', choices=sorted(DECODERS), help='a decoder')
    parser.add_argument('--json', help='write the numbers to this file too')
    return parser.parse_args()


if __name__ == '__main__':
    main()
