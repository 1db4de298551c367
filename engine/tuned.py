"""What tuning has found for one kind of engine, as a file: knobs to start with, laws, and what they are for.

`serve` and `launch` read it (`--tuned FILE`), so that the knobs an engine falls back to are the tuned ones.
"""

import platform
from pathlib import Path
from typing import Any

import msgspec

from engine.config import EngineConfig, ModelSource
from engine.protocol import Bounds

VERSION = 1
SUFFIX = ".tuned.json"
BUILT_IN = "pacer-26m"
LEAST_KV_SHARE = 0.95  # of the KV cache tuned for: what a GPU's memory holds differs a little from start to start


class EngineFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the time of a step depends on beside the batch, in the words of a profile's provenance. None: not known."""

    device: str | None = None
    model: str | None = None
    dtype: str | None = None
    attention: str | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None

    @classmethod
    def of(cls, provenance: dict[str, Any]) -> "EngineFacts":
        """Those that a step-time model's provenance tells; a model made of recordings tells few or none.

        Raises ValueError naming a fact of a wrong type.
        """
        try:
            return msgspec.convert({name: provenance.get(name) for name in cls.__struct_fields__}, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"the step-time model's provenance: {error}: make it again with pacer profile") from error


class _Versioned(msgspec.Struct):
    version: int


class Tuned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Knobs and laws tuned for the promise `slo` (text of `envs.slo.Slo`) on the engine that `engine` describes.

    `policy` is the law to run and `laws` has the best of each kind by its name, both as `--policy` takes them.
    `max_requests` is the engine's --max-num-seqs. `schedule`, `tile_tokens`, `kv_tokens` (room in the KV cache) and
    `max_model_tokens` are those of the engine tuned for; "" or 0: not known, and not checked. `step_time` describes its
    step-time model (text of `envs.step_time.Description`), for laws that predict. `provenance` tells from what all this
    was found, and how good it is. Raises ValueError for knobs that no engine could take.
    """

    version: int = VERSION
    budget_tokens: int
    chunk_tokens: int
    max_requests: int
    policy: str
    laws: dict[str, str] = {}
    slo: str
    engine: EngineFacts = EngineFacts()
    schedule: str = ""
    tile_tokens: int = 0
    kv_tokens: int = 0
    max_model_tokens: int = 0
    provenance: dict[str, Any] = {}
    step_time: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_tokens <= self.budget_tokens:
            raise ValueError(
                f"chunk_tokens {self.chunk_tokens} and budget_tokens {self.budget_tokens}: both must be at least 1, "
                "and the chunk no larger than the budget"
            )
        if self.max_requests < 1:
            raise ValueError(f"max_requests is {self.max_requests}; it must be at least 1")

    def check(self, running: EngineFacts, config: EngineConfig) -> None:
        """Whether an engine that is asked for, or loaded, is the one: ValueError naming all that is known and differs.

        `config` may leave KV blocks open. A shorter longest request, or more KV cache, only makes the promise easier.
        """
        pairs = [(name, getattr(self.engine, name), getattr(running, name)) for name in running.__struct_fields__]
        pairs.append(("schedule", self.schedule or None, config.schedule))
        differ = [f"{name} {a!r}, not {b!r}" for name, a, b in pairs if None not in (a, b) and a != b]
        if 0 < self.max_model_tokens < config.max_model_tokens:
            differ.append(f"max_model_tokens {self.max_model_tokens}, not {config.max_model_tokens}")
        self._refuse(differ + self._other_sizes(config.bounds))

    def check_bounds(self, bounds: Bounds) -> None:
        """Whether an engine that runs with these `bounds` can be the one: ValueError naming what differs."""
        low, high = bounds.min_budget_tokens, bounds.max_budget_tokens
        for name in ("budget_tokens", "chunk_tokens"):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"the tuned {name} {getattr(self, name)} is outside the running engine's {low}..{high}: start it "
                    "with other --min-budget or --max-num-batched-tokens, or tune for its bounds"
                )
        if self.max_requests != bounds.max_requests:
            raise ValueError(
                f"tuned for max_requests {self.max_requests}, but the running engine has {bounds.max_requests}: start "
                "it with the same --tuned file, or control it by --policy and --slo"
            )
        self._refuse(self._other_sizes(bounds))

    def _other_sizes(self, bounds: Bounds) -> list[str]:
        differ = []
        if self.tile_tokens not in (0, bounds.tile_tokens):
            differ.append(f"tile_tokens {self.tile_tokens}, not {bounds.tile_tokens}")
        if 0 < bounds.kv_tokens < LEAST_KV_SHARE * self.kv_tokens:
            differ.append(f"kv_tokens {self.kv_tokens}, not {bounds.kv_tokens}")
        return differ

    def _refuse(self, differ: list[str]) -> None:
        if differ:
            raise ValueError(
                f"the tuned knobs are for {'; '.join(differ)}: start the engine they were tuned for, or tune for this "
                "one with pacer profile and pacer tune"
            )

    def save(self, path: Path) -> None:
        """Write JSON, all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")
        partial.rename(path)

    @classmethod
    def load(cls, path: Path) -> "Tuned":
        """Read what `save` wrote. Raises ValueError naming the file, what is wrong with it, and the remedy."""
        try:
            data = path.read_bytes()
            version = msgspec.json.decode(data, type=_Versioned).version
            if version != VERSION:
                raise ValueError(f"it is of version {version}, this Pacer reads {VERSION}: tune again")
            return msgspec.json.decode(data, type=cls)
        except OSError as error:
            raise ValueError(f"cannot read the tuned knobs: {error}: make the file with pacer tune") from error
        except (ValueError, msgspec.MsgspecError) as error:
            raise ValueError(f"{path} holds no tuned knobs: {error}") from error


def model_of(source: ModelSource) -> str:
    """The model's name among the facts: of its shape, of its folder, or the built-in one's."""
    return source.shape or (source.folder.resolve().name if source.folder else BUILT_IN)


def facts_of(
    source: ModelSource, config: EngineConfig, attention: str | None = None, gpu: str | None = None
) -> EngineFacts:
    """The facts of an engine as it was asked for: what only a running one knows are its backend and its GPU's name."""
    named = None if source.attention == "auto" else source.attention
    return EngineFacts(
        f"{platform.machine()} CPU, {source.threads} threads" if source.device == "cpu" else gpu,
        model_of(source),
        source.dtype,
        attention or named,
        config.tensor_parallel,
        config.pipeline_parallel,
    )
