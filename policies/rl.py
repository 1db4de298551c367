"""A law that was learned: a small network from what telemetry says to knobs. `policies.train` makes it."""

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.compiled import compiled
from engine.protocol import Telemetry
from envs.codec import CODEC_VERSION, FEATURES, N_ACTIONS, Codec, Form
from envs.features import Float32Array, Promise
from envs.slo import Slo
from envs.watch import Watch, knobs, observe
from policies.policy import Decision

if TYPE_CHECKING:
    from envs.step_time import StepTimeModel

FOLDER = Path(__file__).parent / "trained"
DEFAULT = "limit"
REMEDY = "train it again with pacer train, or take another"

Layer = tuple[Float32Array, Float32Array]
"""Weights [inputs, outputs] and biases [outputs]."""


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands beside the weights, as JSON: what they are for, where they come from, and how good they are.

    `stages`: of the longest pipeline that it was trained in. `sha256` is the digest of the .npz file and of all above
    it here. `provenance` holds digests of the step-time profile and of the traces, the seeds and the versions;
    `scores` each law's figure on the validation workloads.
    """

    codec_version: int
    features: tuple[str, ...]
    form: Form
    stages: int
    sha256: str
    steps: int
    provenance: dict[str, Any] = {}
    scores: dict[str, float] = {}

    def digest(self, weights: bytes) -> str:
        """Of what decides, `weights` being the .npz file."""
        decides = (self.codec_version, self.features, self.form, self.stages)
        return hashlib.sha256(weights + msgspec.json.encode(decides)).hexdigest()


class _Versioned(msgspec.Struct):
    codec_version: int


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A network with tanh between its layers (`name`.npz holds w0, b0, w1, ...), and its card (`name`.json)."""

    name: str
    layers: tuple[Layer, ...]
    card: Card

    def act(self, observations: Float32Array) -> Float32Array:
        """Actions [n, 2], not yet cut to -1 to 1, of observations [n, features]."""
        hidden = self.scratch()
        return np.array([forward(self.layers, row, hidden) for row in observations], np.float32)

    def scratch(self) -> Float32Array:
        """Room for `forward`: float32 [2, widest layer]."""
        return np.zeros((2, max(len(biases) for _, biases in self.layers)), np.float32)

    @classmethod
    def load(cls, name: str = DEFAULT) -> "Trained":
        """A law that is shipped, by its name, or one's own: a .npz file. Raises ValueError with the remedy."""
        path = Path(name) if name.endswith(".npz") else FOLDER / f"{name}.npz"
        if not path.exists():
            shipped = ", ".join(sorted(own.stem for own in FOLDER.glob("*.npz")))
            raise ValueError(f"there is no trained law {name!r}: choose from {shipped}, or name a .npz file")
        try:
            layers, card = _opened(path.read_bytes(), path.with_suffix(".json").read_bytes())
        except (OSError, LookupError, ValueError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} and its .json hold no law for this Pacer ({error}): {REMEDY}") from error
        return cls(path.stem, layers, card)

    @classmethod
    def save(cls, path: Path, layers: tuple[Layer, ...], card: Card) -> "Trained":
        """Write both files, the card with the digest of the weights, and read them back. `path` ends in .npz."""
        arrays: dict[str, Any] = {}
        for i, (weights, biases) in enumerate(layers):
            arrays |= {f"w{i}": weights, f"b{i}": biases}
        np.savez(file := io.BytesIO(), **arrays)
        card = msgspec.structs.replace(card, sha256=card.digest(file.getvalue()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, file.getvalue())
        write_whole(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n")
        return cls.load(str(path))


def write_whole(path: Path, data: bytes) -> None:
    """All of it or, where that is cut short, nothing: what was there stays."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _opened(weights: bytes, told: bytes) -> tuple[tuple[Layer, ...], Card]:
    """The layers and the card of the two files. Raises ValueError, or what their formats raise."""
    version = msgspec.json.decode(told, type=_Versioned).codec_version
    if version != CODEC_VERSION:
        raise ValueError(f"trained under codec version {version}, this is {CODEC_VERSION}")
    card = msgspec.json.decode(told, type=Card)
    if card.features != FEATURES:
        raise ValueError("trained on other features, or in another order")
    layers = _layers(weights)
    if card.sha256 != card.digest(weights):
        raise ValueError("the weights are not those that the .json is about, or it was changed")
    return layers, card


def _layers(data: bytes) -> tuple[Layer, ...]:
    """Raises ValueError if the layers do not lead from an observation to an action."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        pairs = ((arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(len(arrays.files) // 2))
        # Compiled code is of one memory layout.
        layers = tuple((np.ascontiguousarray(weights), np.ascontiguousarray(biases)) for weights, biases in pairs)
    shapes = [weights.shape for weights, _ in layers]
    inputs = [len(FEATURES), *(shape[-1] for shape in shapes)]
    expected = list(zip(inputs, [*inputs[1:-1], N_ACTIONS], strict=False))
    fits = shapes == expected and all(biases.shape == weights.shape[1:] for weights, biases in layers)
    if not layers or not fits:
        raise ValueError(f"layers of shapes {shapes} do not lead from {len(FEATURES)} features to {N_ACTIONS} actions")
    if not all(a.dtype == np.float32 and np.isfinite(a).all() for layer in layers for a in layer):
        raise ValueError("weights are not finite float32 numbers")
    return layers


class Rl:
    """Knobs from a network, in one of the two forms of `envs.codec`, trained by PPO (Schulman et al., 2017, arXiv
    1707.06347) in the simulated server to earn what `envs.reward` pays.

    It observes what `envs.codec` makes of telemetry, against the promise and the machine's own step time. The network
    is fixed: nothing is learned while it drives.
    """

    FILES: ClassVar = {"name": Trained.load}

    def __init__(self, first: Telemetry, slo: Slo, step_time: "StepTimeModel", name: Trained) -> None:
        self._layers, self._hidden = name.layers, name.scratch()
        self._codec = Codec(slo, step_time, name.card.form)
        self._name, self._stages = name.name, name.card.stages

    @staticmethod
    def check(slo: Slo) -> None:
        """Raises ValueError for a promise that the features do not tell of."""
        Promise.of(slo)

    def decide(self, telemetry: Telemetry) -> Decision:
        """Raises ValueError in a pipeline of more stages than it was trained in: there it may break its promise."""
        codec = self._codec
        completions = codec.take(telemetry)
        if completions and (stages := len(telemetry.completed[-1].stages)) > self._stages:
            raise ValueError(
                f"the engine's pipeline has {stages} stages, and the law {self._name!r} was trained for {self._stages} "
                "at most: run predictive, or a law that was trained for more"
            )
        budget, chunk, first, second = _decide(
            *(codec.watch, codec.promise, completions, codec.under_way, codec.fills),
            *(self._layers, codec.observation, self._hidden),
        )
        codec.gave((budget, chunk))
        return Decision(budget, chunk, f"rl {self._name}: action {first:+.2f} {second:+.2f}")

    def track(self, sent: Decision) -> None:
        self._codec.track(sent.budget_tokens, sent.chunk_tokens)


@compiled
def forward(layers: tuple[Layer, ...], observation: Float32Array, hidden: Float32Array) -> tuple[float, float]:
    """The action of one observation. `hidden`, see `Trained.scratch`, is overwritten."""
    inputs, last = observation, len(layers) - 1
    for k, (weights, biases) in enumerate(layers):
        outputs = hidden[k % 2]
        for j in range(len(biases)):
            outputs[j] = biases[j]
        for i in range(len(weights)):
            for j in range(len(biases)):
                outputs[j] += inputs[i] * weights[i, j]
        if k < last:
            for j in range(len(biases)):
                outputs[j] = np.tanh(outputs[j])
        inputs = outputs
    return inputs[0], inputs[1]


@compiled
def _decide(
    watch: Watch,
    promise: Promise,
    completions: int,
    under_way: NDArray[np.int64],
    fills: bool,
    layers: tuple[Layer, ...],
    observation: Float32Array,
    hidden: Float32Array,
) -> tuple[int, int, float, float]:
    """Budget, chunk, and the action that they come from: all of a decision in one compiled call."""
    observe(watch, promise, completions, observation)
    first, second = forward(layers, observation, hidden)
    first, second = min(max(first, -1.0), 1.0), min(max(second, -1.0), 1.0)
    budget, chunk = knobs(watch, promise, under_way, fills, first, second)
    return budget, chunk, first, second
