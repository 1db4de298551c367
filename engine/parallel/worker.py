"""The process of one rank: loads its shard of the model, then computes its part of every batch it is sent."""

import gc
import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
import zmq

from engine.config import EngineConfig, ModelSource
from engine.execution import Execution
from engine.loader import load_stage
from engine.model_runner import ModelRunner
from engine.parallel.groups import StageLink, join, rank_of, smallest
from engine.parallel.messages import REST, STOP, Done, Failed, Ready, decode_step, encode
from engine.shard import Shard

logger = logging.getLogger(__name__)

LAST_WORD_S = 5.0

Outgoing = SimpleQueue[Ready | Execution | Exception | None]
"""What a rank has to say, in order: a batch is told when it is done, an exception or None is the last word."""


def work_address(directory: Path, rank: int) -> str:
    """Where a rank is sent its batches."""
    return f"ipc://{directory}/work{rank}"


def report_address(directory: Path) -> str:
    """Where all ranks report."""
    return f"ipc://{directory}/reports"


def main(shard: Shard, source: ModelSource, config: EngineConfig, directory: Path, clock: Callable[[], int]) -> None:
    """Entry point of the process; `directory` (private, one engine's) is where the ranks meet and their sockets are.

    `source.threads` are this rank's. Ends on `STOP`, when anything fails, or with its parent. A step that runs out of
    memory fails, too: the other ranks have computed their part of it and wait for this one's. So `load_stage` takes
    before it serves what the largest step needs, links included, and sizes the KV cache beside that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the engine's parent, which ends all in order
    Thread(target=_end_with_parent, args=(directory,), daemon=True).start()
    rank = rank_of(shard)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s")
    outgoing: Outgoing = SimpleQueue()
    arguments = outgoing, report_address(directory), shard, source.device == "cuda"
    reporter = Thread(target=_report, args=arguments, daemon=True)
    reporter.start()
    try:
        with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
            inbox.bind(work_address(directory, rank))
            device = _device(source, rank)
            collectives = join(shard, device, directory)
            link = StageLink(shard, config.depth, device)
            runner = load_stage(
                source, config, clock, shard, collectives, lambda n: smallest(n, device), compute=link.compute
            )
            gc.freeze()  # a collection that walks through all that was loaded would hold up a step
            shapes = tuple(runner.graphs.shapes) if runner.graphs else ()
            outgoing.put(Ready(rank, runner.config, runner.vocab_size, runner.attention_name, shapes))
            _serve(inbox, outgoing, runner, link)
            link.close(runner)
    except Exception as error:  # whatever it is, the engine's process must hear of it
        outgoing.put(error)
        reporter.join(LAST_WORD_S)
        os._exit(1)  # the other ranks may hang, and so may an orderly end, which waits for them
    outgoing.put(None)
    reporter.join()
    if source.device == "cuda":
        os._exit(0)  # an orderly end of NCCL waits for ever where CUDA graphs hold its communicators
    dist.destroy_process_group()


def _serve(inbox: "zmq.Socket[bytes]", outgoing: Outgoing, runner: ModelRunner, link: StageLink) -> None:
    """Compute until `STOP`. On CUDA all of a batch is enqueued, and nothing waited for."""
    while (message := inbox.recv()) != STOP:
        if message == REST:
            link.rest(runner)
        else:
            outgoing.put(link.compute(runner, decode_step(message)))


def _device(source: ModelSource, rank: int) -> torch.device:
    if source.device != "cuda":
        return torch.device(source.device)
    if rank >= torch.cuda.device_count():
        raise ValueError(
            f"rank {rank} has no GPU, this machine shows {torch.cuda.device_count()}: lower tensor_parallel x "
            "pipeline_parallel, or set CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _report(outgoing: Outgoing, address: str, shard: Shard, on_cuda: bool) -> None:
    """Wait for the results, in a thread: meanwhile the next batch is launched, and tokens get out at once."""
    before: Execution | None = None
    with zmq.Context() as context, context.socket(zmq.PUSH) as reports:
        reports.linger = int(LAST_WORD_S * 1000)
        reports.connect(address)
        try:
            while (news := outgoing.get()) is not None:
                if isinstance(news, Exception):
                    raise news
                if isinstance(news, Ready):
                    if on_cuda:  # of this thread: waiting for an event would make a context on GPU 0 for every rank
                        torch.cuda.set_device(news.rank)
                    reports.send(encode(news))
                    continue
                token_ids = news.tokens()
                if shard.tp_rank == 0:
                    reports.send(encode(Done(shard.pp_rank, token_ids, news.busy_s, news.bubble_s(before))))
                before = news
        except Exception as error:
            if not isinstance(error, ValueError):  # those say all that there is to say
                logger.exception("rank %d failed", rank_of(shard))
            reports.send(encode(Failed(rank_of(shard), str(error) or repr(error))))


def _end_with_parent(directory: Path) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is started by the engine's process"
    wait([parent.sentinel])
    shutil.rmtree(directory, ignore_errors=True)  # there is nobody else left to do it
    os._exit(1)
