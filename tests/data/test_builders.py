"""The project's prompts as a TFDS data set: built, registered and read without TensorFlow."""

import json
import os
import subprocess
import sys

import pytest

from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import metadata_of
from smart_grpo_jax.data import builders, geneval, prompts


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the data set."""
    return builders.prepare(tmp_path_factory.mktemp("tfds")).data_dir


@pytest.mark.parametrize("split", geneval.SHARES)
def test_the_data_set_is_the_split_in_its_order_with_its_records(built, split):
    found = prompts.load(f"tfds:{built}:{split}:prompt", strict=True)
    wanted = geneval.splits()[split]
    assert found.prompts == wanted and not found.report
    assert [dict(metadata_of(p)) for p in found.prompts] == [dict(p.metadata) for p in wanted]


BY_NAME = """
import sys
from smart_grpo_jax.data import prompts
found = prompts.load("tfds:smart_grpo_geneval:eval:prompt")
print(len(found.prompts), found.prompts[0].metadata["tag"], "tensorflow" in sys.modules)
"""


def test_a_registered_name_is_built_where_tfds_keeps_its_data_and_needs_no_tensorflow(tmp_path):
    env = {**os.environ, "TFDS_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME], capture_output=True, text=True, env=env, check=True
    )
    first = geneval.splits()["eval"][0]
    assert done.stdout.splitlines()[-1] == f"1000 {first.metadata['tag']} False"
    assert (tmp_path / "data" / "smart_grpo_geneval" / "1.0.0" / "features.json").is_file()


@pytest.mark.parametrize(
    "change, hint",
    [
        ({"split": "trian"}, "Unknown split 'trian'"),
        ({"text": "prmpt"}, 'no such field .try "prompt"'),
        ({"name": "no_such_set"}, "cannot be read .DatasetNotFoundError"),
    ],
)
def test_what_is_not_there_is_one_line(built, change, hint):
    asked = {"name": str(built), "split": "train", "text": "prompt"} | change
    with pytest.raises(UserError, match=hint) as error:
        prompts.load("tfds:{name}:{split}:{text}".format(**asked))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_data_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        prompts.load(f"tfds:{tmp_path}:train:prompt")


@pytest.mark.parametrize("source", ["tfds:coco", "tfds:coco:train", "tfds:"])
def test_half_a_name_is_known_without_looking(source):
    with pytest.raises(UserError, match="wanted tfds:NAME:SPLIT:FIELD"):
        prompts.check(source)
    prompts.check("tfds:coco/2017:1.1.0:train:caption")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A data set of others, with bad records, a picture that cannot be decoded and a class."""
    import tensorflow_datasets as tfds

    records = [
        {"caption": "a cat", "negative_prompt": "a dog", "metadata": '{"n": 1}'},
        {"caption": b"caf\xe9", "negative_prompt": "", "metadata": "{}"},
        {"caption": "a  cat", "negative_prompt": "", "metadata": "{}"},
        {"caption": "a bird", "negative_prompt": "", "metadata": "[]"},
        {"caption": "a bell\x07", "negative_prompt": "", "metadata": "{}"},
        {"caption": "naïve", "negative_prompt": "", "metadata": "{}"},
    ]

    class Foreign(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")
        code_path = pkg_dir_path = tmp_path_factory.mktemp("code") / "foreign.py"

        def _info(self):
            text = tfds.features.Text()
            image = tfds.features.Image(shape=(4, 4, 3), encoding_format="jpeg")
            names = {"caption": text, "negative_prompt": text, "metadata": text, "image": image}
            features = {**names, "class": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            import io

            for number, record in enumerate(records):
                yield number, {**record, "image": io.BytesIO(b"no picture"), "class": 1}

    builder = Foreign(data_dir=tmp_path_factory.mktemp("foreign"), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_bad_records_are_skipped_and_nothing_but_text_is_decoded(foreign, capsys):
    found = prompts.load(f"tfds:{foreign}:train:caption")
    assert found.prompts == ("a cat", "naïve")
    cat, naive = found.prompts
    assert (cat.negative, dict(cat.metadata), naive.negative) == ("a dog", {"n": 1}, "")
    assert found.report == (
        "skipped 3 of 6 records (1 not UTF-8: record 2; 1 no JSON object: record 4; "
        "1 with control characters: record 5), left out 1 repeat of earlier prompts"
    )
    assert found.report in capsys.readouterr().out
    with pytest.raises(UserError, match="record 2 is not UTF-8"):
        prompts.load(f"tfds:{foreign}:train:caption", strict=True)


def test_a_field_that_is_no_text_gives_no_prompt(foreign):
    with pytest.raises(
        UserError, match=r"holds no prompt: skipped 6 of 6 records .6 without text in its field"
    ):
        prompts.load(f"tfds:{foreign}:train:class")


def test_the_record_of_a_prompt_is_stored_as_json(built):
    import tensorflow_datasets as tfds

    first = tfds.builder_from_directory(str(built)).as_data_source(split="eval")[0]
    assert json.loads(first["metadata"])["prompt"] == first["prompt"].decode()
