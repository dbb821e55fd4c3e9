from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from surgeon.errors import TextError
from surgeon.text import Text, TextSpec, read_text, require_disjoint, require_low_overlap, shared_fraction
from surgeon.text.python_docs import topic_split


def reference_fraction(calibration: np.ndarray, evaluation: np.ndarray, span: int) -> float:
    """The definition, span by span."""
    known = {tuple(row[i : i + span]) for row in calibration.tolist() for i in range(len(row) - span + 1)}
    n_shared = 0
    for row in evaluation.tolist():
        shared: set[int] = set()
        for i in range(len(row) - span + 1):
            if tuple(row[i : i + span]) in known:
                shared.update(range(i, i + span))
        n_shared += len(shared)
    return n_shared / evaluation.size


def words(names: list[str]) -> np.ndarray:
    text = " ".join(topics[name] for name in names).split()
    vocabulary = {word: i for i, word in enumerate(sorted({w for t in topics.values() for w in t.split()}))}
    return np.array([[vocabulary[word] for word in text]])


class TestSharedFraction:
    @pytest.mark.parametrize("span", [1, 2, 3, 5])
    @pytest.mark.parametrize("seed", range(5))
    def test_agrees_with_the_definition(self, span: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        calibration = generator.integers(3, size=(4, 9))
        evaluation = generator.integers(3, size=(5, 14))
        assert shared_fraction(calibration, evaluation, span) == reference_fraction(calibration, evaluation, span)

    def test_one_repeated_span(self) -> None:
        generator = np.random.default_rng(0)
        calibration = generator.integers(50_000, size=(16, 128))
        evaluation = generator.integers(50_000, size=(10, 100))
        assert shared_fraction(calibration, evaluation) == 0
        evaluation[3, 60:95] = calibration[7, 20:55]
        assert shared_fraction(calibration, evaluation) == 35 / 1000
        evaluation[5, :31] = calibration[2, :31]
        assert shared_fraction(calibration, evaluation) == 35 / 1000

    def test_spans_do_not_cross_rows(self) -> None:
        tokens = np.arange(128)
        assert shared_fraction(tokens.reshape(2, 64), tokens[48:80].reshape(1, 32)) == 0
        assert shared_fraction(tokens.reshape(1, 128), tokens[48:80].reshape(1, 32)) == 1

    def test_order_of_tokens_counts(self) -> None:
        calibration = np.arange(40)[None]
        assert shared_fraction(calibration, calibration[:, ::-1]) == 0

    def test_short_windows_are_compared_whole(self) -> None:
        tokens = np.arange(64)[None]
        evaluation = np.stack([tokens[0, 5:13], np.arange(8) + 500])
        assert shared_fraction(tokens, evaluation) == 0.5

    def test_a_million_tokens(self) -> None:
        generator = np.random.default_rng(0)
        calibration = generator.integers(50_000, size=(500, 2048))
        evaluation = generator.integers(50_000, size=(500, 2048))
        evaluation[:50] = calibration[:50]
        assert shared_fraction(calibration, evaluation) == 0.1

    def test_python_docs_splits_share_little(self) -> None:
        parts = topic_split(topics)
        fraction = shared_fraction(words(parts["calibration"]), words(parts["held-out"]))
        assert fraction < 0.01
        # Topics divided one by one, without regard to what they share: the check must see the difference.
        one_by_one = shared_fraction(words(sorted(topics)[::2]), words(sorted(topics)[1::2]))
        assert one_by_one > 0.1


class TestRequireLowOverlap:
    def test_limit(self) -> None:
        generator = np.random.default_rng(0)
        calibration = generator.integers(50_000, size=(8, 100))
        evaluation = generator.integers(50_000, size=(8, 100))
        evaluation[0] = calibration[5]
        with pytest.raises(TextError, match=r"12\.5% of the evaluation tokens .* allowed is 10\.0%"):
            require_low_overlap(calibration, evaluation)
        assert require_low_overlap(calibration, evaluation, limit=0.125) == 0.125


class TestRequireDisjoint:
    @staticmethod
    def file_text(path: Path | str, split: str, text: str = "") -> Text:
        return Text(text or f"{path} {split}", str(path), split, "local")

    def test_splits_of_python_docs(self) -> None:
        calibration, held_out = (read_text(TextSpec("python-docs", split)) for split in ("calibration", "held-out"))
        require_disjoint(calibration, held_out)
        with pytest.raises(TextError, match="use the same split"):
            require_disjoint(calibration, calibration)

    def test_same_split_of_another_revision(self) -> None:
        first, second = (Text(revision, "wikitext", "train", revision) for revision in ("one", "two"))
        with pytest.raises(TextError, match="the same split: calibration on 'wikitext', split 'train'"):
            require_disjoint(first, second)
        require_disjoint(first, Text("three", "wikitext", "test", "one"))

    @pytest.mark.parametrize(
        ("calibration", "evaluation", "overlaps"),
        [
            ("first:80%", "last:20%", False),
            ("first:80%", "last:20.5%", True),
            ("first:50%", "first:10%", True),
            ("all", "last:1%", True),
            ("all", "all", True),
            ("last:30%", "first:70%", False),
        ],
    )
    def test_ranges_of_one_file(self, tmp_path: Path, calibration: str, evaluation: str, overlaps: bool) -> None:
        texts = self.file_text(tmp_path / "a.txt", calibration), self.file_text(tmp_path / "a.txt", evaluation, "other")
        if not overlaps:
            require_disjoint(*texts)
            return
        with pytest.raises(TextError, match=r"Overlapping ranges: .* such as 'first:80%' and 'last:20%'"):
            require_disjoint(*texts)

    def test_one_file_by_two_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(TextError, match="Overlapping ranges"):
            require_disjoint(self.file_text("a.txt", "all"), self.file_text(tmp_path / "a.txt", "last:10%"))

    def test_file_in_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(TextError, match="Overlapping ranges"):
            require_disjoint(self.file_text(tmp_path, "all"), self.file_text(tmp_path / "a.txt", "all"))
        require_disjoint(self.file_text(tmp_path / "b.txt", "all"), self.file_text(tmp_path / "a.txt", "all"))

    def test_same_characters_under_two_names(self) -> None:
        with pytest.raises(TextError, match="Both texts hold the same characters"):
            require_disjoint(self.file_text("a.txt", "all", "same"), self.file_text("b.txt", "all", "same"))
