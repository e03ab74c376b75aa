"""A prompt's own negative prompt: it reaches the guidance, and only where there is one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.errors import UserError
from smart_grpo_jax.core.types import Conditioning, Prompt, negative_of
from smart_grpo_jax.data import prompts
from smart_grpo_jax.data.embeddings import Embeddings
from smart_grpo_jax.hub import text as hub
from smart_grpo_jax.hub.functions import guided
from smart_grpo_jax.hub.pipeline import load_pipeline
from smart_grpo_jax.jobs import assemble, embed, evaluate

TEXTS = ("a photo of a blue cross", "a photo of two red squares", "a photo of a green circle")
CIRCLE, SQUARE = "a photo of a red circle", "a photo of a green square"


def write(folder, negatives, name="prompts.jsonl"):
    """A file of the texts; None: without a negative prompt."""
    lines = [{"prompt": text, "negative_prompt": own} for text, own in zip(TEXTS, negatives, strict=True)]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / name)


def config(source, **changes):
    """Three prompts, two steps, guidance 3 in the evaluation alone."""
    values = configs.default()
    wanted = {
        "prompts.source": source,
        "eval.source": source,
        "prompts.groups": "3",
        "prompts.cache": "off",
        "eval.prompts": "3",
        "eval.seeds": "1",
        "sampler.eval_steps": "2",
        "sampler.guidance": "1",
        "sampler.eval_guidance": "3",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    for name, value in wanted.items():
        configs.override(values, name, value)
    values.rewards, values.eval_rewards = {"compressibility": 1.0}, {}
    return configs.from_dict(values)


def pictures(source, **changes):
    run = assemble.assemble(config(source, **changes), training=False)
    return evaluate.evaluator(run)(run.state().params).images


def test_a_row_with_its_own_negative_moves_as_it_does_under_that_negative_of_the_run(tmp_path):
    """Through the store and the network, one call: what the slow test shows for finished pictures."""
    tiny_pipelines.write(tmp_path / "tiny")
    found = prompts.load(write(tmp_path, [CIRCLE, None, ""]))
    values = config(found.source, model__path=str(tmp_path / "tiny"), prompts__negative=SQUARE)
    store, pipe = embed.embed(values, found, found.prompts, 1), load_pipeline(tmp_path / "tiny", text=False)
    x = jax.random.normal(jax.random.key(0), (3, *pipe.latent_shape(8)))
    policy = jax.jit(guided(pipe.velocity_fn(), 3.0))

    def velocity(cond, negative):
        params = {"params": pipe.params["transformer"], "lora": {}, "negative": store.rows([negative])}
        return np.asarray(policy(params, x, jnp.full(3, 0.5), cond))

    mixed = velocity(store.conditioning(found.prompts), "")
    for i, negative in enumerate((CIRCLE, SQUARE, "")):
        alone = velocity(store.rows(found.prompts), negative)
        # the last digits of float32: another layout of the same sums
        np.testing.assert_allclose(mixed[i], alone[i], rtol=1e-5, atol=1e-5 * np.abs(alone).max())
        apart = np.abs(mixed[i - 1] - alone[i - 1]).max()
        assert apart > 1e-4 * np.abs(alone).max(), apart


@pytest.mark.slow
def test_a_prompt_with_its_own_negative_draws_what_the_run_with_that_negative_draws(tmp_path):
    mixed = pictures(write(tmp_path, [CIRCLE, "", None]), prompts__negative=SQUARE)
    plain = write(tmp_path, [None] * 3, "plain.jsonl")
    alone = [pictures(plain, prompts__negative=negative) for negative in (CIRCLE, "", SQUARE)]
    for i, wanted in enumerate(alone):
        # float32 with another layout of the batch; the next assertion says what a difference is
        np.testing.assert_allclose(mixed[i], wanted[i], atol=1e-5)
        others = [other[i] for other in alone if other is not wanted]
        assert min(np.abs(mixed[i] - other).max() for other in others) > 0.01


def test_without_guidance_no_negative_prompt_is_embedded(tmp_path):
    own = [CIRCLE, "", SQUARE]
    off = config(write(tmp_path, own), sampler__eval_guidance="1")
    found = prompts.load(off.prompts.source)
    store = embed.embed(off, found, list(found.prompts), 1)
    assert store.conditioning(found.prompts).negative is None
    with pytest.raises(UserError, match="was not among"):
        store.rows([CIRCLE])
    on = config(write(tmp_path, own))
    store = embed.embed(on, found, list(found.prompts), 1)
    assert store.conditioning(found.prompts).negative is not None and store.rows([CIRCLE]).repeats


@pytest.mark.parametrize("where", ["train", "evaluation"])
def test_one_prompt_with_a_negative_gives_every_row_of_the_run_one(tmp_path, where):
    some, none = write(tmp_path, [None, CIRCLE, None]), write(tmp_path, [None] * 3, "plain.jsonl")
    train, held = (some, none) if where == "train" else (none, some)
    run_config = config(train, eval__source=held, prompts__negative=SQUARE)
    train, held = prompts.load(train), prompts.load(held)
    store = embed.embed(run_config, train, list(held.prompts), 1)
    for texts in (train.prompts, held.prompts):
        cond = store.conditioning(texts)
        wanted = store.rows([negative_of(text, SQUARE) for text in texts])
        np.testing.assert_array_equal(cond.negative.tokens, wanted.tokens)
        np.testing.assert_array_equal(cond.negative.pooled, wanted.pooled)


def test_a_text_may_have_one_negative_in_training_and_another_in_the_evaluation(tmp_path):
    train, held = write(tmp_path, [CIRCLE] * 3), write(tmp_path, [SQUARE] * 3, "held.jsonl")
    found, other = prompts.load(train), prompts.load(held)
    store = embed.embed(config(train, eval__source=held), found, list(other.prompts), 1)
    one, two = (store.conditioning(p.prompts).negative for p in (found, other))
    np.testing.assert_array_equal(one.pooled, store.rows([CIRCLE] * 3).pooled)
    np.testing.assert_array_equal(two.pooled, store.rows([SQUARE] * 3).pooled)


def test_negatives_are_kept_on_disk_with_the_prompts(tmp_path, monkeypatch):
    cached = config(write(tmp_path, [CIRCLE, SQUARE, None]), prompts__cache=str(tmp_path / "cache"))
    found = prompts.load(cached.prompts.source)
    first = embed.embed(cached, found, list(found.prompts), 1).conditioning(found.prompts)
    monkeypatch.setattr(hub, "load_text", lambda *a, **k: pytest.fail("the encoders were loaded"))
    second = embed.embed(cached, found, list(found.prompts), 1).conditioning(found.prompts)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_model_that_never_reads_negatives_refuses_them(tmp_path):
    tiny_pipelines.write(tmp_path / "flux", "flux")
    values = config(write(tmp_path, [CIRCLE, None, None]), model__path=str(tmp_path / "flux"))
    found = prompts.load(values.prompts.source)
    with pytest.raises(UserError, match=r"has prompts with a negative_prompt, which .*flux never reads"):
        embed.embed(values, found, [], 1)


def test_rows_take_their_negatives_with_them():
    table = lambda start: (
        jnp.arange(start, start + 4.0)[:, None, None],
        jnp.arange(start, start + 4.0)[:, None],
    )
    cond = Conditioning(*table(0), 5, Conditioning(*table(10), 5))
    rows = cond.rows(jnp.asarray([2, 0]))
    assert rows.pooled[:, 0].tolist() == [2, 0] and rows.negative.pooled[:, 0].tolist() == [12, 10]
    assert rows.repeats == rows.negative.repeats == 5


def test_guidance_leads_each_row_away_from_its_own():
    velocity = lambda params, x, t, cond: cond.pooled
    negative = Conditioning(jnp.zeros((1, 1, 1)), jnp.full((1, 1), 7.0))
    cond = Conditioning(jnp.zeros((2, 1, 1)), jnp.asarray([[1.0], [2.0]]))
    own = Conditioning(jnp.zeros((2, 1, 1)), jnp.asarray([[10.0], [20.0]]))
    away = lambda c: guided(velocity, 3.0)({"negative": negative}, jnp.zeros(2), jnp.zeros(2), c)[
        :, 0
    ].tolist()
    assert away(cond) == [7 + 3 * (1 - 7), 7 + 3 * (2 - 7)]
    carrying = Conditioning(cond.tokens, cond.pooled, 1, own)
    assert away(carrying) == [10 + 3 * (1 - 10), 20 + 3 * (2 - 20)]


def test_an_empty_negative_is_one_of_its_own():
    assert negative_of("a cat", "run") == negative_of(Prompt("a cat"), "run") == "run"
    assert negative_of(Prompt("a cat", negative=""), "run") == ""


def test_a_store_without_negatives_gives_rows_without_them(tmp_path):
    def encode(texts):
        rows = np.array([[[float(len(text))]] for text in texts], np.float32)
        return Conditioning(rows, rows[:, 0], 1)

    store = Embeddings(encode, "f", None)
    store.ensure(["a", "bb"])
    assert store.conditioning(["a", "bb"]).negative is None


def test_prompts_that_are_cut_are_counted_aloud_also_when_nothing_is_encoded(tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text("\n".join([*TEXTS, *(f"{text} and {text} and {text}" for text in TEXTS[:2])]))
    values = config(str(path), prompts__cache=str(tmp_path / "cache"), prompts__groups="5")
    found = prompts.load(str(path))
    for _ in range(2):
        embed.embed(values, found, list(found.prompts), 1)
        assert "2 of 6 prompts are longer than 14 CLIP tokens and are cut" in capsys.readouterr().out


def test_nothing_is_said_where_every_prompt_fits(tmp_path, capsys):
    values = config(write(tmp_path, [None] * 3))
    embed.embed(values, prompts.load(values.prompts.source), list(TEXTS), 1)
    assert "cut" not in capsys.readouterr().out
