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

    `sha256` is the digest of the .npz file. `provenance` holds digests of the step-time profile and of the traces, the
    seeds and the versions; `scores` each law's figure on the validation workloads.
    """

    codec_version: int
    features: tuple[str, ...]
    form: Form
    sha256: str
    steps: int
    provenance: dict[str, Any] = {}
    scores: dict[str, float] = {}


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
            card = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Card)
            layers = _layers(weights := path.read_bytes())
        except (OSError, LookupError, ValueError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} and its .json hold no trained law ({error}): {REMEDY}") from error
        if card.codec_version != CODEC_VERSION or card.features != FEATURES:
            raise ValueError(
                f"{path} was trained under codec version {card.codec_version}, this is {CODEC_VERSION}: {REMEDY}"
            )
        if card.sha256 != hashlib.sha256(weights).hexdigest():
            raise ValueError(f"{path} is not the file that its .json is about: {REMEDY}")
        return cls(path.stem, layers, card)

    @classmethod
    def save(cls, path: Path, layers: tuple[Layer, ...], card: Card) -> "Trained":
        """Write both files, the card with the digest of the weights, and read them back. `path` ends in .npz."""
        arrays: dict[str, Any] = {}
        for i, (weights, biases) in enumerate(layers):
            arrays |= {f"w{i}": weights, f"b{i}": biases}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        card = msgspec.structs.replace(card, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        path.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=1) + b"\n")
        return cls.load(str(path))


def _layers(data: bytes) -> tuple[Layer, ...]:
    """Raises ValueError if the layers do not lead from an observation to an action."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        layers = tuple((arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(len(arrays.files) // 2))
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
        """Raises ValueError for a promise without a bound on TBT."""
        self._layers, self._hidden = name.layers, name.scratch()
        self._codec = Codec(slo, step_time, name.card.form)
        self._reason = f"rl {name.name}: action"

    def decide(self, telemetry: Telemetry) -> Decision:
        codec = self._codec
        completions = codec.take(telemetry)
        budget, chunk, first, second = _decide(
            *(codec.watch, codec.promise, completions, codec.under_way, codec.fills),
            *(self._layers, codec.observation, self._hidden),
        )
        codec.gave((budget, chunk))
        return Decision(budget, chunk, f"{self._reason} {first:+.2f} {second:+.2f}")

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
