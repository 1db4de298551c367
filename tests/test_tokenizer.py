"""Loading, incremental detokenisation and stop strings, on real tokenizers built in the test or in the package."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.tokenizer import MAX_HELD_TOKENS, Detokenizer, OutputText, StopStrings, load_tokenizer

BYTES = load_tokenizer(None)
LANGUAGES = "naïve café 中文字符 日本語テキスト 😀👩‍👩‍👧 Ελληνικά привет अनुच्छेद ไทย \n\t end"


def merged_tokenizer() -> Tokenizer:
    """Byte-level BPE whose merges run across character borders."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"]
    )
    tokenizer.train_from_iterator([LANGUAGES] * 20, trainer)
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words with a leading-space mark, bytes for what is in no word."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Paris", "▁is", "▁", "a"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


MERGED = merged_tokenizer()
FALLBACK = fallback_tokenizer()
FALLBACK_IDS = FALLBACK.get_vocab()


def stream(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    """The pieces, one for each token, and the flush."""
    detokenizer = Detokenizer(tokenizer, prompt_ids or [])
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def test_the_built_in_tokenizer_has_one_id_for_each_byte_and_four_special_tokens() -> None:
    every_byte = bytes(range(256)).decode("latin-1")
    assert len(BYTES) == 260
    assert BYTES.backend_tokenizer.encode(every_byte).ids == list(every_byte.encode())
    assert BYTES.convert_tokens_to_ids(["<s>", "</s>", "<|user|>", "<|assistant|>"]) == [256, 257, 258, 259]
    assert BYTES.eos_token_id == 257
    assert BYTES.decode(list(LANGUAGES.encode())) == LANGUAGES


def test_the_built_in_chat_template_marks_the_turns_and_asks_for_the_assistants() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
    ]
    ids = BYTES.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [256, 258, ord("S"), 258, ord("U"), 259, ord("A"), 257, 258, ord("V"), 259]


def test_a_saved_tokenizer_loads_from_its_folder_without_its_truncation(tmp_path: Path) -> None:
    saved = merged_tokenizer()
    saved.enable_truncation(4)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=saved, eos_token="</s>")  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend_tokenizer.encode(LANGUAGES).ids == MERGED.encode(LANGUAGES).ids
    assert loaded.eos_token_id == MERGED.token_to_id("</s>")


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [BYTES.backend_tokenizer, MERGED], ids=["bytes", "merged"])
def test_streamed_text_equals_the_whole_text_and_no_piece_breaks_a_character(tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, tokenizer.encode(LANGUAGES).ids)
    assert "".join(pieces) == LANGUAGES
    assert "\ufffd" not in "".join(pieces[:-1])
    assert sum(map(bool, pieces)) > len(pieces) / 4  # it does stream


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x98, 0x80, 257]))))
def test_any_bytes_stream_to_the_text_that_utf8_decoding_with_replacement_gives(ids: list[int]) -> None:
    expected = bytes(token_id for token_id in ids if token_id < 256).decode("utf-8", errors="replace")
    assert "".join(stream(BYTES.backend_tokenizer, ids)) == expected


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 399)))
def test_any_tokens_of_a_merged_vocabulary_stream_to_their_whole_decoding(ids: list[int]) -> None:
    known = [token_id for token_id in ids if token_id < MERGED.get_vocab_size()]
    assert "".join(stream(MERGED, known)) == MERGED.decode(known)


def test_invalid_bytes_never_stall_the_output() -> None:
    detokenizer = Detokenizer(BYTES.backend_tokenizer)
    given_out = 0
    for count in range(1, 1001):
        given_out += len(detokenizer.push(0xFF))
        assert count - given_out < MAX_HELD_TOKENS
    assert given_out + len(detokenizer.flush()) == 1000


def test_a_character_that_follows_a_run_of_invalid_bytes_is_whole() -> None:
    ids = [0xFF] * (MAX_HELD_TOKENS - 1) + list("中".encode()) + [ord("!")]
    assert "".join(stream(BYTES.backend_tokenizer, ids)) == "\ufffd" * (MAX_HELD_TOKENS - 1) + "中!"


def test_special_tokens_leave_no_text_and_do_not_stall() -> None:
    ids = [256, *b"ab", *[257] * 40, *b"cd"]
    assert "".join(stream(BYTES.backend_tokenizer, ids)) == "abcd"


def test_the_first_word_keeps_its_space_when_a_prompt_stands_before_it() -> None:
    paris, space_is = FALLBACK_IDS["▁Paris"], FALLBACK_IDS["▁is"]
    assert "".join(stream(FALLBACK, [paris, space_is])) == "Paris is"
    assert "".join(stream(FALLBACK, [paris], prompt_ids=[space_is])) == " Paris"


def test_byte_fallback_streams_characters_and_survives_a_run_that_turns_invalid() -> None:
    def ids(data: bytes) -> list[int]:
        return [FALLBACK_IDS[f"<0x{byte:02X}>"] for byte in data]

    letter = FALLBACK_IDS["a"]
    assert "".join(stream(FALLBACK, [letter, *ids("é中😀".encode()), letter])) == "aé中😀a"
    broken = "".join(stream(FALLBACK, [letter, *ids("é".encode()), *ids(b"\xff"), letter]))
    assert broken.startswith("aé")
    assert broken.endswith("a")


def test_a_prompt_that_ends_within_a_character_gives_none_of_its_own_text() -> None:
    prompt = [*b"ab", 0xE4]
    assert "".join(stream(BYTES.backend_tokenizer, list(b"cd"), prompt_ids=prompt)) == "cd"


def cut(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    strings = StopStrings(stops)
    given_out = [strings.push(piece) for piece in pieces]
    return [*given_out, strings.flush()], strings.stopped


def test_text_is_cut_before_a_stop_string_that_lies_across_pieces() -> None:
    assert cut(["STOP"], ["one S", "TO", "P two", "three"]) == (["one ", "", "", "", ""], True)


def test_text_that_only_began_like_a_stop_string_comes_out_once_decided() -> None:
    assert cut(["STOP"], ["a S", "TO", "RE"]) == (["a ", "", "STORE", ""], False)
    assert cut(["STOP"], ["a ST"]) == (["a ", "ST"], False)


def test_the_earliest_of_several_stop_strings_cuts_and_the_longest_beginning_is_held() -> None:
    assert cut(["c", "bcd"], ["abcd"]) == (["a", ""], True)
    assert cut(["aab"], ["aa", "ab"]) == (["", "a", ""], True)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_cut_the_stream_where_they_first_complete_in_it(pieces: list[str], stops: list[str]) -> None:
    given_out, stopped = cut(stops, pieces)
    text, shown = "".join(pieces), "".join(given_out)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if stopped:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


def test_output_text_finds_a_stop_string_in_what_only_the_end_of_the_output_decides() -> None:
    text = OutputText(BYTES.backend_tokenizer, [], ["\ufffd"])
    assert [text.push(token_id) for token_id in (*b"ab", 0xE4)] == ["a", "b", ""]
    assert not text.stopped
    assert text.flush() == ""
    assert text.stopped
