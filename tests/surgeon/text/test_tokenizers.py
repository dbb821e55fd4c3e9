import json
import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from surgeon.errors import TextError
from surgeon.text import Text, tokenize, tokenizer_digest

WORDS = ["<unk>", "<s>", "</s>", "to", "be", "or", "not"]


def word_tokenizer(words: list[str] = WORDS, *, starts: bool = False, eos: str = "</s>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if starts:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token=eos, pad_token=eos, model_max_length=4
    )


def text(characters: str) -> Text:
    return Text(characters, "a.txt", "all", "local")


class TestTokenize:
    def test_whole_text_at_once(self) -> None:
        tokens = tokenize(text("to be or not to be " * 100), word_tokenizer())
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, [3, 4, 5, 6, 3, 4] * 100)

    def test_special_tokens_as_the_tokenizer_adds_them(self) -> None:
        np.testing.assert_array_equal(tokenize(text("not be"), word_tokenizer(starts=True)), [1, 6, 4])

    def test_no_warning_about_length(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        with caplog.at_level(logging.DEBUG):
            tokenize(text("to be " * 100), word_tokenizer())
        assert not caplog.records
        assert capfd.readouterr().err == ""

    def test_truncation_left_behind_by_another_call(self) -> None:
        tokenizer = word_tokenizer()
        tokenizer("to be or not", truncation=True, max_length=2)
        assert tokenize(text("to be or not"), tokenizer).size == 4

    def test_no_token(self) -> None:
        with pytest.raises(TextError, match=r"makes no token of text 'a\.txt'"):
            tokenize(text("  "), word_tokenizer())


class TestTokenizerDigest:
    def test_same_for_equal_tokenizers(self) -> None:
        assert tokenizer_digest(word_tokenizer()) == tokenizer_digest(word_tokenizer())
        assert len(tokenizer_digest(word_tokenizer())) == 64

    def test_does_not_depend_on_earlier_calls(self) -> None:
        tokenizer = word_tokenizer()
        before = tokenizer_digest(tokenizer)
        tokenizer(["to be or not", "to"], truncation=True, max_length=2, padding=True)
        assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
        assert tokenizer_digest(tokenizer) == before

    @pytest.mark.parametrize(
        "other",
        [
            word_tokenizer([*WORDS, "question"]),
            word_tokenizer([*WORDS[:3], "be", "to", "or", "not"]),
            word_tokenizer(starts=True),
            word_tokenizer(eos="<s>"),
        ],
        ids=["longer", "permuted", "starts", "special"],
    )
    def test_differs(self, other: PreTrainedTokenizerFast) -> None:
        assert tokenizer_digest(other) != tokenizer_digest(word_tokenizer())

    def test_without_a_backend(self) -> None:
        class Slow:
            special_tokens_map = {"eos_token": "</s>"}  # noqa: RUF012

            def __init__(self, words: list[str]) -> None:
                self.words = words

            def get_vocab(self) -> dict[str, int]:
                return {word: i for i, word in enumerate(self.words)}

        digests = [tokenizer_digest(Slow(words)) for words in (WORDS, WORDS, WORDS[::-1])]  # type: ignore[arg-type]
        assert digests[0] == digests[1] != digests[2]

    def test_survives_saving(self, tmp_path: object) -> None:
        tokenizer = word_tokenizer()
        tokenizer.save_pretrained(str(tmp_path))
        loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
        assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
