"""How many loaded iterations run under the decision that answered the one before: the real engine, a real controller.

The controller process alternates the budget between 64 and 256, so that an iteration's echo tells which decision it
ran under. An iteration counts as loaded when the one before it was a batch, too (after idling nothing has been asked).
"""

import asyncio
import multiprocessing
import socket
import time
import uuid
from itertools import pairwise
from multiprocessing.synchronize import Event

import numpy as np
import zmq

from benchmarks.report import arguments, report
from benchmarks.sockets import controller_process, temporary_endpoints
from engine.config import EngineConfig, ModelSource
from engine.link import ControllerLink, Endpoints
from engine.serve import Clocks, ServeOptions, serve
from envs.trace import make_workload
from profiles.load import replay

GOAL = 0.99


def run_server(endpoints: Endpoints, port: int) -> None:
    clocks = Clocks(time.monotonic_ns, time.time, lambda: uuid.uuid4().hex)
    serve(ServeOptions(EngineConfig(), ModelSource(), "pacer-26m", "127.0.0.1", port, [endpoints], None, clocks))


async def load(url: str, requests: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(300):
        try:
            await replay(make_workload("poisson:3", "uniform:100-500,20-60", random, requests), url, random)
        except ConnectionError:
            await asyncio.sleep(0.2)
        else:
            return
    raise ConnectionError(f"no server at {url}")


def listen(endpoints: Endpoints, done: Event, into: "multiprocessing.connection.Connection") -> None:
    link, heard = ControllerLink(zmq.Context(), [endpoints]), list[tuple[int, int, int, int]]()
    while not done.is_set():
        for t in link.receive(0.1):
            heard.append((t.iteration, t.batch.total_tokens, t.knobs.iteration, t.knobs.budget_tokens))
    into.send(heard)


def main() -> None:
    args = arguments(__doc__ or "")
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    here, there = spawn.Pipe(duplex=False)
    with temporary_endpoints() as endpoints, controller_process(endpoints, "alternate"):
        server = spawn.Process(target=run_server, args=(endpoints, port))
        listener = spawn.Process(target=listen, args=(endpoints, stop, there))
        for process in (server, listener):
            process.start()
        asyncio.run(load(f"http://127.0.0.1:{port}", 30 if args.quick else 120, args.seed))
        stop.set()
        heard = here.recv()
        server.terminate()
        for process in (server, listener):
            process.join()
    loaded = under = 0
    for before, after in pairwise(heard):
        if before[1] and after[1] and after[0] == before[0] + 1:
            loaded += 1
            under += after[2] == before[0] and after[3] == (64 if before[0] % 2 else 256)
    share = under / loaded
    report(
        "loaded iterations under the decision that answered the one before (share)",
        share,
        f">= {GOAL}",
        ok=share >= GOAL,
        seed=args.seed,
        loaded_iterations=loaded,
    )


if __name__ == "__main__":
    main()
