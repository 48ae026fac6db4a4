"""Datasets as people have them: lists, sidecars and names of every kind. Nothing is compiled."""

import csv
import hashlib
import io
import json
import os
import re
import sys
import tarfile

import jax
import numpy as np
import pytest

from eqx_cogvae import dataset
from eqx_cogvae.dataset import _lists, _sources, _store, _text

CAPTION = "a cat; a dog, 猫"
LISTS = {
    "csv": f'video,caption\na.mp4,"{CAPTION}"\n',
    "CSV": f'video,caption\r\na.mp4,"{CAPTION}"\r\n',
    "tsv": f"video\tcaption\na.mp4\t{CAPTION}\n",
    "jsonl": json.dumps({"video": "a.mp4", "caption": CAPTION}) + "\n\n",
    "ndjson": json.dumps({"video": "a.mp4", "caption": CAPTION}, ensure_ascii=False),
    "json": json.dumps([{"video": "a.mp4", "caption": CAPTION}], indent=1),
}


def found(path):
    return [(item.name, *item.rows) for item in _sources.find(path, _sources.VIDEOS)]


@pytest.mark.parametrize("mark", ["", "\N{ZERO WIDTH NO-BREAK SPACE}"], ids=["plain", "mark"])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_all_kinds(kind, mark, tmp_path):
    path = tmp_path / f"list.{kind}"
    path.write_text(mark + LISTS[kind], encoding="utf-8", newline="")
    assert found(path) == [("a.mp4", {"caption": CAPTION})]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("semicolons.csv", 'caption;video\n"x, y";a.mp4\n'),
        ("tabs.csv", "caption\tvideo\nx, y\ta.mp4\n"),
        ("old.csv", '\rvideo,caption\ra.mp4,"x, y"\r'),
        ("lines.json", '{"video": "a.mp4", "caption": "x, y"}\n'),
        ("excel.csv", "sep=;\r\nvideo;caption\r\na.mp4;x, y\r\n"),
        ("commas.csv", '"sep=,"\nvideo,caption\na.mp4,"x, y"\n'),
        ("bars.csv", "SEP=|\nvideo|caption\na.mp4|x, y\n"),
        ("tabbed.csv", "sep=\t\nvideo\tcaption\na.mp4\tx, y\n"),
    ],
)
def test_lists_under_another_kinds_name(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert found(tmp_path / name) == [("a.mp4", {"caption": "x, y"})]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeff# first\r\na.mp4\r\n\r\nb.mp4"),
        ("a.json", '["a.mp4", "b.mp4"]'),
        ("a.jsonl", '"a.mp4"\n"b.mp4"\n'),
    ],
)
def test_lists_of_names(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert found(tmp_path / name) == [("a.mp4", {}), ("b.mp4", {})]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    columns = {"video_path": ["a.mp4", "b.mp4"], "caption": [CAPTION, None], "n": [1, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    assert found(tmp_path / "list.parquet") == [
        ("a.mp4", {"caption": CAPTION, "n": 1}),
        ("b.mp4", {"caption": None, "n": 2}),
    ]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "list.parquet").read_bytes()[:99])
    with pytest.raises(ValueError, match=r"cut\.parquet is no complete Parquet file"):
        found(tmp_path / "cut.parquet")
    parquet.write_table(pyarrow.table({"video": ["a"], "x": [b"\xff"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"row 1 of .*b\.parquet holds bytes"):
        found(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"list\.parquet needs pyarrow: pip install pyarrow"):
        found(tmp_path / "list.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "tsv", "txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "cp1252", "shift-jis"])
def test_other_encodings_are_refused(encoding, kind, tmp_path):
    text = 'video,caption\na.mp4,é\n{"video": "é"}'
    path = tmp_path / f"list.{kind}"
    path.write_bytes(text.replace("é", "猫" if encoding == "shift-jis" else "é").encode(encoding))
    with pytest.raises(
        ValueError, match=rf"list\.{kind} (is not UTF-8|holds NUL).*: save it as UTF-8"
    ):
        found(path)


def test_an_error_below_excels_line_has_the_files_own_numbers(tmp_path):
    (tmp_path / "list.csv").write_text('sep=;\nvideo;caption\na.mp4;x\nb.mp4;"y\n')
    with pytest.raises(ValueError, match=r"list\.csv is no table with ';' .*, in line 4\."):
        found(tmp_path / "list.csv")


def test_a_name_with_a_nul_byte_is_listed_and_the_others_are_read(tmp_path):
    (tmp_path / "list.jsonl").write_text('"a.mp4"\n"b\\u0000.mp4"\n"c\\u0000.mp4"\n')
    items = _sources.find(tmp_path / "list.jsonl", _sources.VIDEOS)
    assert [item.problem is None for item in items] == [True, False, False]
    with pytest.raises(ValueError, match=r"^'b\\x00\.mp4' holds a NUL byte, which no file's"):
        items[1].local().__enter__()


@pytest.mark.parametrize(
    "column", [*_lists.COLUMNS, "Video Path", "filePath", " FILE-NAME ", "VIDEO"]
)
def test_columns_that_name_a_file(column, tmp_path):
    (tmp_path / "list.jsonl").write_text(json.dumps({"id": 3, column: "a.mp4"}))
    (tmp_path / "list.csv").write_text(f"id,{column}\n3,a.mp4\n")
    assert found(tmp_path / "list.jsonl") == [("a.mp4", {"id": 3})]
    assert found(tmp_path / "list.csv") == [("a.mp4", {"id": "3"})]


def test_the_column_that_looks_like_a_file(tmp_path):
    """A manifest has columns of the user's, which may be called as the list's were."""
    row = {"video": "a.mp4", "path": "b.jpg", "file": "latents/c.safetensors"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    for suffixes, column in ((_sources.VIDEOS, "video"), (_sources.LATENTS, "file")):
        (item,) = _sources.find(tmp_path / "list.jsonl", suffixes)
        assert item.name == row[column]
        assert item.rows == ({k: v for k, v in row.items() if k != column},)


def test_a_number_is_no_name(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"video": 7, "path": "a.mp4"}')
    assert found(tmp_path / "list.jsonl") == [("a.mp4", {"video": 7})]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", '{"video": "a"}\n{"video": 7}', r"row 2 of \S*a\.jsonl must name a file under"),
        ("a.jsonl", '{"video": ""}', r"row 1 of \S*a\.jsonl must name a file under one of video,"),
        ("a.jsonl", "7\n", r"row 1 of \S*a\.jsonl must name a file .* got 7"),
        ("a.jsonl", "null", r"row 1 of \S*a\.jsonl must name a file .* got None"),
        ("a.json", "[[]]", r"row 1 of \S*a\.json must name a file"),
        ("a.json", "[" * 100_000, r"\S*a\.json is nested more than 100 deep"),
        ("a.json", '[{"video": "a"}', r"\S*a\.json must hold JSON"),
        ("a.jsonl", '{"video": "a"}\n' + "[" * 100_000, r"line 2 of \S*a\.jsonl is nested more"),
        ("a.jsonl", '{"video": "a", "x": ' + "[" * 101 + "]" * 101 + "}", "row 1 .* nested more"),
        ("a.jsonl", '{"video": ' + "9" * 5000 + "}", r"line 1 of \S*a\.jsonl must hold JSON: Exc"),
        ("a.csv", "video,caption\na,b,c\n", r"row 1 of \S*a\.csv has 3 cells and the header 2"),
        ("a.csv", "video,x,x\na,b,c\n", r"a\.csv has two columns of one name"),
        ("a.csv", 'video,x\na,"b\nc,d\n', r"a\.csv is no table with ',' between its cells: .*line"),
        ("a.csv", "", r"a\.csv lists nothing that ends in"),
        ("a.txt", "# nothing\n", r"a\.txt lists nothing that ends in"),
        ("a.jsonl", '{"x": "' + "y" * 200_000 + '"}', r"row 1 of \S*a\.jsonl must name a file"),
    ],
)
def test_bad_rows_are_named_in_one_short_line(name, text, match, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        found(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_long_and_odd_captions_are_kept(kind, tmp_path):
    """Longer than csv takes by itself, and with characters at which str.splitlines cuts."""
    limit = csv.field_size_limit()
    long, odd = "x" * 200_000, "a\u2028b\x0bc\x85d\x1ce"
    path, delimiter = tmp_path / f"list.{kind}", "\t" if kind == "tsv" else ","
    rows = [{"video": f"{i}.mp4", "caption": text} for i, text in enumerate((long, odd))]
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind in ("csv", "tsv"):
            writer = csv.DictWriter(file, ["video", "caption"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file, ensure_ascii=False)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert found(path) == [("0.mp4", {"caption": long}), ("1.mp4", {"caption": odd})]
    assert csv.field_size_limit() == limit


def test_columns_can_be_written_as_strict_json(tmp_path):
    text = '{"video": "a.mp4", "x": NaN, "y": [1e999, -1e999, 0.5], "z": "\\ud800"}'
    (tmp_path / "list.jsonl").write_text(text)
    ((_, row),) = found(tmp_path / "list.jsonl")
    assert row == {"x": None, "y": [None, None, 0.5], "z": "\\ud800"}
    json.dumps(row, allow_nan=False, ensure_ascii=False).encode()


def test_rows_of_one_video_are_kept_together(tmp_path):
    (tmp_path / "list.csv").write_text(
        "video,caption\nb.mp4,x\na.mp4,one\n./a.mp4,two\na.mp4,one\n"
    )
    assert found(tmp_path / "list.csv") == [
        ("a.mp4", {"caption": "one"}, {"caption": "two"}),
        ("b.mp4", {"caption": "x"}),
    ]


def write_folder(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_tar(path, files):
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_folder_and_as_tar(root, files):
    """Items of the same files in both forms, by name."""
    write_folder(root / "folder", files)
    write_tar(root / "a.tar", files)
    for source, start in ((root / "folder", ""), (root / "a.tar", "a.tar/")):
        items = _sources.find(source, _sources.VIDEOS)
        yield {item.name.removeprefix(start): item for item in items}


def test_one_rule_of_sidecars_for_folders_and_tars(tmp_path):
    files = {
        "a.mp4": b"1",
        "a.txt": "\ufeff a caption\n".encode(),
        "a.json": b'{"k": 1, "caption": "another"}',
        "sub/b.left.mp4": b"2",
        "sub/b.right.mp4": b"3",
        "sub/b.json": b'{"k": 2}',
        "sub/b.right.txt": b"right",
        "sub/a.mp4": b"4",
        "2024.05.mp4": b"5",
        "2024.05.txt": b"May",
        "2024.06.MP4": b"6",
        "2024.06.TXT": b"June",
        "boxes.mp4": b"7",
        "boxes.json": b"[1, 2]",
        "c.cap.txt": b"other",
        "c.mp4": b"8",
        "d.txt": b"of no video",
        ".hidden.mp4": b"9",
        ".hidden/e.mp4": b"9",
    }
    due = {
        "a.mp4": {"k": 1, "caption": "a caption"},
        "sub/b.left.mp4": {"k": 2},
        "sub/b.right.mp4": {"k": 2, "caption": "right"},
        "sub/a.mp4": {},
        "2024.05.mp4": {"caption": "May"},
        "2024.06.MP4": {"caption": "June"},
        "boxes.mp4": {"json": [1, 2]},
        "c.mp4": {"caption": "other"},
    }
    for items in as_folder_and_as_tar(tmp_path, files):
        assert {name: item.rows for name, item in items.items()} == {
            name: (row,) for name, row in due.items()
        }
        assert not any(item.problem for item in items.values())


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", b"[" * 100_000, "a.json is nested more than 100 deep"),
        ("a.json", b'{"x":' * 101 + b"1" + b"}" * 101, "a.json is nested more than 100 deep"),
        ("a.json", b"{", "a.json must hold JSON"),
        ("a.json", b"9" * 5000, "a.json must hold JSON"),
        ("a.json", '{"x": "é"}'.encode("utf-16"), "a.json is not UTF-8"),
        ("a.txt", "é".encode("latin-1"), "a.txt is not UTF-8"),
        ("a.txt", b"x" * 2000, "a.txt has more than 1000 bytes"),
    ],
)
def test_a_bad_sidecar_skips_its_video_only(name, content, match, tmp_path, monkeypatch):
    if len(content) == 2000:
        monkeypatch.setattr(_sources, "_MOST_SIDECAR_BYTES", 1000)
    files = {"a.mp4": b"1", name: content, "b.mp4": b"2", "b.txt": b"b"}
    for items in as_folder_and_as_tar(tmp_path, files):
        with pytest.raises(ValueError, match=f"its sidecar cannot be read: {match}"):
            items["a.mp4"].local().__enter__()
        assert items["b.mp4"].rows == ({"caption": "b"},)
        with items["b.mp4"].local() as (path, sha256):
            assert path.read_bytes() == b"2"
            assert sha256 == hashlib.sha256(b"2").hexdigest()


def test_names_that_are_not_utf8(tmp_path):
    """In a folder, in a tar, and in a list that Python's json wrote."""
    name = os.fsdecode("café.mp4".encode("latin-1"))
    if sys.platform == "darwin":
        pytest.skip("macOS has no such names")
    for items in as_folder_and_as_tar(tmp_path, {f"é/{name}": b"1", "b.mp4": b"2"}):
        assert list(items) == ["b.mp4", r"é/caf\udce9.mp4"]
        with items[r"é/caf\udce9.mp4"].local() as (path, _):
            assert path.read_bytes() == b"1"
    (tmp_path / "folder" / "list.jsonl").write_text(json.dumps({"video": f"é/{name}"}))
    (item,) = _sources.find(tmp_path / "folder" / "list.jsonl", _sources.VIDEOS)
    assert item.name == r"é/caf\udce9.mp4"
    with item.local() as (path, _):
        assert path.read_bytes() == b"1"


@pytest.mark.parametrize("cut", [100, 512 + 700, 512 + 1024 + 100, 512 + 1024 + 512 + 600])
def test_tars_cut_short(cut, tmp_path):
    """In the first header, its content, the second header, and its content."""
    write_tar(tmp_path / "a.tar", {"a.mp4": b"1" * 1000, "b.mp4": b"2" * 1000})
    os.truncate(tmp_path / "a.tar", cut)
    items = {item.name: item for item in _sources.find(tmp_path / "a.tar", _sources.VIDEOS)}
    with pytest.raises(ValueError, match=r"a\.tar is not a complete, uncompressed tar"):
        items.pop("a.tar").local().__enter__()
    for name, item in items.items():
        due = b"1" if name.endswith("a.mp4") else b"2"
        if item.offset + item.size > cut:
            with pytest.raises(ValueError, match=rf"{name} is cut short with its tar: \d+ of 1000"):
                item.local().__enter__()
        else:
            with item.local() as (path, _):
                assert path.read_bytes() == due * 1000
    assert len(items) == (cut > 512) + (cut > 512 + 1024 + 512)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a.mp4": b"1", "sub/b.mp4": b"2"})
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    good, bad = _sources.find(tmp_path, _sources.VIDEOS)
    assert (good.name, good.problem) == ("a.mp4", None)
    assert bad.problem == "sub cannot be read: Permission denied."


# Names and numbers of results.


@pytest.mark.parametrize(
    ("name", "due"),
    [
        ("猫と犬.mp4", "猫と犬"),
        ("cafe\u0301 no\u0303.mp4", "caf\xe9_n\xf5"),
        ("हिन्दी.mp4", "हिन्दी"),
        ("ex/été +2.mp4", "été_2"),
        ("2024-01-01T12:30:00.mp4", "2024-01-01T12_30_00"),
        ("\udce9.mp4", "_udce9"),
        ("🎬.mp4", "_"),
    ],
)
def test_labels_keep_letters_of_every_script(name, due):
    assert _text.label(name) == due


def test_labels_of_ascii_names_are_as_before():
    rng = np.random.default_rng(0)
    for length in rng.integers(1, 90, 200):
        stem = "".join(map(chr, rng.integers(33, 127, length))).replace("/", "-").replace(".", "x")
        due = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:40] or "_"
        assert _text.label(f"{stem}.mp4") == due
    assert len(_text.label("𠮷" * 99, 80).encode()) <= 120


def store(tmp_path, **fields):
    return _store.Store(tmp_path, dataset.Settings(**fields), "f" * 64)


def test_sixty_thousand_seeds_are_all_different(tmp_path):
    mine = store(tmp_path, latents="sample")
    seeds = {mine.seed(f"{i:064x}", 0) for i in range(60_000)}
    assert len(seeds) == 60_000
    # So many bits that a collision among a hundred thousand times as many is unlikely.
    assert max(seeds) > 2**59 and max(seeds) < 2**63


@pytest.mark.parametrize("seed", [0, 7, 2**28 - 1, 2**32 + 5, 2**60 - 1])
def test_a_seed_is_that_of_jax_with_64_bits(seed):
    with jax.enable_x64(True):
        due = jax.random.key_data(jax.random.key(seed))
    np.testing.assert_array_equal(jax.random.key_data(dataset.noise_key(seed)), due)


def test_records_of_the_version_before_are_found(tmp_path, unchecked):
    """The names of records, and of clips but samples, are those that it gave."""
    settings = {"frames": 9, "sizes": [[16, 24]], "fps": 8.0, "latents": "mode", "layout": "BTHWC"}
    parts = ["f" * 64, settings | {"tail": "drop"}, "0" * 64, "a.mp4"]
    mine = store(tmp_path, frames=np.int64(9), sizes=((16, np.int64(24)),), fps=8)

    def key(*parts):
        text = json.dumps(["eqx_cogvae.dataset.1", *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    assert mine.record("a.mp4", "0" * 64).stem == key(*parts)
    assert mine.clip("a.mp4", "0" * 64, 9) == f"a-000009-{key(*parts, 9)}"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"source": "a", "frames": 1, "clips": 3}',
                b'{"source": "a", "frames": 1, "clips": [{"id": 3}]}', b"[" * 100_000,
                b'{"source": "a", "frames": 1, "clips": [{"id": "../../x"}]}'],
)  # fmt: skip
def test_records_that_cannot_be_read_count_as_missing(content, tmp_path):
    mine = store(tmp_path)
    mine.finish("a.mp4", "0" * 64, _store.Record("a.mp4", 1, []))
    assert mine.finished("a.mp4", "0" * 64) == _store.Record("a.mp4", 1, [])
    mine.record("a.mp4", "0" * 64).write_bytes(content)
    assert mine.finished("a.mp4", "0" * 64) is None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sizes": (480, 720)}, "must be of .height, width. in pixels, got"),
        ({"fps": 5000}, "`fps` must be a positive number, got 5000"),
        ({"fps": float("nan")}, "`fps` must be a positive number, got nan"),
    ],
)
def test_settings_that_no_file_holds(fields, match, unchecked):
    with pytest.raises(ValueError, match=match):
        dataset.Settings(**fields)


def test_one_video_by_several_paths_is_one_item(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")
    names = ["a.mp4", f"../{tmp_path.name}/a.mp4", str(tmp_path / "a.mp4"), "link.mp4"]
    lines = [json.dumps({"video": name, "caption": str(i)}) for i, name in enumerate(names)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    (item,) = _sources.find(tmp_path / "list.jsonl", _sources.VIDEOS)
    assert [row["caption"] for row in item.rows] == ["0", "1", "2", "3"]
