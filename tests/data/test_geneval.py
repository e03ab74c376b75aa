"""GenEval's grammar is read both ways, and its sets are the same everywhere and apart from each other."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from smart_grpo_jax.core.errors import StorageError, UserError
from smart_grpo_jax.data import geneval, prompts

SIZES = {"train": 2700, "heldout": 300, "eval": 1000}

PINS = {
    "train": "5374b1c15cb747386a80a3d505b1aba841792aa50625e7cda6fba6ae00bb7cb3",
    "heldout": "e28fb639fabea8b6b836fab85de428ab714c238181589ec7de17173d1f663438",
    "eval": "37aa4b30394c126435c0adfefe1982a0df41190a9f3ca9e1a5702ccc5775e496",
}
"""SHA-256 of each split's .jsonl."""

FORMS = {
    "a photo of a bench": {"tag": "single_object", "include": [{"class": "bench", "count": 1}]},
    "a photo of an airplane": {"tag": "single_object", "include": [{"class": "airplane", "count": 1}]},
    "a photo of an orange": {"tag": "single_object", "include": [{"class": "orange", "count": 1}]},
    "a photo of a bench and a sports ball": {
        "tag": "two_object",
        "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}],
    },
    "a photo of three clocks": {
        "tag": "counting",
        "include": [{"class": "clock", "count": 3}],
        "exclude": [{"class": "clock", "count": 4}],
    },
    "a photo of a red car": {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]},
    "a photo of an orange orange": {
        "tag": "colors",
        "include": [{"class": "orange", "count": 1, "color": "orange"}],
    },
    "a photo of a dog right of a teddy bear": {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
    },
    "a photo of a purple wine glass and a black apple": {
        "tag": "color_attr",
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "apple", "count": 1, "color": "black"},
        ],
    },
}


@pytest.mark.parametrize("text", FORMS)
def test_each_form_has_the_record_that_the_detector_reads(text):
    assert geneval.metadata(geneval.parse(text)) == {**FORMS[text], "prompt": text}


def said(record):
    """The prompt of a record, written from the record alone."""
    article = lambda words: ("an " if words[0] in "aeiou" else "a ") + words
    noun = lambda item: article(" ".join(filter(None, (item.get("color"), item["class"]))))
    include = record["include"]
    if record["tag"] == "counting":
        (item,) = include
        assert record["exclude"] == [{"class": item["class"], "count": item["count"] + 1}]
        return (
            f"a photo of {' two three four'.split(' ')[item['count'] - 1]} {geneval.PLURALS[item['class']]}"
        )
    if record["tag"] == "position":
        relation, target = include[1]["position"]
        return f"a photo of {noun(include[1])} {relation} {noun(include[target])}"
    return "a photo of " + " and ".join(noun(item) for item in include)


def whole(task, step=1):
    """Every prompt of a task (or every `step`-th) is read back, and its record says it again."""
    size, texts = geneval.NUMBERED[task][0], set()
    for number in range(0, size, step):
        meaning = geneval.nth(task, number)
        text = geneval.text(meaning)
        assert meaning.task == task and geneval.parse(text) == meaning
        assert said(geneval.metadata(meaning)) == text
        texts.add(text)
    assert len(texts) == len(range(0, size, step))


@pytest.mark.parametrize("task", ["single_object", "two_object", "counting", "colors", "position"])
def test_every_prompt_of_a_task_is_read_back(task):
    whole(task)


def test_one_in_61_prompts_of_two_coloured_objects_is_read_back():
    whole("color_attr", 61)


@pytest.mark.slow
def test_every_prompt_of_two_coloured_objects_is_read_back():
    whole("color_attr")


def test_the_tasks_have_as_many_prompts_as_their_words_allow():
    assert [geneval.NUMBERED[task][0] for task in geneval.TASKS] == [80, 6320, 240, 790, 25280, 554580]
    assert len(set(geneval.CLASSES)) == 80 and len(geneval.COLOURS) == 10


@pytest.mark.parametrize(
    "name, plural",
    [
        ("knife", "knives"),
        ("sheep", "sheep"),
        ("skis", "skis"),
        ("scissors", "scissors"),
        ("wine glass", "wine glasses"),
        ("bus", "buses"),
        ("bench", "benches"),
        ("sandwich", "sandwiches"),
        ("toothbrush", "toothbrushes"),
        ("computer mouse", "computer mice"),
        ("person", "people"),
        ("tv", "tvs"),
        ("giraffe", "giraffes"),
    ],
)
def test_plurals_are_english(name, plural):
    assert (
        geneval.text(geneval.Meaning("counting", (geneval.Clause(name, count=2),)))
        == f"a photo of two {plural}"
    )


