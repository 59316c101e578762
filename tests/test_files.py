"""What chapter 02a cannot check with a few examples: every size of block, every kind of file damaged at every byte, constant memory."""
import csv, gzip, hashlib, io, itertools, json, os, random, re, tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from conftest import KNOWN, documents, needs_known
from hypothesis import given, settings, strategies as st

from textgen import files
from textgen.core import TextgenError, UsageError
from textgen.files import BLOCK, Block, in_blocks, place_to_cut, read_blocks, sha256_of, text_files


def zst(data):
    "Compressed; a second frame is a second call."
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream: stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": lambda data: gzip.compress(data, mtime=0), ".zst": zst}


def refused(call, *parts, kind=UsageError):
    "The one line with which a call fails; it holds all the parts."
    with pytest.raises(kind) as caught: call()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    for part in parts: assert part in str(caught.value)
    return str(caught.value)


def read(path, **settings): return documents(read_blocks(path, **settings))


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        path = tmp_path/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path
    return write


def table(path, **columns):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3, write_page_checksum=True)
    return path


# Blocks

LUMPS = st.lists(st.sampled_from(["a", "bc", "é", "€", "🦊", " ", "  ", "\n", "\n\n", "\r\n", "\r", "\t", "\u00a0", "\u2028", "\ufeff", "\0"]), max_size=25)


def normal(text): return text.removeprefix("\ufeff").replace("\r\n", "\n")


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(LUMPS, st.integers(2, 12))
def test_blocks_join_to_the_document(lumps, size):
    text = "".join(lumps)
    blocks = list(in_blocks(lumps, size))
    assert documents(blocks) == [text] and all(len(block.text) <= size for block in blocks)
    assert all(block.text for block in blocks[:-1]) and (blocks[-1].text or not text)
    place = 0
    for block in blocks[:-1]:
        before, (place, after) = place, (place + len(block.text), text[place:place + size + 1])
        best = [i for i in range(1, size + 1) if not after[i - 1].isspace() and "\n" in after[i:len(after) - len(after[i:].lstrip())]]
        good = [i for i in range(1, size + 1) if after[i:i + 1] == " " and not after[i - 1].isspace()]
        assert place - before == (best or good or [place - before])[-1]
        assert text[place - 1:place + 1] != "\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("files")


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(lumps=LUMPS, size=st.integers(1, 12), packed=st.sampled_from(list(PACK)), data=st.data())
def test_a_file_is_its_text(folder, lumps, size, packed, data):
    text = "a" + "".join(lumps).replace("\0", "")
    path = folder/f"some.txt{packed}"
    path.write_bytes(PACK[packed](text.encode()))
    sha256 = sha256_of(path)
    assert read(path, size=size, sha256=sha256) == [normal(text)]
    rows = [line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+", normal(text))]
    assert read(path, size=size, lines=True, sha256=sha256) == rows


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), size=st.integers(1, 12), packed=st.sampled_from(list(PACK)))
def test_rows_of_every_kind(folder, texts, size, packed):
    texts = [text.replace("\0", "").replace("\r", "") for text in texts]
    for name in ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"]:
        path = folder/name
        if name.endswith("parquet"): table(path, n=list(range(len(texts))), text=texts)
        else:
            path = folder/f"{name}{packed}"
            if name.endswith("jsonl"): lines = "".join(json.dumps({"n": n, "text": text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(texts))
            else:
                csv.writer(out := io.StringIO(newline=""), delimiter="," if name.endswith("csv") else "\t").writerows([["n", "text"], *enumerate(texts)])
                lines = out.getvalue()
            path.write_bytes(PACK[packed](lines.encode()))
        assert read(path, size=size, sha256=sha256_of(path)) == texts, name
        assert read(path, column="text") == texts


def test_line_ends_in_rows(write, tmp_path):
    "A document's lines end in newlines, whatever it came in."
    assert read(write("a.jsonl", '{"text": "one\\r\\ntwo"}\r\n')) == ["one\ntwo"]
    assert read(write("a.csv", b'\xef\xbb\xbftext\r\n"one\r\ntwo"\r\n')) == ["one\ntwo"]
    assert read(table(tmp_path/"a.parquet", text=["one\r\ntwo"])) == ["one\ntwo"]


def test_long_documents(write, tmp_path, monkeypatch):
    "A row is cut into blocks too, a field of CSV may be long, and cutting takes time in proportion to the text."
    text = "word " * 600_000 + "x" * 2_000_000 + "\nend"
    paths = [write("a.txt", text), write("a.jsonl", json.dumps({"text": text})), write("a.csv", f'text\n"{text}"\n'),
             table(tmp_path/"a.parquet", text=[text])]
    searched = []
    monkeypatch.setattr(files, "place_to_cut", lambda text, size: searched.append(len(text)) or place_to_cut(text, size))
    for path in paths:
        assert [len(block.text) <= 2**16 for block in read_blocks(path, size=2**16)].count(False) == 0
        assert read(path, size=2**16) == [text]
    assert max(searched) <= 2 * 2**16


def test_memory_does_not_grow_with_the_file(tmp_path):
    "A file of five times the size costs no more, as text and as rows, compressed or not."
    def peak(path):
        tracemalloc.start()
        for block in read_blocks(path, size=2**15, sha256=digest): pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most
    line = json.dumps({"text": "all work and no play " * 50}) + "\n"
    for name, content in [("a.txt", "all work and no play\n" * 8_000), ("a.jsonl", line * 150)]:
        for packed, pack in PACK.items():
            peaks = []
            for times in [1, 1, 5, 25]:
                path = tmp_path/(name + packed)
                path.write_bytes(pack(content.encode() * times))
                digest = sha256_of(path)
                peaks.append(peak(path))
            assert peaks[3] < 1.3 * max(peaks[1:3]) and peaks[3] < len(content) * 25 / 4, (name, packed, peaks)


def test_memory_of_parquet(tmp_path):
    "Of a group of 20 MB only a little is there at a time."
    path = tmp_path/"a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{n} " * 30 for n in range(110_000)]}), path, compression="none", use_dictionary=False)
    assert path.stat().st_size > 18e6
    before = pyarrow.total_allocated_bytes()
    assert max(pyarrow.total_allocated_bytes() for block in read_blocks(path)) - before < 6e6


