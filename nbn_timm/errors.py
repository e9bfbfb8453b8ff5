"""The one error that users meet, and how commands report it."""
import difflib
import errno
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence with the thing, the reason and the remedy.

    A password in an address does not get into the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_password(message))


_LONGEST_NAME = 400
_LONGEST_TEXT = 800


def nearest(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.5) -> str:
    """Return `; did you mean 'x'?` for the known names closest to `name`, or an empty string.

    Args:
        name: What was given.
        known: Names that there are.
        most: How many to return.
        cutoff: How like it a name is at least, from 0 to 1.
    """
    found = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    *others, last = ['', *(f"'{match}'" for match in found)]
    return f'; did you mean {", ".join(others[1:])}{" or " * bool(others[1:])}{last}?' if last else ''


def without_password(text: str) -> str:
    """The text without the user and password of the addresses in it."""
    return re.sub(r'(?<=://)[^/\s?#]*@', '', text)


def one_line(text: str) -> str:
    """The text with line breaks and other control characters, as names may hold them, written as in Python."""
    return ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def in_words(error: BaseException) -> str:
    """What an error says, on one line; with its type where the text is only a key or a number, or empty.

    The middle of a very long text is left out, as of a damaged archive whose names are kilobytes.
    """
    text, name = ' '.join(str(error).split()), type(error).__name__
    if len(text) > _LONGEST_TEXT:
        text = f'{text[:_LONGEST_TEXT // 2]} ... {text[-_LONGEST_TEXT // 2:]}'
    if isinstance(error, KeyError) or not any(map(str.isalpha, text)):
        return f'{name}: {text}' if text else name
    return text


def quoted(name: str) -> str:
    """A name in quotes for a sentence, on one line; the middle of a very long one is left out."""
    if len(name) > _LONGEST_NAME:
        name = f'{name[:_LONGEST_NAME // 2]}...{name[-_LONGEST_NAME // 2:]}'
    return f"'{one_line(name)}'"


_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_LOST_PEER = ('Connection closed by peer', 'Connection reset by peer')  # what gloo says when a process is gone


def run_cli(main: Callable[[list[str] | None], None], prog: str) -> int:
    """Run a command and return its exit code.

    An `InputError` becomes one line on stderr and exit code 1, said once where several processes fail alike; anything
    else stays a traceback.
    """
    # torch's advice on few cores; the number of workers decides what is drawn, so it is no machine's to change.
    warnings.filterwarnings('ignore', message='This DataLoader will create', category=UserWarning)
    try:
        code = _run(main, prog)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        return 1
    except OSError as error:
        # Of printing; what is written to files is reported where it is.
        if error.filename is not None or error.errno not in _REFUSED:
            raise
        drop_stdout()
        _say(prog, f'the standard output cannot be written ({error.strerror}): free some space, or send it elsewhere')
        return 1
    return code


def _run(main: Callable[[list[str] | None], None], prog: str) -> int:
    try:
        main(None)
    except InputError as error:
        _say(prog, _sentence(error))
        return 1
    except KeyboardInterrupt:
        print(f'{prog}: interrupted', file=sys.stderr, flush=True)
        return 130
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST_PEER):
            raise
        _say(prog, 'another process of this run has failed, see its message')
        return 1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _say(prog, f'{quoted(str(error.filename))} is no file ({error.strerror}): correct the path')
        return 1
    except SystemExit as end:  # of --help and the like
        if not isinstance(end.code, int | None):
            raise
        return end.code or 0
    return 0


def _sentence(error: InputError) -> str:
    """The message in one line; a DataLoader worker hands it on at the end of its whole traceback."""
    text = str(error)
    if text.startswith(f'Caught {InputError.__name__} in '):
        text = text.rpartition(f'\n{InputError.__module__}.{InputError.__name__}: ')[2].removesuffix('\n')
    return one_line(text)


def _say(prog: str, sentence: str) -> None:
    if first_to_say(sentence):
        print(f'{prog}: error: {sentence}', file=sys.stderr, flush=True)


def first_to_say(sentence: str) -> bool:
    """Whether no other process of this torchrun has said so; true where they cannot be asked."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return True
    from torch.distributed import TCPStore
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    digest = hashlib.sha256(sentence.encode(errors='backslashreplace')).hexdigest()
    try:
        store = TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False,
                         timeout=timedelta(seconds=10))
        return store.add(f'nbn_timm/said/{attempt}/{digest}', 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def drop_stdout() -> None:
    """Let what is still buffered go nowhere when Python ends."""
    with suppress(OSError, ValueError, AttributeError):  # it may have no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