@pytest.mark.parametrize(
    "published",
    ["a photo of two knifes", "a photo of four skises", "a photo of three benchs", "A  photo of two persons"],
)
def test_the_spelling_of_the_published_files_is_read_too(published):
    meaning = geneval.parse(published)
    assert meaning.task == "counting" and geneval.text(meaning) != published


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a photo of a unicorn",
        "a photo of an cat",
        "a photo of two knife",
        "a photo of five cats",
        "a photo of a red person",
        "a photo of a cat and a cat",
        "a photo of a cat left of a cat",
        "a photo of a cat and a red dog",
        "a photo of a red cat and a red dog",
        "a photo of a red cat left of a blue dog",
        "a photo of two cats and a dog",
        "a photo of a cat and a dog and a bus",
        "a photo of a cat left of a dog above a bus",
        "a photo of a cat photo of a dog",
    ],
)
def test_what_no_task_asks_for_is_refused(text):
    with pytest.raises(UserError, match="GenEval"):
        geneval.parse(text)


def test_the_sets_have_the_sizes_of_the_paper_and_the_documented_shares():
    splits = geneval.splits()
    assert {name: len(part) for name, part in splits.items()} == SIZES
    for name, part in splits.items():
        assert Counter(p.metadata["tag"] for p in part) == geneval.SHARES[name]


@pytest.mark.parametrize("seed", [geneval.SEED, 7])
def test_nothing_is_asked_twice_neither_within_a_set_nor_across(seed):
    texts = [prompt for part in geneval.splits(seed).values() for prompt in part]
    meanings = {geneval.same(geneval.parse(text)) for text in texts}
    assert len(set(texts)) == len(meanings) == sum(SIZES.values())


def test_mirrored_prompts_mean_the_same():
    same = lambda text: geneval.same(geneval.parse(text))
    assert same("a photo of a cat left of a dog") == same("a photo of a dog right of a cat")
    assert same("a photo of a cat above a dog") == same("a photo of a dog below a cat")
    assert same("a photo of a cat left of a dog") != same("a photo of a dog left of a cat")
    assert same("a photo of a red cat and a blue dog") == same("a photo of a blue dog and a red cat")
    assert same("a photo of a red cat and a blue dog") != same("a photo of a blue cat and a red dog")


@pytest.mark.parametrize("split", PINS)
def test_a_set_is_the_same_to_the_byte_everywhere(split):
    content = geneval.jsonl(geneval.splits()[split])
    assert hashlib.sha256(content.encode()).hexdigest() == PINS[split]


def test_the_order_of_hash_tables_does_not_reach_the_sets():
    code = (
        "import hashlib; from smart_grpo_jax.data import geneval as g;"
        "print(hashlib.sha256(g.jsonl(g.splits()['eval']).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == PINS["eval"]


def test_another_seed_is_another_draw_of_the_same_shares():
    one, other = geneval.splits(0)["train"], geneval.splits(1)["train"]
    assert len(set(one) & set(other)) < len(one) // 2
    assert prompts.load("geneval:train?seed=1").prompts == other


@pytest.mark.parametrize("split", SIZES)
def test_a_set_is_a_source_whose_prompts_carry_their_records(split):
    prompts.check(f"geneval:{split}")
    found = prompts.load(f"geneval:{split}")
    assert len(found.prompts) == SIZES[split] and not found.report
    for prompt in found.prompts[:50]:
        assert prompt.metadata == geneval.metadata(geneval.parse(prompt))


@pytest.mark.parametrize(
    "source, hint",
    [
        ("geneval:tran", 'try "train"'),
        ("geneval:", "known: "),
        ("geneval:eval?seed=x", "wanted geneval:eval[?]seed=N"),
        ("geneval:eval?sed=1", "seed=N"),
        ("geneval:eval?", "seed=N"),
        ("genval:eval", 'try "geneval"'),
    ],
)
def test_a_wrong_name_is_one_line_with_the_nearest(source, hint):
    with pytest.raises(UserError, match=hint):
        prompts.check(source)


def test_the_command_writes_text_and_json_lines_that_are_read_as_the_same_sets(tmp_path, capsys):
    assert geneval.main(["--out", str(tmp_path / "sets"), "--seed", "3"]) == 0
    written = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()]
    assert sorted(written) == sorted(f"{s}.{kind}" for s in SIZES for kind in ("txt", "jsonl"))
    for split, wanted in geneval.splits(3).items():
        plain, full = (prompts.load(str(tmp_path / "sets" / f"{split}.{kind}")) for kind in ("txt", "jsonl"))
        assert plain.prompts == full.prompts == wanted
        assert [dict(p.metadata) for p in full.prompts] == [dict(p.metadata) for p in wanted]
    line = (tmp_path / "sets" / "eval.jsonl").read_text().splitlines()[0]
    assert list(json.loads(line)) in (["tag", "include", "prompt"], ["tag", "include", "exclude", "prompt"])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert geneval.main(["--out", str(tmp_path / "file" / "sets")]) == StorageError.exit_code
    assert "could not be made" in capsys.readouterr().err
