"""The share of tokens that a promise lets be late, kept as an account."""

SAVED = 0.4  # of what the promise permits: then nearly every request keeps it for its own tokens, not their sum alone
MOST = 10.0  # late batches of mean size that can be saved up, or owed
MEMORY = 0.998  # an iteration's weight in the mean batch


class LateAccount:
    """What may be late: each token pays in its share of what a quantile spares, each late one takes out one.

    It never holds more than `MOST` mean batches, so that what was saved for long cannot be spent at once, nor owes
    more, so that a bad hour is not paid for all day.
    """

    def __init__(self, quantile: float) -> None:
        self._spared = (1.0 - quantile) * (1.0 - SAVED)
        self.mean_tokens = 1.0  # in a batch with any
        self._balance = 0.0  # in tokens

    def book(self, tokens: int, late: int) -> None:
        self.mean_tokens = max(MEMORY * self.mean_tokens + (1.0 - MEMORY) * tokens, 1.0)
        if self.mean_tokens < tokens and self._balance == 0.0:
            self.mean_tokens = float(tokens)  # the first batches
        most = MOST * self.mean_tokens
        self._balance = min(max(self._balance + self._spared * tokens - late, -most), most)

    @property
    def tokens(self) -> float:
        """That may be late; below 0 if too many were."""
        return self._balance

    @property
    def debt(self) -> float:
        """From 0, if no more than may be were late, to 1, if as much is owed as can be."""
        return max(-self._balance / (MOST * self.mean_tokens), 0.0)
