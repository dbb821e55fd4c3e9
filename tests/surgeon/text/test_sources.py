import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from surgeon.errors import TextError
from surgeon.text import SourceKind, Text, TextSpec, check_spec, read_text, source_kind
from surgeon.text.python_docs import topic_families, topic_split
from surgeon.text.ranges import parse_range

ROWS = ["first row", "", "third row"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"text": row, "title": f"title {i}", "number": i} for i, row in enumerate(ROWS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class TestPythonDocs:
    def test_splits_are_disjoint_and_complete(self) -> None:
        parts = topic_split(topics)
        assert sorted(parts["calibration"] + parts["held-out"]) == sorted(topics)
        texts = [{topics[name] for name in parts[split]} for split in ("calibration", "held-out")]
        assert not texts[0] & texts[1]

    def test_about_a_quarter_is_held_out(self) -> None:
        sizes = {split: len(read_text(TextSpec("python-docs", split)).text) for split in ("calibration", "held-out")}
        assert 0.2 < sizes["held-out"] / sum(sizes.values()) <= 0.26

    def test_reading_twice_is_the_same(self) -> None:
        first, second = (read_text(TextSpec("python-docs", "held-out")) for _ in range(2))
        assert first == second
        assert first.digest == hashlib.sha256(first.text.encode()).hexdigest()
        assert first.revision.startswith("python-3.")

    def test_topics_that_share_a_paragraph_stay_together(self) -> None:
        shared = "a paragraph of documentation that is repeated in another topic"
        texts = {
            "a": f"heading\n\n{shared}",
            "b": f"text of b that is long enough to be compared\n\n  {shared.replace('that', 'that' + chr(10))}",
            "c": "text of b that is long enough to be compared",
            "d": "a text of its own that no other topic has in it",
            "e": "short",
            "f": "short",
        }
        assert topic_families(texts) == [["a", "b", "c"], ["d"], ["e", "f"]]

    def test_families_of_real_topics(self) -> None:
        families = topic_families(topics)
        together = next(names for names in families if "compound" in names)
        assert {"if", "for", "while", "with"} <= set(together)
        assert len(families) > 30

    @pytest.mark.parametrize(
        ("split", "message"),
        [
            (None, "split None of 'python-docs': allowed are calibration, held-out"),
            ("heldout", "Did you mean 'held-out'"),
            ("first:80%", "allowed are calibration, held-out"),
        ],
    )
    def test_unknown_split(self, split: str | None, message: str) -> None:
        with pytest.raises(TextError, match=message):
            read_text(TextSpec("python-docs", split))


class TestFiles:
    def test_plain_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\nline")
        text = read_text(TextSpec(str(path)))
        assert text.text == "café\nline"
        assert (text.source, text.split, text.revision) == (str(path), "all", "local")

    def test_directory_in_the_order_of_paths(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name in ("z.txt", "sub/b.md", "a.txt", "ignored.py"):
            (tmp_path / name).write_text(name)
        assert read_text(TextSpec(str(tmp_path))).text == "a.txt\n\nsub/b.md\n\nz.txt"

    def test_directory_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(TextError, match=r"has no \.md or \.txt file"):
            read_text(TextSpec(str(tmp_path)))

    @pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
    def test_tables(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"rows.{suffix}"
        data = datasets.Dataset.from_dict({"text": ["one", "two"], "title": ["t one", "t two"]})
        writer = {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix]
        writer(str(path))
        assert read_text(TextSpec(str(path))).text == "one\n\ntwo"
        assert read_text(TextSpec(str(path), column="title")).text == "t one\n\nt two"

    def test_table_keeps_empty_rows_and_drops_missing_ones(self, tmp_path: Path, table: Path) -> None:
        assert read_text(TextSpec(str(table))).text == "first row\n\n\n\nthird row"
        table.write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
        assert read_text(TextSpec(str(table))).text == "a\n\nb"

    def test_progress_bars_are_put_back(self, table: Path, capfd: pytest.CaptureFixture[str]) -> None:
        before = datasets.are_progress_bars_disabled()
        read_text(TextSpec(str(table)))
        assert datasets.are_progress_bars_disabled() == before
        assert capfd.readouterr() == ("", "")

    def test_unknown_column(self, table: Path) -> None:
        with pytest.raises(TextError, match=r"no column 'titel'; its columns are text, title, number\. Did you"):
            read_text(TextSpec(str(table), column="titel"))

    def test_column_without_text(self, table: Path) -> None:
        with pytest.raises(TextError, match=r"'number' of .* holds int64 values; it must hold text"):
            read_text(TextSpec(str(table), column="number"))

    def test_missing_file(self, tmp_path: Path) -> None:
        (tmp_path / "train.txt").write_text("x")
        with pytest.raises(TextError, match=r"There is no text file .*trian\.txt.* Did you mean 'train\.txt'"):
            read_text(TextSpec(str(tmp_path / "trian.txt")))

    @pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
    def test_damaged_table(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"bad.{suffix}"
        path.write_bytes(b"{not a table" * 10)
        with pytest.raises(TextError, match=rf"bad\.{suffix} cannot be read as {suffix}"):
            read_text(TextSpec(str(path)))

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(TextError, match=r"is not UTF-8 text \(byte 3\)"):
            read_text(TextSpec(str(tmp_path / "a.txt")))

    @pytest.mark.parametrize("content", ["", " \n\n "])
    def test_empty(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.txt").write_text(content)
        with pytest.raises(TextError, match="is empty"):
            read_text(TextSpec(str(tmp_path / "a.txt")))


class TestRanges:
    @pytest.mark.parametrize("share", ["0.1", "33.3", "50", "66.7", "99.9"])
    @pytest.mark.parametrize("n_characters", [1, 7, 1000])
    def test_first_and_last_make_up_the_whole(self, tmp_path: Path, share: str, n_characters: int) -> None:
        text = "".join(chr(0x4E00 + i) for i in range(n_characters))
        rest = f"{100 - float(share):.1f}"
        first, last = parse_range(f"first:{share}%"), parse_range(f"last:{rest}%")
        assert first.cut(text) + last.cut(text) == text
        assert not first.overlaps(last)

    def test_range_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("0123456789")
        text = read_text(TextSpec(str(tmp_path / "a.txt"), "last:20%"))
        assert (text.text, text.split) == ("89", "last:20%")

    @pytest.mark.parametrize("split", ["train", "first:80", "middle:10%", "first:-1%"])
    def test_not_a_range(self, tmp_path: Path, split: str) -> None:
        with pytest.raises(TextError, match=r"allowed are ranges such as 'first:80%'.*\(null\)"):
            parse_range(split)

    @pytest.mark.parametrize("split", ["first:0%", "last:100%", "last:120%"])
    def test_share_out_of_range(self, split: str) -> None:
        with pytest.raises(TextError, match="must lie between 0% and 100%"):
            parse_range(split)


class TestKinds:
    @pytest.mark.parametrize(
        ("source", "kind"),
        [
            ("python-docs", SourceKind.PYTHON_DOCS),
            ("missing/file.TXT", SourceKind.PLAIN_FILE),
            ("rows.parquet", SourceKind.TABLE),
            ("wikitext", SourceKind.HUB),
            ("allenai/c4:en", SourceKind.HUB),
            ("Salesforce/wikitext:wikitext-2-raw-v1", SourceKind.HUB),
        ],
    )
    def test_kind(self, source: str, kind: SourceKind) -> None:
        assert source_kind(source) is kind

    def test_local_directory_goes_before_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "wikitext").mkdir()
        assert source_kind("wikitext") is SourceKind.DIRECTORY

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "a.pdf").write_text("x")
        with pytest.raises(TextError, match=r"unknown kind '\.pdf'; readable are \.md, \.txt, \.csv"):
            source_kind(str(tmp_path / "a.pdf"))

    @pytest.mark.parametrize("source", ["./missing", "a/b/c", "/missing", "two words"])
    def test_nothing_of_that_name(self, source: str) -> None:
        with pytest.raises(TextError, match=r"No text .* hub data set"):
            source_kind(source)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (TextSpec("python-docs", "held-out", column="text"), "column 'text' has no effect on 'python-docs'"),
            (TextSpec("a.txt", column="body"), r"column 'body' has no effect on 'a\.txt' \(text file\)"),
            (TextSpec("python-docs", "held-out", revision="3.11"), "revision '3.11' has no effect"),
            (TextSpec("a.parquet", revision="main"), "only hub data sets have one"),
            (TextSpec("wikitext"), "name one of its splits, usually train, validation or test"),
            (TextSpec("wikitext", "first:10%"), "Ranges are for local files"),
        ],
    )
    def test_options_without_effect(self, spec: TextSpec, message: str) -> None:
        with pytest.raises(TextError, match=message):
            check_spec(spec)


class _Builder:
    """Stands in for a builder of datasets: two splits, prepared before they are known."""

    hash = "0123abcd"

    def __init__(self) -> None:
        self.info = SimpleNamespace(splits=None)

    def download_and_prepare(self) -> None:
        self.info.splits = {"train": None, "test": None}

    def as_dataset(self, split: str) -> Any:
        return datasets.Dataset.from_dict({"text": [split, "row two"], "body": ["b", "c"]})


class TestHub:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        seen: list[tuple[Any, ...]] = []

        def load(name: str, config: str | None, revision: str | None) -> _Builder:
            seen.append((name, config, revision))
            return _Builder()

        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        return seen

    def test_reads_a_split(self, calls: list[tuple[Any, ...]]) -> None:
        text = read_text(TextSpec("org/name:config", "test", revision="v1"))
        assert calls == [("org/name", "config", "v1")]
        assert (text.text, text.source, text.split, text.revision) == (
            "test\n\nrow two",
            "org/name:config",
            "test",
            "0123abcd",
        )

    def test_column(self, calls: list[tuple[Any, ...]]) -> None:
        assert read_text(TextSpec("name", "train", column="body")).text == "b\n\nc"
        assert calls == [("name", None, None)]
        with pytest.raises(TextError, match=r"data set 'name' has no column 'bodi'; .* Did you mean 'body'"):
            read_text(TextSpec("name", "train", column="bodi"))

    def test_unknown_split(self, calls: list[tuple[Any, ...]]) -> None:
        with pytest.raises(TextError, match=r"has no split 'tset'; its splits are train, test\. Did you mean 'test'"):
            read_text(TextSpec("name", "tset"))

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (ConnectionError("Couldn't reach it"), "Couldn't reach it Local files and 'python-docs' work offline"),
            (ValueError("Config name is missing."), "Name a configuration as `name:config`"),
        ],
    )
    def test_cannot_be_reached(self, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
        def load(*_args: Any, **_options: Any) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset_builder", load)
        with pytest.raises(TextError, match=message):
            read_text(TextSpec("org/name", "train"))
        with pytest.raises(TextError, match="Did you mean 'python-docs'"):
            read_text(TextSpec("python-doc", "train"))


def test_digest_follows_from_the_text() -> None:
    assert Text("a", "s", "all", "local").digest == Text("a", "other", "train", "x").digest
    assert Text("a", "s", "all", "local").digest != Text("b", "s", "all", "local").digest
    assert "long text" not in repr(Text("long text", "s", "all", "local"))
