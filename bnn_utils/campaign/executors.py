"""Executors for campaigns: processes of this machine, or a Dask cluster, that end without noise when they must."""

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from bnn_utils.campaign.workers import WorkerError

CONNECT_SECONDS = 5


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Yield an executor of so many processes, for as long as the context lasts; an error or Ctrl-C ends them."""
    # A copy of this process (fork) would hold locks of threads that it does not have.
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["bnn_utils.campaign"])
    # Ctrl-C reaches every process in a terminal; the one that keeps what was finished answers it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=signal.signal, initargs=ignore)
    try:
        handler = signal.signal(*ignore)  # an interruption between two halves of a start would be told at length
        try:
            for _ in range(workers):
                pool.submit(abs, 0)  # starts a process
        finally:
            signal.signal(signal.SIGINT, handler)
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():  # what they are at would be for nothing
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _client(distributed: Any, address: str) -> Any:
    async def reach() -> None:  # a client that cannot be made would not end quietly
        security = distributed.Security().get_connection_args("client")
        await (await distributed.core.connect(address, timeout=CONNECT_SECONDS, **security)).close()

    try:
        asyncio.run(asyncio.wait_for(reach(), CONNECT_SECONDS + 1))  # something else may listen and never answer
        return distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except Exception as error:  # of many kinds: sockets, the address, another version
        raise OSError(
            f"--cluster {address}: no scheduler answers there ({str(error) or type(error).__name__})"
        ) from None


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Yield the executor of the Dask cluster whose scheduler listens at `address`, such as tcp://10.0.0.1:8786.

    Raises:
        ValueError: the package distributed is missing, or the address empty.
        OSError: no scheduler answers there.
        WorkerError: the cluster fails later.
    """
    try:
        import distributed
    except ImportError:
        raise ValueError("--cluster needs the package distributed: pip install 'bnn_utils[cluster]'") from None
    if not address:
        raise ValueError("--cluster is empty, expected the address of a scheduler, such as tcp://10.0.0.1:8786")
    logging.disable()  # what goes wrong is told in one line
    try:
        with _client(distributed, address) as client:
            yield client.get_executor()
    except (ValueError, OSError, WorkerError):
        raise
    except Exception as error:  # what a scheduler raises, for example of a task that killed several workers
        raise WorkerError(f"the cluster failed ({type(error).__name__}: {error}); --resume goes on") from None
    finally:
        logging.disable(logging.NOTSET)
