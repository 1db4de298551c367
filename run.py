"""The command line: one verb a job. Everything else lives in the rooms; time and ids come in here."""

import argparse
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import flags
from engine.link import CurveKeys, Endpoints

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

Parser = argparse.ArgumentParser
Verb = Callable[[argparse.Namespace], int]

REFUSED = 2  # exit status for input that will not do, and would not the next time
RESTART_S = 1.0  # a controller that dies at once is not started more often


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `pacer` command; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        args = _parser().parse_args(argv)
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"pacer {args.verb}: {error}", file=sys.stderr)
        return REFUSED


def _parser() -> Parser:
    parser = Parser("pacer", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, run, text, parts in (
        ("serve", _serve, "run an engine and its HTTP server", (_sockets, flags.add_flags)),
        ("control", _control, "run the controller sidecar for running engines", (_sockets, _controller)),
        ("launch", _launch, "run an engine with the controller beside it", (_sockets, flags.add_flags, _controller)),
        ("record", _record, "store a running engine's requests and iterations", (_sockets, _recording)),
        ("bench", _bench, "replay a workload against any OpenAI endpoint", (_load,)),
        ("compare", _compare, "compare policies on the same requests, in simulation", (_comparison,)),
        ("profile", _profile, "measure how long an engine's steps take, and fit a step-time model", (_profiling,)),
        ("tune", _tune, "search knobs and law parameters for a machine, a workload and a promise", (_sockets, _tuning)),
        ("train", _train, "train a law on traces, for a machine and a promise, and score it", (_training,)),
        ("doctor", _doctor, "say which devices and attention backends this machine has", ()),
        ("demo", _demo, "compare static and adaptive budgets on a real engine, here and now", (_demonstration,)),
    ):
        sub = verbs.add_parser(
            verb, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        for add_part in parts:
            add_part(sub)
    return parser


def _sockets(parser: Parser) -> None:
    add = parser.add_argument_group("sockets").add_argument
    default = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"pacer-{os.getuid()}"
    add("--socket-dir", type=Path, default=default, help="where ipc sockets are, mode 0700")
    add("--curve-key", type=Path, help="this side's .key_secret file, for tcp")
    add("--curve-peer", type=Path, help="the other side's .key file, for tcp")


def _controller(parser: Parser) -> None:
    from policies.catalogue import LAWS  # noqa: PLC0415

    add = parser.add_argument_group("controller").add_argument
    flags.add_tuned_flag(parser)
    add("--policy", help=f"with parameters as in pid:set_point=0.9; default: pid; one of {', '.join(LAWS)}")
    add("--slo", help='the promise in milliseconds, as in "tbt:100"')
    add("--profile", type=Path, help="step-time model of the machine, for policies that predict; default: of --tuned")
    add("--journal", type=Path, help="folder for every decision with its telemetry, as Parquet")
    if "--name" not in parser._option_string_actions:
        add(
            "--engine",
            action="append",
            metavar="NAME | TELEMETRY,KNOBS",
            help="an engine's --name or its tcp:// addresses; repeatable",
        )


def _recording(parser: Parser) -> None:
    add = parser.add_argument
    add("--engine", default="pacer", metavar="NAME | TELEMETRY,KNOBS", help="its --name or its tcp:// addresses")
    add("--out", type=Path, required=True, help="folder for requests.csv and iterations.parquet")
    add("--duration", type=float, metavar="S", help="seconds from the first message on; without it until Ctrl-C")


def _load(parser: Parser) -> None:
    from profiles.bench_flags import add_flags  # noqa: PLC0415

    add_flags(parser)


def _comparison(parser: Parser) -> None:
    from profiles.compare_flags import add_flags  # noqa: PLC0415

    add_flags(parser)


def _profiling(parser: Parser) -> None:
    from profiles.sweep import add_flags  # noqa: PLC0415

    add_flags(parser)


def _tuning(parser: Parser) -> None:
    from profiles.tune_flags import add_flags  # noqa: PLC0415

    add_flags(parser)


def _training(parser: Parser) -> None:
    from profiles.training_flags import add_flags  # noqa: PLC0415

    add_flags(parser)


def _demonstration(parser: Parser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("pacer-out/demo"), help="folder for telemetry, journal, table and picture")
    add("--seed", type=int, default=0)


def _serve(args: argparse.Namespace) -> int:
    from engine.serve import Clocks, ServeOptions, serve  # noqa: PLC0415

    places = [Endpoints.ipc(args.socket_dir, args.name)]
    if args.listen:
        places.append(_tcp(args.listen))
    clocks = Clocks(time.monotonic_ns, time.time, lambda: uuid.uuid4().hex)
    config, source, name = flags.engine_config(args), flags.model_source(args), flags.model_name(args)
    tuned = flags.tuned(args)
    return serve(ServeOptions(config, source, name, args.host, args.port, places, _keys(args), clocks, tuned))


def _control(args: argparse.Namespace) -> int:
    from controller.sidecar import SidecarOptions, run  # noqa: PLC0415
    from envs.slo import Slo  # noqa: PLC0415
    from policies.catalogue import parse_law  # noqa: PLC0415

    engines = [_endpoints(args, name) for name in args.engine or ["pacer"]]
    tuned = flags.tuned(args)
    policy, slo, model = (tuned.policy, tuned.slo, tuned.step_time) if tuned else (args.policy or "pid", args.slo, None)
    law = parse_law(policy, Slo.parse(slo) if slo else None, _step_time(args.profile, model))
    admit = tuned.check_bounds if tuned else None
    return run(SidecarOptions(engines, law, args.journal, args.socket_dir, _keys(args), time.monotonic_ns, admit))


def _launch(args: argparse.Namespace) -> int:
    """Both children get their signals from here; a dead controller is started again, a dead engine ends all."""
    args.engine = [args.name]
    stopping: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.append(True))
    server, sidecar = _child(_serve, args), _child(_control, args)
    started_s = time.monotonic()
    while not stopping and server.is_alive() and sidecar.exitcode != REFUSED:
        multiprocessing.connection.wait([server.sentinel, sidecar.sentinel], timeout=0.5)
        if sidecar.exitcode not in (None, REFUSED) and time.monotonic() - started_s > RESTART_S and not stopping:
            logging.warning("the controller died with exit status %s: starting it again", sidecar.exitcode)
            sidecar, started_s = _child(_control, args), time.monotonic()
    refused = REFUSED in (server.exitcode, sidecar.exitcode)
    for child in (sidecar, server):
        child.terminate()
        child.join()
    return 0 if stopping else REFUSED if refused else 1


def _record(args: argparse.Namespace) -> int:
    from profiles.record import run_record  # noqa: PLC0415

    return run_record(_endpoints(args, args.engine), args.out, args.duration, _keys(args), time.monotonic_ns)


def _bench(args: argparse.Namespace) -> int:
    from profiles.bench import run_asked  # noqa: PLC0415

    return run_asked(args)


def _compare(args: argparse.Namespace) -> int:
    from profiles.compare_live import run_asked  # noqa: PLC0415

    return run_asked(_start, args, time.strftime("%Y-%m-%d %H:%M"))


def _profile(args: argparse.Namespace) -> int:
    from profiles.sweep import run_asked  # noqa: PLC0415

    return run_asked(args, time.monotonic_ns, time.strftime("%Y-%m-%d %H:%M"))


def _tune(args: argparse.Namespace) -> int:
    date = time.strftime("%Y-%m-%d %H:%M")
    if args.live:
        from profiles.tune_live import run_live  # noqa: PLC0415

        return run_live(args, _endpoints(args, args.live), _keys(args), time.monotonic_ns, date)
    from profiles.tune import run_asked  # noqa: PLC0415

    return run_asked(args, time.monotonic_ns, date)


def _train(args: argparse.Namespace) -> int:
    from profiles.training import run_asked  # noqa: PLC0415

    return run_asked(args, time.monotonic_ns, time.strftime("%Y-%m-%d %H:%M"))


def _doctor(args: argparse.Namespace) -> int:
    from engine.doctor import diagnose  # noqa: PLC0415

    print("\n".join(diagnose()))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from profiles.demo import run_demo  # noqa: PLC0415

    return run_demo(_start, args.out, args.seed)


def _start(verb: str, *flags: str) -> BaseProcess:
    parsed = _parser().parse_args([verb, *flags])
    return _child(parsed.run, parsed, logging.WARNING)


def _child(run: Verb, args: argparse.Namespace, log_level: int = logging.INFO) -> BaseProcess:
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_run_child, args=(run, args, log_level), name=run.__name__[1:])
    process.start()
    return process


