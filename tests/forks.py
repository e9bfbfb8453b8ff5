"""Processes as forks of this one, which has imported what would take each of them seconds.

A fork has the environment, the folder and the standard output that it is given, as a command has. One test of each
kind starts a real process.
"""
import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import torch

_CONTEXT = multiprocessing.get_context('fork')

# The first backward pass of a process decides whether autograd works in its forks: not if torch.export has been used by
# then. So it is here, before any test.
torch.ones(1, requires_grad=True).backward()


class Ended(NamedTuple):
    """What a process has left."""

    returncode: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A TCP port on the loopback address that nobody uses."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def run_ranks(main: Callable[..., object], *args: Any, size: int = 2, timeout: float = 300) -> None:
    """Call `main(*args)` in every process of a group, in the environment that torchrun gives; one failure ends all."""
    port = free_port()
    ranks = [_fork(_run_rank, rank, size, port, main, args) for rank in range(size)]
    try:
        left = {process.sentinel: process for process in ranks}
        while left:
            ended = [left.pop(sentinel) for sentinel in wait(list(left), timeout)]  # type: ignore[call-overload]
            assert ended, f'a process has not ended within {timeout} s'
            for process in ended:
                process.join()
                assert process.exitcode == 0, f'rank {ranks.index(process)} failed, see its traceback'
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run_rank(rank: int, size: int, port: int, main: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(size), 'LOCAL_WORLD_SIZE': str(size),
                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    main(*args)


def run_killed_at(line: str, main: Callable[..., object], *args: Any) -> None:
    """Call `main(*args)` in a process of its own and kill that as soon as it prints a line that begins so."""
    reader, writer = os.pipe()
    process = _fork(_print_into, writer, main, args)
    os.close(writer)
    with open(reader, encoding='utf-8') as printed:
        for found in printed:
            if found.startswith(line):
                process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _print_into(pipe: int, main: Callable[..., object], args: tuple[Any, ...]) -> None:
    sys.stdout = open(pipe, 'w', buffering=1, encoding='utf-8')
    main(*args)


def run_python(*arguments: Any, cwd: Path | str = '.', environment: Mapping[str, str] | None = None) -> Ended:
    """What `python ARGUMENTS` leaves, as a script, `-m MODULE` or `-c CODE`; `environment` is all that it sees."""
    with tempfile.TemporaryDirectory() as folder:
        process = _fork(_run_python, folder, str(cwd), dict(environment or os.environ), [*map(str, arguments)])
        process.join(300)
        process.kill()
        process.join()
        out, error = (Path(folder, name).read_text(encoding='utf-8') for name in ('out', 'error'))
    assert process.exitcode is not None
    return Ended(process.exitcode, out, error)


def _run_python(folder: str, cwd: str, environment: dict[str, str], arguments: list[str]) -> None:
    for number, name in ((1, 'out'), (2, 'error')):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    encoding = environment.get('PYTHONIOENCODING', 'utf-8')
    sys.stdout, sys.stderr = (open(number, 'w', buffering=1, encoding=encoding, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    importlib.reload(huggingface_hub.constants)  # which has read the environment
    option, *rest = arguments
    try:
        if option == '-c':
            sys.argv = [option, *rest[1:]]
            exec(compile(rest[0], '<string>', 'exec'), {'__name__': '__main__'})
        elif option == '-m':
            sys.argv = rest
            warnings.filterwarnings('ignore', message='.*found in sys.modules', category=RuntimeWarning)
            runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(option, run_name='__main__')
    except SystemExit as end:
        os._exit(_flushed(end.code if isinstance(end.code, int) else int(bool(end.code))))
    except BaseException:
        traceback.print_exc()
        os._exit(_flushed(1))
    os._exit(_flushed(0))


def _flushed(code: int) -> int:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    return code


def _fork(main: Callable[..., object], *args: Any) -> BaseProcess:
    process = _CONTEXT.Process(target=_begin, args=(main, args), daemon=True)
    process.start()
    return process


def _begin(main: Callable[..., object], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the pool of the parent's threads has not come along
    logging.root.handlers.clear()  # those of pytest
    multiprocessing.current_process()._config['daemon'] = False  # type: ignore[attr-defined]  # it may have workers
    main(*args)
