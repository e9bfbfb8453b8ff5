"""The one error that users meet, and how commands report it."""
import difflib
import os
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence with the thing, the reason and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ''


def quoted(name: str) -> str:
    """A name in quotes for a sentence: on one line and in letters that any terminal takes."""
    return "'" + ''.join(letter if letter.isprintable() else letter.encode('unicode_escape').decode('ascii')
                         for letter in name) + "'"


_LOST_PEER = ('Connection closed by peer', 'Connection reset by peer')  # what gloo says when a process is gone


def run_cli(main: Callable[[list[str] | None], None], prog: str) -> int:
    """Run a command; an `InputError` becomes one line on stderr and exit code 1, anything else stays a traceback."""
    try:
        main(None)
    except InputError as error:
        # A DataLoader worker re-raises with its whole traceback as the message; the sentence is its last line.
        sentence = str(error).strip().splitlines()[-1].removeprefix(f'{InputError.__module__}.InputError: ')
        print(f'{prog}: error: {sentence}', file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f'{prog}: interrupted', file=sys.stderr, flush=True)
        return 130
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST_PEER):
            raise
        print(f'{prog}: error: another process of this run has failed, see its message', file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
