"""The named shapes are those of the public models: their parameters are counted, one by one."""

import pytest

from engine.config import ModelSource
from engine.model_config import PACER_26M
from engine.shapes import SHAPES, parameter_count, shape, source_model

# As stated beside the published checkpoints, two of which hold the tied head a second time; the 11B is by hand, from
# the sizes on its card.
PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "yi-6b": 6_061_035_520,
    "yi-34b": 34_388_917_248,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "falcon-7b": 7_217_189_760 - 65024 * 4544,
    "falcon2-11b": 11_102_822_400,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 179_522_565_120 - 65024 * 14848,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_as_many_parameters_as_the_model_it_names(name: str) -> None:
    assert parameter_count(shape(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_takes_every_prompt_of_the_traces_and_ends_none(name: str) -> None:
    model = shape(name)
    assert model.max_position_embeddings == 131072
    assert model.sliding_windows == (None,) * model.num_hidden_layers
    assert model.eos_token_ids == ()


def test_a_source_names_a_shape_or_the_built_in_model() -> None:
    assert source_model(ModelSource()) is PACER_26M
    assert source_model(ModelSource(shape="yi-34b")) is SHAPES["yi-34b"]
    with pytest.raises(ValueError, match=r"shape 'gpt-2' is not known; use one of mistral-7b, yi-6b"):
        source_model(ModelSource(shape="gpt-2"))