# What is no text

CUT = b"one\r\ntwo \xe2\x82\xac\r\nthree "


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("bad, byte", [(b"na\xefve", "0xEF"), (b"\xff", "0xFF"), (b"\xe2\x82", "0xE2"), (b"\xed\xa0\x80", "0xED"), (b"\xc0\x80", "0xC0")])
def test_not_utf8(write, size, packed, bad, byte):
    data = CUT + bad
    path = write("mine.txt" + packed, PACK[packed](data))
    at = data.index(int(byte, 16), len(CUT))
    message = refused(lambda: read(path, size=size), f"{path} is not UTF-8: byte {byte} in line 3, at offset {at}", "save it again as UTF-8")
    assert ("of the text in it" in message) == bool(packed)


def test_not_utf8_far_into_a_file():
    "In the third GB, where no 32 bits hold the offset."
    piece, times = b"line\n" * 2**18, 2_000
    pieces = itertools.chain(itertools.repeat(piece, times), [b"abc\xe9d"])
    place, line = len(piece) * times, 2**18 * times + 1
    assert place > 2**31
    def run():
        for text in files._characters(pieces, "far.txt"): pass
    refused(run, f"byte 0xE9 in line {line}, at offset {place + 3};")


@pytest.mark.parametrize("data", ["good".encode("utf-16"), "好的".encode("utf-16"), "好的".encode("utf-16-be"), "good".encode("utf-16-le"), "good".encode("utf-32"),
                                  "good".encode("utf-32-be"), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xfe\xff\x59\x7d"])
def test_binary_and_utf16(write, data):
    if data == "好的".encode("utf-16-be"): data = b"\xfe\xff" + data
    for name in ["mine.txt", "mine.jsonl", "mine.csv"]: refused(lambda: read(write(name, data), size=1), f"{name} is binary or UTF-16", "save it as UTF-8")


def test_cannot_be_read(write, tmp_path, monkeypatch):
    for call in [lambda: read(tmp_path/"nothing.txt"), lambda: sha256_of(tmp_path/"nothing.txt"), lambda: read(tmp_path/"nothing.parquet"),
                 lambda: text_files(tmp_path/"nothing.txt")]:
        refused(call, f"cannot read {tmp_path}/nothing", "o such file or", "check the path and its permissions")
    refused(lambda: read(tmp_path), f"cannot read {tmp_path}: Is a directory")
    for name in ["~nobody-at-all/a.txt", "long" * 100 + ".txt"]:
        for call in [text_files, read, sha256_of]: refused(lambda: call(name), f"cannot read {name}: ")
    secret = write("secret.txt.gz", gzip.compress(b"secret"))
    secret.chmod(0)
    if not os.access(secret, os.R_OK): refused(lambda: read(secret), "Permission denied")
    monkeypatch.setenv("HOME", str(tmp_path))
    write("mine.txt", "at home")
    assert read("~/mine.txt") == ["at home"] and text_files("~") == [tmp_path/"mine.txt", secret] and len(sha256_of("~/mine.txt")) == 64


# Compressed files

@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_damaged(write, packed):
    "Cut at any byte, with a bit turned or with something behind it: an error, and never a shorter text."
    random.seed(0)
    text = "".join(f"line {random.random()}\n" for _ in range(40))
    whole = PACK[packed](text.encode())
    for end in range(len(whole)):
        path = write("a.txt" + packed, whole[:end])
        refused(lambda: read(path, size=64), f"{path} is damaged or cut short (", "get it again")
        refused(lambda: read(write("a.jsonl" + packed, whole[:end])))  # a broken line may be found before the break
    refused(lambda: read(write("a.txt" + packed, whole + b"and more")), "is damaged or cut short")
    refused(lambda: read(write("a.txt" + packed, b"no such thing")), "is damaged or cut short")
    if packed == ".gz":  # it has a checksum
        for place in range(20, len(whole), 7):
            turned = bytearray(whole)
            turned[place] ^= 8
            refused(lambda: read(write("a.txt.gz", turned)))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_parts_behind_each_other(write, packed):
    "As pigz, pzstd, or `cat a.gz b.gz` make it."
    parts = [f"part {n}\n" * 3000 for n in range(50)]
    path = write("a.txt" + packed, b"".join(PACK[packed](part.encode()) for part in ["", *parts, "€"]))
    assert read(path, size=1000, sha256=sha256_of(path)) == ["".join(parts) + "€"]
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: read(path, size=1000), "is damaged or cut short")


def test_a_parquet_file_cut_short(tmp_path):
    texts = [f"document {n} " * 20 for n in range(20)]
    path = table(tmp_path/"a.parquet", text=texts)
    whole, refusals = path.read_bytes(), 0
    for end in range(0, len(whole), 13):
        path.write_bytes(whole[:end])
        refused(lambda: read(path), f"{path} is damaged or cut short (", "get it again")
    for place in range(0, len(whole), 29):  # some of its bytes say nothing about the text; its pages have checksums
        path.write_bytes(whole[:place] + bytes(30) + whole[place + 30:])
        try: assert read(path) == texts
        except UsageError as error:
            assert "is damaged or cut short" in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > 50
    packed = path.rename(tmp_path/"a.parquet.gz")
    refused(lambda: read(packed), "decompress it first")


# The hash

@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.parquet"])
def test_another_hash(write, tmp_path, name):
    if name.endswith("parquet"): path = table(tmp_path/name, text=["one"])
    else: path = write(name, PACK[name[5:] if "txt" in name else ""](b'{"text": "one"}\n'))
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path, sha256=sha256_of(path))
    refused(lambda: read(path, sha256="0" * 64), f"{path} has changed since it was first read", "prepare the data again", kind=TextgenError)


