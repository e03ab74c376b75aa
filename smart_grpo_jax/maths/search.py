"""Algorithm 1: a cross-entropy search over the noise of one step.

    mu = 0, sigma = 1
    repeat `rounds` times:
        m_i = mu + sigma n_i,  n_i ~ N(0, I),   i = 1..candidates
        score every m_i;  elite = the best T of them
        mu, sigma = mean and std of the elite, element by element
    return mu                                (or mu + sigma n, or the best candidate)

One-shot search is rounds = 1 with many candidates; best-of-K is rounds = 1 with returns = "best".
docs/algorithm.md, section 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from smart_grpo_jax.maths.choice import choose

RETURNS = ("mean", "sample", "best")
SELECTS = {"greedy": True, "random": False}
NOISE_NORMS = {"none": False, "rms": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How to search. The first six fix shapes or the program; the others are data, so that one compiled
    program serves every variant. Build it from names with `settings`."""

    rounds: int = dataclasses.field(metadata={"static": True})
    candidates: int = dataclasses.field(metadata={"static": True})
    elite: int = dataclasses.field(metadata={"static": True})
    keep_candidates: bool = dataclasses.field(metadata={"static": True})
    unbiased: bool = dataclasses.field(metadata={"static": True})
    antithetic: bool = dataclasses.field(metadata={"static": True})
    returns: ArrayLike
    greedy: ArrayLike
    rms: ArrayLike
    sigma_floor: ArrayLike
    smoothing: ArrayLike


def elite_count(candidates: int, fraction: float) -> int:
    """T = floor(P K); the paper's 25 samples with 12 kept are P = 1/2."""
    count = math.floor(candidates * fraction + 1e-9)
    if not 1 <= count <= candidates:
        raise ValueError(
            f"search elite: got {fraction} of {candidates}, want elite * candidates >= 1 and elite <= 1"
        )
    return count


def settings(
    rounds: int = 5,
    candidates: int = 5,
    elite: float = 0.5,
    returns: str = "mean",
    select: str = "greedy",
    noise_norm: str = "none",
    sigma_floor: float = 0.0,
    smoothing: float = 1.0,
    *,
    keep_candidates: bool = False,
    unbiased: bool = False,
    antithetic: bool = False,
) -> Settings:
    """Settings from names; the defaults are the paper's.

    `elite` is the fraction P of the candidates that is kept, `unbiased` divides their variance by T - 1.
    `smoothing` is the share of the elite in the new mu and sigma (1: all). `noise_norm` "rms" scales the
    returned noise to RMS 1, which the mean of an elite lacks. `sigma_floor` and `select` "random": `refit`;
    `antithetic`: `pairs`.
    """
    count = elite_count(candidates, elite)
    if rounds < 1:
        raise ValueError(f"search rounds: got {rounds}, want at least 1")
    if not 0 < smoothing <= 1:
        raise ValueError(f"search smoothing: got {smoothing}, want 0 < smoothing <= 1")
    if not 0 <= sigma_floor <= 1:
        raise ValueError(f"search sigma_floor: got {sigma_floor}, want 0 to 1")
    if count == 1 and unbiased:
        raise ValueError("search elite: got one elite candidate, want two for an unbiased variance")
    if count == 1 and rounds > 1 and sigma_floor == 0 and smoothing == 1:
        # sigma is 0 after the first round, and the others would score one point over and over.
        raise ValueError(f"search elite: got one elite in {rounds} rounds, want two, or sigma_floor > 0")
    return Settings(
        rounds=rounds, candidates=candidates, elite=count, keep_candidates=keep_candidates, unbiased=unbiased,
        antithetic=antithetic,
        returns=np.int32(choose({name: i for i, name in enumerate(RETURNS)}, returns, "search returns")),
        greedy=np.bool_(choose(SELECTS, select, "search select")),
        rms=np.bool_(choose(NOISE_NORMS, noise_norm, "search noise_norm")),
        sigma_floor=np.float32(sigma_floor), smoothing=np.float32(smoothing),
    )  # fmt: skip


