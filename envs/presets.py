"""Public workloads without a download: their lengths as short tables of quantiles, their rate and its variation.

A preset is a description, not a trace: each request is drawn on its own, so sessions, shared prefixes and the hours of
a day are not in it. Its quantiles are computed from the public data named beside it, and agree with the figures that
its paper prints, which are named too.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from envs.workload import FloatArray

LEVELS = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.96, 0.99, 0.995, 0.999, 1)


@dataclass(frozen=True, slots=True)
class Band:
    """The requests whose prompts fall into one range: their share of all, and the quantiles of their lengths.

    The quantiles are tokens at `LEVELS`. Within a band prompt and output are independent; between bands they are not.
    """

    share: float
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preset:
    """A workload's lengths, and how it arrives where that is known.

    An output that would lift prompt + output over `max_total_tokens` is cut there, as the source's own limit does.
    `rate_per_s` and `cv` (coefficient of variation of the gaps) are the recorded ones, or None for a set of lengths.
    """

    bands: tuple[Band, ...]
    max_total_tokens: int
    rate_per_s: float | None = None
    cv: float | None = None

    def sample(self, rng: Generator, n: int) -> FloatArray:
        """n pairs of whole token counts, shape [2, n]: prompts and outputs, each at least 1."""
        which, *levels = rng.random((3, n))
        ends = np.cumsum([band.share for band in self.bands])
        chosen = np.searchsorted(ends / ends[-1], which, side="right")
        pairs = np.empty((2, n))
        for index, band in enumerate(self.bands):
            rows = chosen == index
            for side, quantiles in enumerate((band.prompt_tokens, band.output_tokens)):
                # Between two quantiles on a logarithmic scale: token counts are skewed to the right.
                pairs[side, rows] = np.exp(np.interp(levels[side][rows], LEVELS, np.log(quantiles)))
        prompts, outputs = np.rint(pairs)
        return np.stack([prompts, np.clip(outputs, 1, self.max_total_tokens - prompts)])


# Azure LLM inference trace 2023, conversation service (Azure/AzurePublicDataset, CC-BY 4.0), 19,366 requests in
# 3,502 s. Patel et al., Splitwise, ISCA 2024: median prompt 1020, median output 129 tokens. P90 of the data: 2735, 424.
# Prompts about 1,000 tokens long are answered at length, shorter and longer ones briefly.
_CONVERSATION = Preset(
    bands=(
        Band(
            0.213,
            (2, 120, 181, 209, 375, 385, 388, 390, 390, 390, 390),
            (7, 42, 69, 100, 164, 211, 217, 258, 300, 1000, 1000),
        ),
        Band(
            0.190,
            (391, 394, 398, 404, 417, 439, 556, 730, 742, 754, 758),
            (10, 81, 89, 98, 112, 136, 153, 186, 200, 391, 739),
        ),
        Band(
            0.419,
            (761, 979, 1024, 1077, 1146, 1312, 1317, 1356, 1369, 1391, 1400),
            (26, 107, 375, 398, 421, 464, 558, 645, 715, 958, 1000),
        ),
        Band(
            0.078,
            (1402, 1510, 1724, 2062, 2418, 2584, 2667, 2724, 2735, 2739, 2740),
            (15, 49, 66, 88, 113, 144, 170, 396, 419, 531, 594),
        ),
        Band(
            0.100,
            (2743, 3306, 4075, 4083, 4092, 4142, 5022, 6189, 6586, 7671, 14050),
            (17, 35, 43, 58, 87, 132, 164, 257, 366, 672, 757),
        ),
    ),
    max_total_tokens=16_384,
    rate_per_s=5.53,
    cv=1.09,
)

# Azure LLM inference trace 2023, code service (as above), 8,819 requests in 3,436 s. Splitwise: median prompt 1500,
# median output 13 tokens. P90 of the data: 5188, 55. Completions arrive in bursts: the gaps' CV is 13.
_CODE = Preset(
    bands=(
        Band(
            1.0,
            (3, 147, 578, 1469, 2744, 5188, 7430, 7436, 7436, 7437, 7437),
            (6, 7, 9, 13, 24, 55, 105, 251, 359, 825, 1899),
        ),
    ),
    max_total_tokens=16_384,
    rate_per_s=2.57,
    cv=13.2,
)

# Mooncake conversation trace (kvcache-ai/Mooncake, FAST25-release, Apache-2.0), 12,031 requests in 3,537 s. Qin et al.,
# Mooncake, FAST 2025: mean prompt 12,035, mean output 343 tokens. Its clock ticks every 3 s, so that the CV of the
# recorded gaps (3.0) says nothing of the arrivals. Their number per tick varies as a Poisson number does: CV 1.
_LONG_PROMPTS = Preset(
    bands=(
        Band(
            1.0,
            (891, 964, 2306, 6909, 15367, 27367, 44613, 85400, 100810, 121301, 126195),
            (1, 24, 156, 350, 472, 597, 738, 1119, 1568, 2000, 2000),
        ),
    ),
    max_total_tokens=131_072,
    rate_per_s=3.40,
    cv=1.0,
)

# openchat_sharegpt4, requests of at most 8,192 tokens, Llama-2 tokenizer (microsoft/sarathi-serve, branch
# niyama_asplos2026), 30,731 pairs. Agrawal et al., Sarathi-Serve, OSDI 2024, table 2: median and P90 of the prompt 1730
# and 5696 (standard deviation 2088), of the output 415 and 834.
_SHAREGPT = Preset(
    bands=(
        Band(
            1.0,
            (1, 74, 580, 1730, 3734, 5696, 6747, 7434, 7622, 7854, 8141),
            (2, 84, 228, 415, 628, 834, 939, 998, 1009, 1021, 1024),
        ),
    ),
    max_total_tokens=8_192,
)

# arxiv_summarization at 4,096 tokens in all, Llama-2 tokenizer (microsoft/vidur, MIT), 28,257 pairs: median and P90 of
# the prompt 2730 and 3702, of the output 167 and 372. Sarathi-Serve, table 2, keeps prompts whole (median 7059, P90
# 12985; output 208 and 371); "scaled:2.6,1.2:arxiv" has those medians. Short prompts are those whose answer is long.
_ARXIV = Preset(
    bands=(
        Band(
            0.039,
            (1, 24, 71, 222, 420, 531, 570, 593, 596, 599, 599),
            (10, 148, 1194, 2526, 3248, 3648, 3798, 3975, 4002, 4015, 4056),
        ),
        Band(
            0.061,
            (601, 692, 803, 967, 1112, 1189, 1224, 1242, 1245, 1250, 1250),
            (14, 74, 114, 175, 305, 2216, 2887, 3180, 3284, 3379, 3404),
        ),
        Band(
            0.600,
            (1251, 1616, 1988, 2456, 2862, 3102, 3190, 3236, 3244, 3249, 3250),
            (5, 76, 112, 163, 233, 331, 463, 858, 1182, 2299, 2806),
        ),
        Band(
            0.300,
            (3251, 3325, 3430, 3597, 3759, 3863, 3922, 3982, 4002, 4032, 4054),
            (12, 82, 116, 163, 225, 297, 366, 463, 511, 625, 827),
        ),
    ),
    max_total_tokens=4_096,
)

PRESETS = {
    "conversation": _CONVERSATION,
    "code": _CODE,
    "long-prompts": _LONG_PROMPTS,
    "sharegpt": _SHAREGPT,
    "arxiv": _ARXIV,
}