def _run_child(run: Verb, args: argparse.Namespace, log_level: int) -> None:
    logging.basicConfig(level=log_level, format=f"%(asctime)s {run.__name__[1:]} %(levelname)s %(message)s")
    try:
        sys.exit(run(args))
    except (ValueError, OSError) as error:
        print(f"pacer {run.__name__[1:]}: {error}", file=sys.stderr)
        sys.exit(REFUSED)


def _endpoints(args: argparse.Namespace, engine: str) -> Endpoints:
    return _tcp(engine) if "://" in engine else Endpoints.ipc(args.socket_dir, engine)


def _tcp(addresses: str) -> Endpoints:
    telemetry, _, knobs = addresses.partition(",")
    if not (telemetry.startswith("tcp://") and knobs.startswith("tcp://")):
        raise ValueError(f"{addresses!r} is not two addresses: write tcp://HOST:PORT,tcp://HOST:PORT (telemetry,knobs)")
    return Endpoints(telemetry, knobs)


def _step_time(profile: Path | None, tuned: dict[str, Any] | None) -> "StepTimeModel | None":
    from envs.step_time import StepTimeModel  # noqa: PLC0415

    if profile is not None:
        return StepTimeModel.load(profile)
    return None if tuned is None else StepTimeModel.of(tuned)


def _keys(args: argparse.Namespace) -> CurveKeys | None:
    if args.curve_key is None and args.curve_peer is None:
        return None
    if args.curve_key is None or args.curve_peer is None:
        raise ValueError("CURVE needs both --curve-key (own secret) and --curve-peer (the other side's public key)")
    return CurveKeys.load(args.curve_key, args.curve_peer)


if __name__ == "__main__":
    sys.exit(main())
