import numpy as np
import pytest

from envs.presets import LEVELS, PRESETS
from envs.trace import make_workload


def drawn(name: str) -> tuple[np.ndarray, np.ndarray]:
    workload = make_workload("poisson:5", name, np.random.default_rng(3), 100_000)
    return workload.prompt_tokens, workload.output_tokens


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        # median, P90: Splitwise (ISCA 2024) for the medians, the released data for P90
        ("conversation", (1020, 2735), (129, 424)),
        ("code", (1469, 5188), (13, 55)),
        # Sarathi-Serve (OSDI 2024), table 2
        ("sharegpt", (1730, 5696), (415, 834)),
        # Vidur's data, 4,096 tokens in all
        ("arxiv", (2730, 3702), (167, 372)),
    ],
)
def test_a_preset_has_the_published_median_and_p90(name: str, prompt: tuple[int, int], output: tuple[int, int]) -> None:
    for tokens, published in zip(drawn(name), (prompt, output), strict=True):
        np.testing.assert_allclose(np.quantile(tokens, [0.5, 0.9]), published, rtol=0.03)


def test_presets_have_the_published_means_and_deviations() -> None:
    prompts, outputs = drawn("long-prompts")  # Mooncake (FAST 2025): mean 12,035 and 343
    assert prompts.mean() == pytest.approx(12_035, rel=0.05)
    assert outputs.mean() == pytest.approx(343, rel=0.05)
    assert drawn("sharegpt")[0].std() == pytest.approx(2088, rel=0.05)
    assert drawn("sharegpt")[1].std() == pytest.approx(265.6, rel=0.05)
    prompts, outputs = drawn("arxiv")
    assert prompts.std() == pytest.approx(944.7, rel=0.05)
    assert outputs.std() == pytest.approx(530.5, rel=0.08)


def test_prompt_and_output_go_together_as_in_the_source() -> None:
    prompts, outputs = drawn("arxiv")
    assert np.corrcoef(prompts, outputs)[0, 1] < -0.35  # a long answer leaves a short prompt
    assert (prompts + outputs).max() <= 4096
    prompts, outputs = drawn("conversation")
    middle = (prompts > 1020) & (prompts < 1130)
    assert np.median(outputs[middle]) > 3 * np.median(outputs[~middle])


@pytest.mark.parametrize("name", PRESETS)
def test_a_table_is_whole(name: str) -> None:
    preset = PRESETS[name]
    assert sum(band.share for band in preset.bands) == pytest.approx(1, abs=0.002)
    for band in preset.bands:
        for quantiles in (band.prompt_tokens, band.output_tokens):
            assert len(quantiles) == len(LEVELS)
            assert np.all(np.diff(quantiles) >= 0)
            assert quantiles[0] >= 1
        assert band.prompt_tokens[-1] < preset.max_total_tokens
    assert (preset.rate_per_s is None) == (preset.cv is None)
