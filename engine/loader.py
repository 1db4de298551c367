"""From a model source to a runner that computes with it."""

from collections.abc import Callable

import torch

from engine.config import EngineConfig, ModelSource
from engine.model_config import PACER_26M, read_model_config
from engine.model_runner import ModelRunner
from engine.weights import dummy_weights, load_safetensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_runner(source: ModelSource, config: EngineConfig, clock: Callable[[], int]) -> ModelRunner:
    """Raises ValueError naming what is wrong with the folder, the dtype or the sizes."""
    if source.dtype not in DTYPES:
        raise ValueError(f"dtype {source.dtype!r} is not one of {', '.join(DTYPES)}")
    dtype = DTYPES[source.dtype]
    model = PACER_26M if source.folder is None else read_model_config(source.folder)
    if source.folder is None or source.load_format == "dummy":
        weights = dummy_weights(model, dtype, config.seed)
    else:
        weights = load_safetensors(source.folder, model, dtype)
    return ModelRunner(model, weights, config, threads=source.threads, clock=clock)
