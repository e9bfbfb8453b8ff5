"""nbn-demo: a page that answers pictures, for people who want to see what a network says.

    nbn-demo --model output/run/model_best.pth.tar --examples pictures/
"""
import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nbn_timm.cli.predict import AnswerSettings, Network, NetworkSettings, PredictSettings, shipped_names
from nbn_timm.computation import PrecisionSettings
from nbn_timm.config import build_parser, read_given
from nbn_timm.data.pictures import find_images
from nbn_timm.deploy import FoldSettings
from nbn_timm.errors import InputError, run_cli
from nbn_timm.evaluation.settings import AdjustmentSettings
from nbn_timm.settings import Limits, SettingGroups, Settings, setting
from nbn_timm.trained.opening import CheckpointSettings, SourceSettings
from nbn_timm.training.distributed import close_world, init_world

MOST_EXAMPLES = 24
BROWSERS_SHOW = frozenset({'.png', '.apng', '.jpg', '.jpeg', '.jfif', '.gif', '.webp', '.avif', '.bmp', '.ico'})
COLUMNS = ('class', 'probability', 'training pictures', 'shot')
NO_PAGE = 'nbn-demo needs Gradio, which is not installed: pip install "nbn_timm[demo]"'


@dataclass(frozen=True)
class PageSettings(Settings):
    """The page."""

    title = 'page'

    examples: str | None = setting(None, 'folder of pictures to click on', metavar='DIR', kind='place')
    host: str = setting('127.0.0.1', 'address to serve at; 0.0.0.0 lets other machines in', metavar='ADDRESS',
                        kind='machine')
    port: int = setting(7860, 'of the page', limits=Limits(1, 65_535), kind='machine')


@dataclass(frozen=True)
class DemoSettings(SettingGroups):
    """All settings of the page."""

    network: NetworkSettings = NetworkSettings()
    source: SourceSettings = SourceSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    form: FoldSettings = FoldSettings()
    adjustment: AdjustmentSettings = AdjustmentSettings()
    precision: PrecisionSettings = PrecisionSettings()
    answer: AnswerSettings = AnswerSettings()
    page: PageSettings = PageSettings()


@dataclass(frozen=True)
class Shown:
    """What the page shows of an answer.

    Attributes:
        sentence: The answer, or why there is none.
        probabilities: By the names of the likeliest classes.
        rows: Of a table with `COLUMNS`.
    """

    sentence: str
    probabilities: dict[str, float]
    rows: list[list[Any]]


def show(network: Network, file: str | None) -> Shown:
    """Answer a picture for the page.

    Args:
        network: That answers.
        file: Of the picture; None where there is none.
    """
    if not file:
        return Shown('Choose a picture.', {}, [])
    answer = next(network.answers([file]))
    if answer.classes is None:
        return Shown(str(answer.fault).replace(file, os.path.basename(file)), {}, [])  # the folder is Gradio's
    best, threshold = answer.classes[0], network.settings.answer.threshold
    seen = '' if best.train_images is None else (
        f' Training has seen {best.train_images:,} picture{"" if best.train_images == 1 else "s"} of it ({best.shot}).')
    sure = threshold is None or best.probability >= threshold
    sentence = f'{best.name}, {best.probability:.1%}.{seen}' if sure else (
        f'Not sure: {best.name} is likeliest, but {best.probability:.1%} is below {threshold:.0%}.{seen}')
    rows = [[found.name, f'{found.probability:.2%}', 'n/a' if found.train_images is None else found.train_images,
             found.shot or 'n/a'] for found in answer.classes]
    return Shown(sentence, {found.name: found.probability for found in answer.classes}, rows)


