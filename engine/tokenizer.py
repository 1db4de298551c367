"""Text to token ids and back: loading, incremental detokenisation, stop strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>")
"""Special tokens of the built-in tokenizer: ids 256 to 259, after one id for each byte."""

BYTE_CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ '<|assistant|>' + message.content + '</s>' }}"
    "{% elif message.role in ('system', 'developer', 'user') %}{{ '<|user|>' + message.content }}"
    "{% else %}{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8, or not yet
CONTEXT_TOKENS = 6  # of the prompt: how the first output token reads can depend on what stands before it
MAX_HELD_TOKENS = 8
LONGEST_PARTIAL_CHARACTER = 3  # a UTF-8 character has 4 bytes at most, and a token one at least


def load_tokenizer(folder: Path | None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a Hugging Face folder, or without one the built-in byte-level tokenizer (260 ids).

    Truncation and padding that the folder asks for are switched off. Reads local files only. Raises ValueError if the
    folder holds no tokenizer that the `tokenizers` library can run.
    """
    if folder is None:
        return _byte_tokenizer()
    # Imported late: it takes seconds, and imports torch.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"no tokenizer in {folder}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder} has only a slow tokenizer ({type(tokenizer).__name__}): add its tokenizer.json")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _byte_tokenizer() -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    # The library writes a byte as itself if it is printable, else as the next character from 256 on.
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    spare = iter(range(256, 512))
    vocabulary = {chr(byte) if chr(byte) in alphabet else chr(next(spare)): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # type: ignore[no-untyped-call]
    tokenizer.chat_template = BYTE_CHAT_TEMPLATE
    return tokenizer


def number_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """For a model that is only a shape: token 17 reads "t17", words are divided by spaces, unknown ones are token 0."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    backend = Tokenizer(models.WordLevel({f"t{token_id}": token_id for token_id in range(vocab_size)}, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"
    return tokenizer


class Detokenizer:
    """The text of one request's output, token by token.

    The pieces and the final flush, joined, are the text that the output adds to the prompt's. Special tokens are left
    out. Bytes that are no UTF-8 come out as U+FFFD after a few tokens. (Vocabularies with byte fallback decode a whole
    run of bytes anew with each byte: where such a run turns out invalid, pieces already given keep their characters.)
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        context = list(prompt_ids[-CONTEXT_TOKENS:])
        if tokenizer.decode(context).endswith(REPLACEMENT):
            context = []  # ends within a character: the stream could not tell its text from the output's
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._held: list[int] = []
        self._max_held = MAX_HELD_TOKENS

    def push(self, token_id: int) -> str:
        """What the token makes certain; "" while a character is incomplete."""
        self._held.append(token_id)
        piece = self._step(token_id)
        if piece:
            self._held.clear()
            return piece
        return self._release() if len(self._held) >= self._max_held else ""

    def flush(self) -> str:
        """What is still held, at the end of the output."""
        held, self._held = self._held, []
        return self._tokenizer.decode(held)

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # the library has no narrower type
            if "prefix" not in str(error).lower():
                raise
            # Byte fallback has decoded earlier bytes anew, and the new text does not continue the old.
            self._held = [token_id]
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id)

    def _release(self) -> str:
        """Give out held bytes that no later byte can complete; the last few may be a character's beginning."""
        held, decode = self._held, self._tokenizer.decode
        whole = decode(held)
        for cut in range(len(held) - LONGEST_PARTIAL_CHARACTER, 0, -1):
            head = decode(held[:cut])
            if head + decode(held[cut:]) == whole:  # the cut goes through no character
                self._held = []
                self._stream = DecodeStream(skip_special_tokens=True)
                return head + "".join([self.push(token_id) for token_id in held[cut:]])
        self._max_held += MAX_HELD_TOKENS
        return ""


class StopStrings:
    """Cuts a text before the first stop string in it, and holds back what could be the start of one.

    `stopped` is True from the piece on that completes a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """What is certain to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        certain = min((_partial_start(text, stop) for stop in self._stops), default=len(text))
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What is still held, at the end of the output."""
        held, self._held = self._held, ""
        return held


def _partial_start(text: str, stop: str) -> int:
    """Where the longest end of `text` begins that `stop` starts with; the length of `text` if there is none."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)


class OutputText:
    """One request's output tokens to text, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string was found: nothing comes after it."""
        return self._stops.stopped

    def push(self, token_id: int) -> str:
        return self._stops.push(self._detokenizer.push(token_id))

    def flush(self) -> str:
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
