"""TFDS data sets of prompts, read without TensorFlow; the project's own one, also built without it.

    from smart_grpo_jax.data import builders
    builders.register()
    tfds.data_source("smart_grpo_geneval", split="train")

The data are written as array_record, whose rows TFDS reads at random places in plain Python.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.data import geneval
from smart_grpo_jax.data.prompt_lines import Bad, Gathered, checked, gather, json_object, record_prompt

GENEVAL = "smart_grpo_geneval"


@functools.cache
def register() -> type:
    """Make the data sets known to TFDS by name. The class is made here, since TFDS is slow to import."""
    import tensorflow_datasets as tfds

    class SmartGrpoGeneval(tfds.core.GeneratorBasedBuilder):
        """GenEval's prompts with their records."""

        VERSION = tfds.core.Version("1.0.0")
        # TFDS finds these two by a library that it does not ask for on this Python
        code_path: Any = Path(__file__)
        pkg_dir_path: Any = Path(__file__).parent

        def _info(self) -> Any:
            words = tfds.features.Text()
            return self.dataset_info_from_configs(
                description="Prompts of GenEval's six tasks; `metadata` is GenEval's record as JSON.",
                features=tfds.features.FeaturesDict({"prompt": words, "metadata": words}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            del dl_manager
            return {name: self._generate_examples(name) for name in geneval.SHARES}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
            for number, prompt in enumerate(geneval.splits()[split]):
                yield number, {"prompt": str(prompt), "metadata": json.dumps(dict(prompt.metadata))}

    return SmartGrpoGeneval


def prepare(folder: Path | None = None) -> Any:
    """The builder of GenEval's prompts, its files written below `folder` (None: where TFDS keeps its own)."""
    builder = register()(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder


def read(name: str, split: str, text: str, field: str, strict: bool) -> Gathered:
    """The prompts of a data set: of a registered name, or of the folder in which TFDS wrote one.

    `text` names the feature with the prompt; `negative_prompt` and `metadata` (JSON) are taken where there
    are such features, and nothing else is decoded.
    """
    import tensorflow_datasets as tfds

    where = f"{field}: tfds:{name}:{split}:{text}"
    try:
        register()
        if os.path.isdir(name):
            builder: Any = tfds.builder_from_directory(name)
            source: Any = builder.as_data_source(split=split)
        else:
            source = tfds.data_source(name, split=split)
        features = source.dataset_info.features
    except Exception as error:  # whatever the library makes of a name, a split or a folder
        reason = " ".join(str(error).split())[:90]
        raise UserError(f"{where} cannot be read ({type(error).__name__}: {reason})") from error
    if text not in features:
        raise UserError(f"{where}: no such field ({nearest(text, features)})")
    keys = {"prompt": text} | {key: key for key in ("negative_prompt", "metadata") if key in features}
    source.decoders = {name: tfds.decode.SkipDecoding() for name in features if name not in keys.values()}

    def prompt(record: dict[str, Any]) -> str:
        found: dict[str, Any] = {key: words(record[feature]) for key, feature in keys.items()}
        if "metadata" in found:
            found["metadata"] = json_object(found["metadata"])
        return record_prompt(found)

    return gather(source, prompt, where, "record", strict)


def words(value: Any) -> str:
    """A text feature as text."""
    if not isinstance(value, bytes | str):
        raise Bad("without text in its field")
    return checked(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value)
