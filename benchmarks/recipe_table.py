"""The shipped configs as the table of docs/recipes.md: `python benchmarks/recipe_table.py > docs/recipes.md`.

Settings are read as train.py reads them; the last column names the papers that a config's header cites.
"""
import argparse
import re
from pathlib import Path

from nbn_timm.cli.train_args import build_parser

from nbn_timm.config import parse_args, shipped_configs

CITATION = re.compile(r'(\w+ et al\.),? \(?((?:AAAI|CVPR|ECCV|ICCV|ICLR|NeurIPS|TIP) \d{4}|arXiv \d{4}\.\d{5})')


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


HEAD = """# Recipes

Every config that ships, as train.py reads it, made by `python benchmarks/recipe_table.py`. Each file says at its head
which published recipe it follows and where it departs from it. None of them has been run to its end by this project
unless [results.md](results.md) says so.

| config | benchmark | model | loss, sampler or stage | epochs | batch | learning rate | follows |
|---|---|---|---|---|---|---|---|"""


def method(args: argparse.Namespace) -> str:
    """What is particular about a recipe's training."""
    loss = args.loss.replace('_', ' ') + (', deferred' if 'start_epoch' in args.loss_kwargs else '')
    own_loss = args.stage is None or args.stage in ('crt', 'lws')
    parts = [f'stage {args.stage}' if args.stage else '', loss if own_loss else '',
             '' if args.sampler == 'instance_balanced' else f'{args.sampler.replace("_", " ")} draws']
    return '; '.join(part for part in parts if part)


def main() -> None:
    print(HEAD)
    for name, path in shipped_configs().items():
        args = parse_args(build_parser(), ['--config', str(path)])
        fitted = args.stage in ('tau_norm', 'ncm')
        batch = args.global_batch_size or args.batch_size
        steps = ('', '', '') if fitted else (args.epochs, batch, schedule(args))
        model = f'`{args.model}`' if args.model else 'the checkpoint\'s'
        print(f'| [`{name}`](../configs/{name}.yaml) | {args.dataset} | {model} | {method(args)} | '
              f'{" | ".join(map(str, steps))} | {sources(path)} |')


if __name__ == '__main__':
    main()