class SearchResult(NamedTuple):
    """The noise to execute, the fitted law, and all that was scored.

    `order` is the order of selection, best first (random where the selection is). `best_noise` is the
    first candidate in that order over all rounds, `best_reward` what it scored.
    """

    noise: Float[Array, "*shape"]
    mean: Float[Array, "*shape"]
    std: Float[Array, "*shape"]
    rewards: Float[Array, "rounds k"]
    order: Int[Array, "rounds k"]
    candidates: Float[Array, "rounds k *shape"] | None
    best_reward: Float[Array, ""]
    best_noise: Float[Array, "*shape"]


def propose(
    mu: Float[Array, "*shape"], sigma: Float[Array, "*shape"], n: Float[Array, "*k_and_shape"]
) -> Float[Array, "*k_and_shape"]:
    """m = mu + sigma n, for one n or a stack of them."""
    return mu + sigma * n


def pairs(n: Float[Array, "k *shape"]) -> Float[Array, "k *shape"]:
    """n_1, -n_1, n_2, -n_2 …: every one is still N(0, I), and two that point apart are seldom both bad. The
    better of a pair gains E|z| = 0.80 std of a linear reward, the better of two draws 0.56."""
    k = jnp.arange(n.shape[0])
    sign = (1 - 2 * (k % 2)).reshape(-1, *([1] * (n.ndim - 1)))
    return sign.astype(n.dtype) * n[k // 2]


def refit(
    m: Float[Array, "k *shape"],
    rewards: Float[Array, " k"],
    mu: Float[Array, "*shape"],
    sigma: Float[Array, "*shape"],
    settings: Settings,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Int[Array, " k"]]:
    """One round: keep the T best of m, fit mu and sigma to them; also the order, best first.

    A reward that is not finite is worse than all others; ties go to the lower index; with fewer than T
    finite rewards mu and sigma stay.

    The floor f. Greedy selection: sigma is at least f. Random selection (`rewards` are then random
    numbers) has learned nothing that it could keep: the fit is pulled to the prior N(0, I) by f,
    mu = (1 - f) mu_elite, sigma = (1 - f) sigma_elite + f. At f = 0 both are the paper's.
    """
    valid = jnp.isfinite(rewards)
    order = jnp.argsort(-jnp.where(valid, rewards, -jnp.inf), stable=True)
    elite = m[order[: settings.elite]]
    mean, std = elite.mean(0), elite.std(0, ddof=int(settings.unbiased))
    a, f = (jnp.asarray(s, m.dtype) for s in (settings.smoothing, settings.sigma_floor))
    mean = a * mean + (1 - a) * mu
    std = a * std + (1 - a) * sigma
    mean = jnp.where(settings.greedy, mean, (1 - f) * mean)
    std = jnp.where(settings.greedy, jnp.maximum(std, f), (1 - f) * std + f)
    enough = valid.sum() >= settings.elite
    return jnp.where(enough, mean, mu), jnp.where(enough, std, sigma), order.astype(jnp.int32)


def search(
    key: Array,
    score_fn: Callable[[Array], Array | tuple[Array, Array]],
    shape: tuple[int, ...],
    settings: Settings,
) -> SearchResult:
    """Search the noise of one step of one sample.

    `score_fn` takes m[K, *shape] to rewards [K], or to (rewards, preference): candidates are then ordered
    within a round by the preference, which need not compare between rounds, while the rewards are what is
    logged and what tells the best of two rounds. Random selection ignores the rewards, in what it keeps
    as in what it returns. With sigma_floor = 1 it is plain noise: every candidate, and the returned
    noise whatever `returns` is, are exactly N(0, I). To that end its mean is returned as
    mu + sigma_floor * sigma * n, which is mu in the paper's setting and a fresh draw at floor 1.

    A search in which too few candidates ever had a finite reward returns plain noise.
    """
    one = lambda m: jax.tree.map(lambda a: a[None], score_fn(m[0]))
    return jax.tree.map(lambda a: a[0], search_many(key[None], one, shape, settings))


def search_many(
    keys: Float[Array, " n"],
    score_fn: Callable[[Array], Array | tuple[Array, Array]],
    shape: tuple[int, ...],
    settings: Settings,
) -> SearchResult:
    """`search` for n samples at once, each with its own key and all leaves with a leading n.

    `score_fn` sees the candidates of all samples together, m[n, K, *shape] to [n, K]: what it calls has one
    batch of n K rows, which lies over devices as any other batch.
    """
    n = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, settings.rounds), shape))(keys)

    def one_round(carry, index):
        m, lot = jax.vmap(lambda key, law: _candidates(key, index, law, shape, settings))(keys, carry[:2])
        scored = score_fn(m)
        rewards, wish = scored if isinstance(scored, tuple) else (scored, scored)
        carry, seen = jax.vmap(lambda *one: _learn(settings, *one))(carry, m, rewards, wish, lot)
        return carry, (*seen, m if settings.keep_candidates else None)

    flat = lambda value: jnp.full(n.shape[:1], value, jnp.float32)
    start = (jnp.zeros_like(n), jnp.ones_like(n), (flat(-jnp.inf), flat(jnp.nan), n))
    (mu, sigma, best), seen = jax.lax.scan(one_round, start, jnp.arange(settings.rounds))
    rewards, order, fitted, kept = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), seen)
    noise = jax.vmap(lambda *one: _returned(settings, *one))(mu, sigma, n, best[2], fitted.any(1))
    return SearchResult(noise, mu, sigma, rewards, order, kept, best[1], best[2])


