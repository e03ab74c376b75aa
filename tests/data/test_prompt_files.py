"""Files that others wrote, up to hostile ones: each is read, skipped or refused as docs/prompts.md says.

The rows of the table there are the cases here: a row without a case, or a case without a row, fails.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import metadata_of
from smart_grpo_jax.data import geneval, prompt_lines, prompts

DOCS = Path(__file__).resolve().parents[2] / "docs" / "prompts.md"
ROWS = dict(re.findall(r"^\| (.*?) \| (read|(?:skipped|refused): `.*`) \|$", DOCS.read_text(), re.M))

GOOD = b'{"prompt": "a cat"}'
RECORD = b'{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}'

READ = {
    "UTF-8 with a byte order mark, also inside of joined files": (
        "p.txt",
        b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog",
        ("a cat", "a dog"),
    ),
    "Windows line ends (CRLF)": ("p.txt", b"a cat\r\na dog\r\n", ("a cat", "a dog")),
    "old Macintosh line ends (CR)": ("p.txt", b"a cat\ra dog\r", ("a cat", "a dog")),
    "no line end after the last line": ("p.txt", b"a cat\na dog", ("a cat", "a dog")),
    "blank lines": ("p.txt", b"\n  \na cat\n\t\n\n", ("a cat",)),
    "tabs, no-break spaces, vertical tabs, line separators inside of a line": (
        "p.txt",
        " a\tcat\u00a0on\x0ba\u2028 mat  \u3000".encode(),
        ("a cat on a mat",),
    ),
    "joiners of emoji and of Persian": (
        "p.txt",
        "👩\u200d🚀\nمی\u200cخواهم\n".encode(),
        ("👩\u200d🚀", "می\u200cخواهم"),
    ),
    "repeats": ("p.txt", b"a cat\na dog\na  cat\n", ("a cat", "a dog")),
    "a name in capitals (`.JSONL`)": ("P.JSONL", GOOD, ("a cat",)),
    "GenEval's own JSON lines": ("p.jsonl", RECORD + b"\n", ("a photo of a dog",)),
}

SKIPPED = {
    "text: bytes that are not UTF-8 (Windows-1252)": ["a naïve café".encode("cp1252"), b"\xff", b"a\xc3"],
    "text: half of a UTF-16 pair, written as bytes": [b"a \xed\xa0\x80"],
    "text: a zero byte": [b"a\x00cat", b"\x00"],
    "text: terminal colours (escape)": [b"\x1b[31mred", b"bell\x07", b"\x7f"],
    "text: a line of 1 MB": [b"a" * 2**20, b"a " * 2**19],
    "JSON: a line of 1 MB": [b'{"prompt": "' + b"a" * 2**20 + b'"}'],
    "JSON: bytes that are not UTF-8": [
        b'{"prompt": "caf\xe9"}',
        b'{"prompt": "a", "metadata": {"k": "\xe9"}}',
    ],
    "JSON: cut off in the middle": [b'{"prompt": "a c', b'{"prompt": "a", ', b"{"],
    "JSON: plain text": [b"a cat", b"{'prompt': 'a cat'}", b'{"prompt": "a\tb"}'],
    "JSON: two objects in one line": [GOOD + GOOD, GOOD + b" x"],
    "JSON: NaN, Infinity": [b'{"prompt": "a", "n": NaN}', b'{"prompt": "a", "n": -Infinity}', b"NaN"],
    "JSON: a number beyond all floats": [b'{"prompt": "a", "n": 1e999}'],
    "JSON: an integer of 50,000 digits": [b'{"prompt": "a", "n": ' + b"1" * 50_000 + b"}"],
    "JSON: 30,000 brackets deep": [b"[" * 30_000 + b"]" * 30_000, b'{"a":' * 10_000],
    "JSON: 100 brackets deep": [b'{"prompt": "a", "n": ' + b"[" * 100 + b"]" * 100 + b"}"],
    "JSON: an array, a text or a number": [b'["a cat"]', b'"a cat"', b"1", b"null", b"true"],
    "JSON: no `prompt`": [b"{}", b'{"text": "a cat"}', b'{"Prompt": "a cat"}'],
    "JSON: `prompt` is a number, null or a list": [
        b'{"prompt": 1}',
        b'{"prompt": null}',
        b'{"prompt": ["a"]}',
    ],
    "JSON: an empty `prompt`": [b'{"prompt": ""}', b'{"prompt": " \\n "}'],
    "JSON: half of a pair in `prompt`": [b'{"prompt": "a \\ud800"}', b'{"prompt": "\\udc80"}'],
    "JSON: `negative_prompt` is no text": [b'{"prompt": "a", "negative_prompt": 1}'],
    "JSON: control characters in `negative_prompt`": [b'{"prompt": "a", "negative_prompt": "\\u0000"}'],
    "JSON: `metadata` is no object": [
        b'{"prompt": "a", "metadata": [1]}',
        b'{"prompt": "a", "metadata": ""}',
    ],
}

REFUSED = {
    "an empty file": ("p.txt", b""),
    "blanks only": ("p.jsonl", b"\xef\xbb\xbf \n\t\r\n"),
    "bad lines only": ("p.txt", b"\x00\n\xff\n"),
    "UTF-16 with a byte order mark": ("p.txt", "a cat\n".encode("utf-16")),
    "UTF-16 without a byte order mark": ("p.txt", "a cat\n".encode("utf-16-le")),
    "UTF-32 with a byte order mark": ("p.txt", "a cat\n".encode("utf-32")),
    "gzip": ("p.txt.gz", gzip.compress(b"a cat\n")),
    "zip": ("p.txt", b"PK\x03\x04rest"),
    "Parquet": ("p.parquet", b"PAR1rest"),
    "a JSON array in a `.jsonl`": ("p.jsonl", b' \n[{"prompt": "a cat"},\n {"prompt": "a dog"}]'),
}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path / "pipe")


PLACES = {
    "a folder": str,
    "a pipe": pipe,
    "a file that is not there": lambda tmp_path: str(tmp_path / "no.txt"),
    "a file that fails while it is read": lambda tmp_path: "/proc/self/mem",
    "a name with a zero byte": lambda tmp_path: str(tmp_path / "a\x00b"),
}


def test_the_table_of_the_docs_has_a_case_for_each_row_and_no_other():
    assert set(ROWS) == {*READ, *SKIPPED, *REFUSED, *PLACES}
    assert len(ROWS) >= 40


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_unusual_is_read(case, strict, tmp_path):
    name, content, wanted = READ[case]
    assert ROWS[case] == "read"
    found = prompts.load(write(tmp_path, name, content), strict=strict)
    assert found.prompts == wanted and found.skipped == 0
    assert found.repeats == (case == "repeats")


def reason(case, kind):
    outcome, _, words = ROWS[case].partition(": ")
    assert outcome == kind
    return words.strip("`")


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_bad_is_skipped_and_said_or_refused_where_strict(case, tmp_path, capsys):
    name, good = ("p.jsonl", GOOD) if case.startswith("JSON") else ("p.txt", b"a cat")
    for line in SKIPPED[case]:
        path = write(tmp_path, name, good + b"\n\n" + line + b"\n")
        found = prompts.load(path)
        assert found.prompts == ("a cat",) and found.skipped == 1
        assert found.report == f"skipped 1 of 3 lines (1 {reason(case, 'skipped')}: line 3)"
        assert capsys.readouterr().out == f"prompts.source: {path}: {found.report}\n"
        with pytest.raises(UserError) as error:
            prompts.load(path, strict=True, field="eval.source")
        assert str(error.value) == f"eval.source: {path} line 3 is {reason(case, 'skipped')}"


@pytest.mark.parametrize("case", REFUSED | PLACES)
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_no_prompt_file_is_refused_in_one_line(case, strict, tmp_path):
    path = PLACES[case](tmp_path) if case in PLACES else write(tmp_path, *REFUSED[case])
    wanted = reason(case, "refused")
    if strict and case in ("bad lines only", "UTF-16 without a byte order mark"):
        wanted = "line 1 is with control characters"
    with pytest.raises(UserError) as error:
        prompts.load(path, strict=strict)
    message = str(error.value)
    assert message.startswith("prompts.source: ") and wanted in message and "\n" not in message


def test_the_report_counts_by_reason_and_names_the_first_lines(tmp_path):
    lines = [b"a cat", b"\xff", b"\x00", b"a cat", b"\xfe", b"\xff\xff", b"a cat", b"\xff\xfe", b"a dog"]
    found = prompts.load(write(tmp_path, "p.txt", b"\n".join(lines)))
    assert found.report == (
        "skipped 5 of 9 lines (4 not UTF-8: lines 2, 5, 6 …; 1 with control characters: line 3), "
        "left out 2 repeats of earlier prompts"
    )
    assert (found.skipped, found.repeats, found.prompts) == (5, 2, ("a cat", "a dog"))


def test_a_clean_file_is_silent(tmp_path, capsys):
    found = prompts.load(write(tmp_path, "p.txt", b"a cat\na dog\n"))
    assert found.report == "" and capsys.readouterr().out == ""


def test_a_json_line_brings_its_negative_prompt_and_metadata(tmp_path):
    lines = [
        {"prompt": "one", "negative_prompt": " not\n one ", "metadata": {"k": [1, {"deep": "é"}]}},
        {"prompt": "two", "negative_prompt": "", "id": 7},
        {"prompt": "three", "id": 8, "metadata": {"id": 9, "k": 1}},
        {"prompt": "four", "negative_prompt": None, "metadata": None},
        {"prompt": "five", "metadata": {}},
    ]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    one, two, three, four, five = prompts.load(write(tmp_path, "p.jsonl", content), strict=True).prompts
    assert (one, one.negative, metadata_of(one)) == ("one", "not one", {"k": [1, {"deep": "é"}]})
    assert (two, two.negative, metadata_of(two)) == ("two", "", {"prompt": "two", "id": 7})
    assert (three.negative, metadata_of(three)) == (None, {"prompt": "three", "id": 9, "k": 1})
    assert [dict(metadata_of(prompt)) for prompt in (four, five)] == [{}, {}]
    assert sorted(metadata_of(three)) == ["id", "k", "prompt"] and metadata_of(three).get("no") is None


def test_the_first_of_equal_prompts_stands(tmp_path):
    lines = [{"prompt": "a cat", "negative_prompt": n} for n in ("dog", "bird")]
    found = prompts.load(write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines)).encode()))
    assert [p.negative for p in found.prompts] == ["dog"] and found.repeats == 1


def fingerprint(tmp_path, **record):
    return prompts.load(write(tmp_path, "p.jsonl", json.dumps(record).encode())).sha


def test_the_fingerprint_covers_text_negative_prompt_and_metadata(tmp_path):
    records = [
        {"prompt": "a cat"},
        {"prompt": "a dog"},
        {"prompt": "a cat", "negative_prompt": ""},
        {"prompt": "a cat", "negative_prompt": "None"},
        {"prompt": "a cat", "metadata": {"n": 1}},
        {"prompt": "a cat", "metadata": {"n": 2}},
    ]
    found = [fingerprint(tmp_path, **record) for record in records]
    assert len(set(found)) == len(found) and {len(sha) for sha in found} == {16}
    assert found[0] == fingerprint(tmp_path, **records[0])


def test_the_fingerprint_tells_where_a_prompt_ends():
    sha = lambda *texts: prompts.PromptSet("s", texts).sha
    assert sha("ab", "c") != sha("a", "bc") != sha("a", "b", "c") and sha("a", "b") != sha("b", "a")


MILLION = """
import resource, sys, time
from smart_grpo_jax.data import prompts
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started = most(), time.process_time()
found = prompts.load(sys.argv[1])
print(len(found.prompts), found.skipped, time.process_time() - started, most() - before)
"""

LINES = {
    "m.txt": "a photo of a naïve cat number {} on a mat, highly detailed",
    "m.jsonl": '{{"prompt": "a photo of a cat number {} on a mat"}}',
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_million_lines_take_5_seconds_and_500_megabytes_at_most(name, tmp_path):
    """Seconds of this process's own: others on the machine are not the reader's fault."""
    with open(tmp_path / name, "w", encoding="utf-8") as file:
        for number in range(1_000_000):
            file.write("\x00\n" if number % 100_000 == 7 else LINES[name].format(number) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", MILLION, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    kept, skipped, seconds, megabytes = map(float, done.stdout.splitlines()[-1].split())
    print(f"{name}: {seconds:.1f} s, {megabytes:.0f} MB")
    assert (kept, skipped) == (999_990, 10)
    assert seconds < 5 and megabytes < 500


def test_genevals_records_come_through_a_file_unchanged(tmp_path):
    wanted = geneval.splits()["heldout"]
    found = prompts.load(write(tmp_path, "p.jsonl", geneval.jsonl(wanted).encode()), strict=True).prompts
    assert found == wanted
    assert [dict(metadata_of(p)) for p in found] == [dict(metadata_of(p)) for p in wanted]


def test_depth_counts_levels_of_arrays_and_objects():
    assert [prompt_lines.depth(v) for v in ({}, {"a": 1}, {"a": []}, [[{"b": [[]]}], 1])] == [1, 1, 2, 5]