# Rows that are no documents

BAD_ROWS = {
    "cut": ('{"text": "ab', "line 3: this is not JSON (Unterminated string"), "empty object": ("{}", "line 3: nothing in column 'text'"),
    "list": ('["a"]', "line 3: this is no object"), "number": ("7", "line 3: this is no object"), "null": ("null", "line 3: this is no object"),
    "null text": ('{"text": null}', "line 3: nothing in column 'text'"), "a number": ('{"text": 7}', "line 3: no string in column 'text'"),
    "surrogate": (r'{"text": "a\ud800b"}', "line 3: U+D800 in column 'text'"), "deep": ("[" * 100_000, "line 3: this is not JSON"),
    "digits": ('{"n": ' + "9" * 5000 + ', "text": "a"}', "line 3: this is not JSON"),
}


@pytest.mark.parametrize("row, told", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_json(write, row, told):
    path = write("a.jsonl", '{"text": "\\ud83e\\udd8a"}\n\n' + row + '\n{"text": "b"}\n')
    refused(lambda: read(path), f"{path}, {told}", "take it out")
    assert next(read_blocks(path)) == Block("🦊")


def test_columns(write, tmp_path):
    for path in [write("a.jsonl", '{"id": "1", "text": "t", "more": "m"}\n{"more": "n", "text": "u", "id": "2"}\n'), write("a.csv", "id,text,more\n1,t,m\n2,u,n\n"),
                 write("a.tsv", "id\ttext\tmore\n1\tt\tm\n2\tu\tn\n"), table(tmp_path/"a.parquet", id=["1", "2"], text=["t", "u"], more=["m", "n"])]:
        assert read(path) == ["t", "u"] and read(path, column="more") == ["m", "n"]
        refused(lambda: read(path, column="texts"), f"{path} has no column 'texts'", "id, text, more")
    for path in [write("b.jsonl", '{"id": 1, "story": "t"}\n'), write("b.csv", "story\nt\n"), table(tmp_path/"b.parquet", id=[1], story=["t"])]: assert read(path) == ["t"]
    for path in [write("c.jsonl", '{"a": "1", "b": "t"}\n'), write("c.csv", "a,b\n1,t\n"), table(tmp_path/"c.parquet", a=["1"], b=["t"]), table(tmp_path/"d.parquet", a=[1], b=[2])]:
        refused(lambda: read(path), "has no column 'text', and not just one other of strings", "a, b")
    refused(lambda: read(table(tmp_path/"e.parquet", text=[1, 2])), "row 1: no string in column 'text'")
    refused(lambda: read(write("e.jsonl", '{"text": null, "title": "a"}\n')), "line 1: nothing in column 'text'")
    refused(lambda: read(table(tmp_path/"f.parquet", text=["a", "b", "c", "d", None])), "f.parquet, row 5: nothing in column 'text'")
    refused(lambda: read(write("a.txt", "text"), column="text"), "a.txt is plain text and has no columns")
    assert read(write("g.jsonl", "")) == read(write("g.jsonl", "\n \n")) == [] == read(write("g.csv", "text\n"))
    refused(lambda: read(write("g.csv", "")), "is empty; its first line must name the columns")


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str)
def test_kinds_of_strings_in_parquet(tmp_path, kind):
    try: table(tmp_path/"a.parquet", n=[1, 2], words=pyarrow.array(["a", "b"]).cast(kind))
    except pyarrow.ArrowNotImplementedError: pytest.skip(f"this pyarrow writes no {kind}")
    assert read(tmp_path/"a.parquet") == ["a", "b"]