def _candidates(
    key: Array, index: Array, law: tuple[Array, Array], shape: tuple[int, ...], settings: Settings
) -> tuple[Float[Array, "k *shape"], Float[Array, " k"]]:
    """The candidates of one round of one sample, and the lots of a random selection."""
    noise_key, select_key = jax.random.split(jax.random.fold_in(key, index))
    n = jax.random.normal(noise_key, (settings.candidates, *shape))
    m = propose(*law, pairs(n) if settings.antithetic else n)
    return m, jax.random.uniform(select_key, (settings.candidates,), jnp.float32)


def _learn(settings: Settings, carry, m, rewards, wish, lot):
    """The law and the best after one round of one sample; and (rewards, order, enough to fit?)."""
    mu, sigma, best = carry
    rewards, wish = rewards.astype(jnp.float32), wish.astype(jnp.float32)
    preference = jnp.where(settings.greedy, wish, lot)
    preference = jnp.where(jnp.isfinite(preference), preference, -jnp.inf)
    mu, sigma, order = refit(m, preference, mu, sigma, settings)
    first = order[0]
    known = settings.greedy & jnp.isfinite(preference[first])
    level = jnp.where(known, rewards[first], preference[first])
    best = _better(best, (level, rewards[first], m[first]))
    fitted = jnp.isfinite(preference).sum() >= settings.elite
    return (mu, sigma, best), (rewards, order, fitted)


def _returned(settings: Settings, mu: Array, sigma: Array, n: Array, best: Array, fitted: Array) -> Array:
    """The noise to execute."""
    share = jnp.where(settings.greedy, 0, settings.sigma_floor).astype(n.dtype)
    mean = jnp.where(fitted, mu + share * sigma * n, n)
    noise = jnp.stack([mean, propose(mu, sigma, n), best])[settings.returns]
    return jnp.where(settings.rms, unit_rms(noise), noise)


def unit_rms(m: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """m over its root mean square; zeros stay."""
    square = jnp.mean(m**2)
    return m * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def _better(best, new):
    """The better of two (preference, reward, noise); the earlier one in a tie."""
    return jax.tree.map(lambda old, now: jnp.where(new[0] > best[0], now, old), best, new)