def example_files(folder: str | None, tell: Callable[[str], None] = print) -> list[str]:
    """Pictures of a folder that a browser shows, evenly spaced in their order.

    Args:
        folder: Searched, with all below it.
        tell: Takes a line on those that are left out.

    Raises:
        InputError: It holds none.
    """
    if folder is None:
        return []
    found = find_images([folder]).files
    if not found or found == (folder,):
        raise InputError(f"there is no picture in the folder '{folder}': correct --examples, or leave it out")
    files = [file for file in found if _extension(file) in BROWSERS_SHOW]
    if len(files) < len(found):
        others = ', '.join(sorted({_extension(file) for file in found} - BROWSERS_SHOW))
        if not files:
            raise InputError(f"browsers show none of the pictures in '{folder}' ({others}): give --examples as PNG or "
                             'JPEG, or leave it out')
        tell(f"{len(found) - len(files):,} of {len(found):,} pictures in '{folder}' are no examples, since browsers do "
             f'not show them ({others})')
    return [files[round(index * (len(files) - 1) / (MOST_EXAMPLES - 1))] for index in range(MOST_EXAMPLES)] if (
        len(files) > MOST_EXAMPLES) else files


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def build_page(network: Network, examples: Sequence[str]) -> Any:
    """The page, as Gradio's Blocks.

    Raises:
        InputError: Gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise InputError(NO_PAGE) from error

    def answer(file: str | None) -> tuple[str, dict[str, float], list[list[Any]]]:
        shown = show(network, file)
        return f'### {shown.sentence}', shown.probabilities, shown.rows

    with gradio.Blocks(title=f'nbn_timm: {network.name}') as page:
        gradio.Markdown(f'# {network.name}\n' + '\n'.join(f'- {note}' for note in network.notes))
        with gradio.Row():
            with gradio.Column():
                # The file as it is, so that it is read, and turned upright, as nbn-predict does.
                picture = gradio.Image(type='filepath', image_mode=None, label='picture', height=320)
                picture.preprocess = _unopened(picture.preprocess)
            with gradio.Column():
                sentence = gradio.Markdown('### Choose a picture.')
                label = gradio.Label(label='probabilities', num_top_classes=network.top_classes.topk)
                table = gradio.Dataframe(headers=list(COLUMNS), interactive=False, label='classes')
        picture.change(answer, picture, [sentence, label, table])
        if examples:
            gradio.Examples([[file] for file in examples], picture)
    return page


def _unopened(preprocess: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Gradio's way from what the browser sends to a file, without the look at the picture that refuses damaged ones."""
    return lambda sent: getattr(sent, 'path', None) or preprocess(sent)


def create_parser() -> argparse.ArgumentParser:
    """Flags carry the names that they have in nbn-predict."""
    return build_parser(DemoSettings, 'nbn-demo', 'A page in the browser that answers pictures: the likeliest classes, '
                        'their probabilities, and how many training pictures each class had. Needs Gradio.')


def open_demo(settings: DemoSettings, device: Any) -> Network:
    """The network behind the page.

    Raises:
        InputError: None was named, or it cannot be opened.
    """
    if not settings.network.model:
        raise InputError('there is no --model: give the folder of a run, a checkpoint file, a name with pretrained '
                         'weights (shipped with '
                         f'this package: {", ".join(shipped_names())}), hf-hub:USER/REPO or local-dir:DIR')
    known = PredictSettings.declared()
    network = Network.open(PredictSettings.of({
        name: value for name, value in settings.values().items() if name in known}), device)
    if network.label_sets:
        raise InputError(f"the page shows one class of a picture, and '{settings.network.model}' gives a set of them: "
                         'use nbn-predict')
    return network


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command until it is interrupted; see `create_parser`.

    Raises:
        InputError: Something given is wrong, or Gradio is not installed.
    """
    given = read_given(DemoSettings, create_parser(), argv)
    settings = given.settings()
    given.check_effects(settings, print)
    examples = example_files(settings.page.examples)
    world = init_world(settings.precision.device)
    try:
        page = build_page(open_demo(settings, world.device), examples)
        try:
            page.launch(server_name=settings.page.host, server_port=settings.page.port, show_error=True,
                        allowed_paths=examples)
        except OSError as error:
            raise InputError(f'port {settings.page.port} cannot be served at ({error}): give another --port') from error
    finally:
        close_world(world)


def console() -> int:
    """Entry point of `nbn-demo`."""
    return run_cli(main, 'nbn-demo')


if __name__ == '__main__':
    sys.exit(console())
