"""Starts one process of a command for each device of this machine (torchrun's own launcher).

python -m train --gpus 8 --model resnet50 --data imagenet
make train MODEL=resnet50 DATA=imagenet GPUS=8

With --max_restarts K, if a process was killed or failed, all start again from the last checkpoint, up to K times. With
several machines, run torchrun itself on each: docs/several-devices.md.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from command import safe_path, typed_command, with_underscores
from data.processors import processors
from train import TrainError

# Signals that end all processes of a command.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


def on_devices(
    module: str,
    words: Sequence[str],
    parse: Callable[[list[str]], Any],
    work: Callable[[Any], Any],
    *,
    kept: str = "the same command continues from the last checkpoint, if there is one",
) -> None:
    """Calls work with the result of parsing the command line's words: here, or with --gpus N in N processes of
    `module`.

    kept: what is not lost if a process is killed, for the message. Raises TrainError, and the errors of parse, before
    any process is started.
    """
    words = with_underscores(list(words))
    gpus, words = _taken(words, "gpus", "the number of devices", least=1)
    restarts, words = _taken(words, "max_restarts", "how often the processes are started again", least=0)
    parsed = parse(words)
    if gpus in (None, 1) or "WORLD_SIZE" in os.environ:
        work(parsed)
    else:
        _launch(gpus, restarts or 0, module, words, kept)


def share_processors(count: int) -> None:
    """Divides the processors of this process among `count` processes started from now on, as threads of each."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(processors() // count, 1)))


def _taken(words: list[str], option: str, what: str, *, least: int) -> tuple[int | None, list[str]]:
    """The number after --option, if it is given, and the other words. Raises TrainError if it is not a number."""
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == f"--{option}":
            value = value if equals else words[at + 1] if at + 1 < len(words) else ""
            if not value.isdecimal() or int(value) < least:
                raise TrainError(f"{option}={value}: give {what}, at least {least}")
            return int(value), words[:at] + words[at + (1 if equals else 2) :]
    return None, words


def _launch(count: int, restarts: int, module: str, words: Sequence[str], kept: str) -> None:
    # Importing the launcher takes a second; a single process does not need it.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A process has printed itself what ended it, in one line.
    os.environ.setdefault("TYPED_COMMAND", typed_command())
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    share_processors(count)
    # Otherwise restarted processes may use each other's old addresses (PyTorch issue 135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.2,
        # Ignored signals (SIGHUP, by nohup) stay ignored.
        signals_to_handle=",".join(
            name for name in _SIGNALS if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
        ),
    )
    try:
        elastic_launch(config, sys.executable)("-u", *safe_path(), "-m", module, *words)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        # A process that lost its peer exits with 1; the one that knows the reason with another code.
        code = next((code for code in codes if code not in (0, 1)), 1)
        if code < 0:
            print(f"error: a process was ended by signal {-code}; {kept}", file=sys.stderr)
        sys.exit(code if code > 0 else 2)
    except SignalException:
        sys.exit(130)
