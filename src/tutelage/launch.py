"""Start the processes of one run on this machine through torchrun's own launcher, and say how they ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

from tutelage.errors import Stopped, UserError
from tutelage.loading import loading
from tutelage.processes import cores, place

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SHUTDOWN_SECONDS = 600
"""How long processes may take to save after a signal; torchrun's own 30 seconds are few for a large model.

TORCH_ELASTIC_SHUTDOWN_TIMEOUT changes it, as it does torchrun's."""

_JOIN_SECONDS = 600
_LOOPBACK = "127.0.0.1"
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
_BACKEND = "tutelage-loopback"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""On which interfaces gloo and NCCL listen."""

_CHANGED = ("OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE", *_INTERFACES)


def launch(processes: int, module: Sequence[str]) -> dict[int, int]:
    """Run `python -m MODULE...` in so many processes of this machine, and wait until all have ended.

    They listen on loopback alone: torch's store would take words, some of which it unpickles, from anyone.
    Signals that are not ignored here are passed on to them. When one ends with an error, torchrun's launcher
    ends the others, by SIGTERM and after 30 seconds by SIGKILL.

    Returns:
        Exit status of each rank that failed, below 0 for a signal, the one that failed first before those
        that were ended for it; empty if all ended well.

    Raises:
        Stopped: this process was asked to stop, and they have ended.
        UserError: this process is one of several itself.
    """
    if place().size > 1:
        raise UserError(
            f"this process is one of {place().size} already (WORLD_SIZE); give the number of processes to "
            "torchrun, to srun or to --nproc"
        )
    with loading():
        from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415 - slow
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415 - slow
        from torch.distributed.elastic.rendezvous import rendezvous_handler_registry  # noqa: PLC0415 - slow
        from torch.distributed.launcher.api import elastic_launch  # noqa: PLC0415 - slow
        from torch.distributed.run import config_from_args, parse_args  # noqa: PLC0415 - slow

    rendezvous_handler_registry.register(_BACKEND, _meet_on_loopback)
    options = ["--rdzv-backend", _BACKEND, "--rdzv-endpoint", _LOOPBACK, "--nproc-per-node", str(processes)]
    with _as_before(), tempfile.TemporaryDirectory(prefix="tutelage-") as notes:
        for name in _INTERFACES:
            os.environ.setdefault(name, _INTERFACE)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
        options += ["--log-dir", notes]  # else the launcher leaves a directory for each start
        asked = parse_args([*options, "-m", *module])  # type: ignore[no-untyped-call]
        config, command, arguments = config_from_args(asked)
        handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        config.signals_to_handle = ",".join(number.name for number in handled)
        if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
            config.shutdown_timeout = _SHUTDOWN_SECONDS
        try:
            elastic_launch(config, command)(*arguments)
        except ChildFailedError as error:
            found = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return dict(sorted(found.items(), key=lambda item: item[1] == -signal.SIGTERM))
        except SignalException:
            raise Stopped from None
    return {}


def _meet_on_loopback(parameters: RendezvousParameters) -> RendezvousHandler:
    """Make the launcher's meeting place: torch's static one, with a store that listens on loopback alone."""
    from torch._C._distributed_c10d import TCPStore  # noqa: PLC0415 - slow
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import (  # noqa: PLC0415 - slow
        StaticTCPRendezvous,
    )

    class Meeting(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return _BACKEND

    with socket.create_server((_LOOPBACK, 0)) as listening:
        port = listening.getsockname()[1]
        handler = Meeting(_LOOPBACK, port, 0, 1, parameters.run_id, _JOIN_SECONDS)
        handler._store = TCPStore(  # noqa: SLF001 - left to itself, it listens on every interface
            _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
    return handler


def describe(status: int) -> str:
    """Words for the exit status of a process: by which signal or with which code it ended."""
    if status >= 0:
        return f"its process ended with exit code {status}"
    guess = " (out of memory?)" if status == -signal.SIGKILL else ""
    return f"its process ended by signal {signal.Signals(-status).name}{guess}"


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Restore what the launcher changes: signal handlers and the environment; keep its log to itself.

    Its log tells about every process that it ends, and would bury the one line of the process that failed.
    """
    environment, disabled = {name: os.environ.get(name) for name in _CHANGED}, logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