def test_parquet_that_is_no_utf8(tmp_path):
    broken = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff"))
    refused(lambda: read(table(tmp_path/"a.parquet", text=broken)), "a.parquet", "0xff")


def test_bad_csv(write):
    good = 'id,text\n1,"two\nlines"\n\n2,b\n'
    assert read(write("a.csv", good)) == ["two\nlines", "b"]
    for row in ["3\n", "3,c,\n", '3,"c\n', '3,"c"d\n', "3,c\rd\n"]: refused(lambda: read(write("a.csv", good + row + "4,d\n")), "a.csv, line 6: ", "mend the row that begins there")
    assert read(write("a.csv", good.replace("\n", "\r\n"))) == ["two\nlines", "b"]


# Many files

def test_text_files(write, tmp_path, monkeypatch):
    names = ["B.TXT", "a/1.jsonl.gz", "a/2.csv", "a/b/3.md", "z.parquet"]
    for name in [*names, "cover.png", "a/.hidden.txt", ".git/message.txt", "notes.gz", "x.parquet.json"]: write(f"books/{name}", "")
    books = tmp_path/"books"
    assert text_files(books) == text_files(str(books)) == [books/name for name in names]
    assert text_files(books/"cover.png") == [books/"cover.png"] and text_files(books/"*.TXT") == [books/"B.TXT"]
    assert text_files(books/"**"/"*.*[v3d]") == [books/"a/2.csv", books/"a/b/3.md"] and text_files(books/"a*"/"?.csv") == [books/"a/2.csv"]
    assert write("books/[1].txt", "") in text_files(books/"[1].txt")  # a file of that very name comes first
    refused(lambda: text_files(books/"*.doc"), f"no file matches {books}/*.doc")
    write("pictures/cover.png", "")
    refused(lambda: text_files(tmp_path/"pictures"), "no text in the folder", "no file ends in .txt, .text, .md")
    monkeypatch.chdir(books)
    assert text_files("a/*.csv") == [Path("a/2.csv")] and read(write("books/read.me", "unknown"), size=3) == ["unknown"]


@needs_known
def test_wikitext_rows_are_those_of_the_hub():
    found = {}
    for split in ["train", "valid", "test"]:
        path = Path(KNOWN, f"wikitext-2-raw/wiki.{split}.raw")
        rows = read(path, lines=True, sha256=sha256_of(path))
        assert "".join(row or " \n" for row in rows) == path.read_text(encoding="utf-8") and all(row == "" or row.strip() for row in rows)
        found[split] = len(rows)
    assert found == {"train": 36_718, "valid": 3_760, "test": 4_358} and rows[:3] == ["", " = Robert Boulter = \n", ""]
