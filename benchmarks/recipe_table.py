"""The shipped configs as the Markdown table of README: `python benchmarks/recipe_table.py`.

Settings are read as train.py reads them; the last column names the papers that a config's header cites.
"""
import argparse
import re
from pathlib import Path

from nbn_timm.cli.train_args import build_parser
from nbn_timm.config import parse_args, shipped_configs

CITATION = re.compile(r'(\w+ et al\.),? \(?((?:AAAI|CVPR|ICCV|ICLR|NeurIPS|TIP) \d{4}|arXiv \d{4}\.\d{5})')


def schedule(args: argparse.Namespace) -> str:
    """Learning rate and how it changes."""
    shapes = {
        'cosine': 'cosine',
        'step': f'x{args.decay_rate:g} every {args.decay_epochs:g} epochs',
        'multistep': f'x{args.decay_rate:g} at epochs {" and ".join(map(str, args.decay_milestones))}',
        'constant': 'constant',
    }
    warmup = f'{args.warmup_epochs} epochs warm-up, ' if args.warmup_epochs else ''
    return f'{args.lr:g}, {warmup}{shapes[args.sched]}'


def sources(config: Path) -> str:
    """Papers named in the comment at the head of a config, in that order."""
    comment = ' '.join(line[1:].strip() for line in config.read_text(encoding='utf-8').splitlines() if line[:1] == '#')
    cited = dict.fromkeys(f'{authors}, {venue}' for authors, venue in CITATION.findall(comment))
    return '; '.join(cited) or 'own'


def main() -> None:
    print('| config | benchmark | model | loss | epochs | batch | learning rate | follows |')
    print('|---|---|---|---|---|---|---|---|')
    for name, path in shipped_configs().items():
        args = parse_args(build_parser(), ['--config', str(path)])
        batch = args.global_batch_size or args.batch_size
        loss = args.loss.replace('_', ' ') + (', deferred' if 'start_epoch' in args.loss_kwargs else '')
        print(f'| [`{name}`](configs/{name}.yaml) | {args.dataset} | `{args.model}` | {loss} | '
              f'{args.epochs} | {batch} | {schedule(args)} | {sources(path)} |')


if __name__ == '__main__':
    main()
