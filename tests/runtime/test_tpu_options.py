"""Options of the TPU compiler: ours are added, the user's own stay."""

from smart_grpo_jax.runtime import aot, topologies, tpu_options

SPARSE = "--xla_tpu_offload_gather_to_sparsecore"


def test_ours_are_added_and_may_be_unknown_to_another_libtpu():
    words = tpu_options.init_args("").split()
    assert {word.split("=")[0] for word in words} == {*(f"--{n}" for n in tpu_options.OPTIONS), "--undefok"}
    assert words[-1] == f"--undefok={','.join(tpu_options.OPTIONS)}"


def test_what_the_user_says_counts():
    words = tpu_options.init_args(f"--a=1 {SPARSE}=true").split()
    assert words[:2] == ["--a=1", f"{SPARSE}=true"] and sum(word.startswith(SPARSE) for word in words) == 1
    whole = tpu_options.init_args("")
    assert tpu_options.init_args(whole) == whole
    assert tpu_options.init_args("--undefok=b").count("--undefok") == 1


def test_the_child_of_a_plan_has_them(monkeypatch):
    monkeypatch.setenv(tpu_options.VARIABLE, "--a=1")
    env = aot.environment(topologies.parse("v6e:2x2"), exact=False)
    assert env[tpu_options.VARIABLE] == tpu_options.init_args("--a=1")
    assert env[tpu_options.VARIABLE].startswith("--a=1 ")
