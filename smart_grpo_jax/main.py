"""The one entry point: `python -m smart_grpo_jax.main --config=FILE [--mode=M] [--config.a.b=v]`.

The config is read and checked before jax looks at a device, so that a mistake costs one line and a second.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from smart_grpo_jax.core import config as configs
from smart_grpo_jax.core.config import Config
from smart_grpo_jax.core.errors import UserError, nearest
from smart_grpo_jax.flags import Flags, parse

USAGE = """python -m smart_grpo_jax.main --config=FILE[:WORDS] [--workdir=DIR] [--mode=M] [--config.a.b=v …]

modes:
  train     (default) train, evaluate, write report.html; the same command again goes on where it stopped
            (--profile keeps a trace of the third epoch, --profile=N of epoch N)
  eval      newest checkpoint of --workdir against the base, on equal noise      [--epoch=N]
  sample    pictures: --prompts="a|b" or --prompts=FILE  [--seed=N] [--seeds=N] [--size=H or HxW] [--steps=N]
            [--guidance=G] [--lora=FILE or DIR] [--batch=N] [--epoch=N] [--out=DIR]
            (--config.eval.search=true searches the noise while sampling)
  export    a checkpoint for diffusers, peft and JAX  [--format=lora|full|orbax|all] [--weights=ema|raw]
            [--epoch=N] [--out=DIR]
  pretrain  make the embedded world's pipeline from nothing                      [--out=DIR]
  rewards   ask the config's rewards:
            --check  do they give the originals' scores, and are they fit to train on  [--examples=FILE]
            --bench  images/s, model FLOPs utilisation, compile time and memory of each
            --audit  at which steps the search pays: table, audit.json, audit.svg in --workdir
  plan      does the config fit a slice, and what would an epoch cost: --topology=v5e:4x4 | v5p-16 | cpu:8 |
            gpu:h200:8  [--exact] [--json=FILE] (and FILE.svg); needs no device and no weights
            --sweep=v5e:2x4,v5e:4x4@fsdp=4  compares slices and meshes
  report    write report.html again from what the run folder holds
  compare   RUN RUN … (folders, globs, results files): at equal epochs, cost and time, with intervals
            [--against=ARM] [--costs=FILE] [--out=DIR] [--reference=FILE] [--expect=FILE] [--results=FILE]
  experiment  --config=configs/paper/NAME.py[:sd35]: all its runs, then compare  [--arms=A,B] [--seeds=N]
            [--seed=FIRST] [--dry-run] [--costs=FILE] [--results=FILE]
            (runs that FILE holds are not run again, new ones are added to it)
  doctor    what this machine has, and a self-test of a second
Every field of the config is in docs/config.md."""


def main(argv: Sequence[str]) -> int:
    """Run a job; returns the exit code, having printed one line where something was wrong."""
    try:
        flags = parse(argv, MODES)
        if flags.help:
            print(USAGE)
            return 0
        config = load_config(flags)
        MODES[flags.mode](config, flags, argv)
        return 0
    except UserError as error:
        print(error.line, file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 75


def load_config(flags: Flags) -> Config:
    """The config file's `get_config()`, the overrides of the command line, checked."""
    if flags.config is None:
        if flags.mode not in NEED_NO_CONFIG:
            raise UserError("--config: is missing, wanted a file such as configs/shapes.py")
        values = configs.default()
    else:
        values = run_file(flags.config)
    for name, text in flags.overrides:
        configs.override(values, name, text)
    config = configs.from_dict(values)
    if flags.mode in CHECKED:
        from smart_grpo_jax.jobs import check

        check.check(config)
    return config


def run_file(given: str) -> ConfigDict:
    """The ConfigDict that a config file makes; whatever goes wrong in it is one line.

    `FILE:words` hands the words to its `get_config`, as ml_collections' flags do.
    """
    path, words, colon = config_words(given)
    if not os.path.isfile(path):
        near = nearest(path, [str(p) for p in Path("configs").glob("*.py")] or ["configs/shapes.py"])
        raise UserError(f"--config: no file {path} ({near})")
    try:
        names = runpy.run_path(path)
        values = names["get_config"](*([words] if colon else [])) if "get_config" in names else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config: {path} failed: {type(error).__name__}: {error}") from None
    if "get_config" not in names:
        raise UserError(f"--config: {path} has no function get_config()")
    if not isinstance(values, ConfigDict):
        raise UserError(f"--config: {path} get_config() gave {type(values).__name__}, wanted a ConfigDict")
    return values


def config_words(given: str) -> tuple[str, str, bool]:
    """`FILE:words` → the file, the words, and whether there is a colon (a file's name may hold one, too)."""
    if os.path.isfile(given) or ":" not in given:
        return given, "", False
    path, _, words = given.rpartition(":")
    return path, words, True


def workdir(flags: Flags) -> str:
    """The run folder: given, or runs/<config name>."""
    name = Path(flags.config or "default").name.replace(".py", "")
    return flags.workdir or str(Path("runs") / name.replace(":", "-").replace(",", "-"))


def _start() -> None:
    """What every job on a device needs first."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not any(any(Path("/dev").glob(name)) for name in ("nvidia*", "accel*", "vfio")):
        # On CPU alone LLVM's first level compiles sooner and runs these programs no slower.
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_backend_optimization_level" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=1".strip()
    from smart_grpo_jax.runtime import compile_cache, distributed, tpu_options

    os.environ[tpu_options.VARIABLE] = tpu_options.init_args(os.environ.get(tpu_options.VARIABLE, ""))
    compile_cache.enable()
    distributed.initialise()


def _settled(config: Config) -> Config:
    """After `_start`: numbers in the place of `auto`."""
    from smart_grpo_jax.jobs import settle

    return settle.settled(config)


def _train(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import train

    command = ["python", "-m", "smart_grpo_jax.main", *argv]
    train.job(_settled(config), workdir(flags), command, flags.profile)


def _eval(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import evaluate

    evaluate.job(_settled(config), workdir(flags), flags.epoch)


def _sample(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import sample

    wanted = sample.Wanted(
        prompts=flags.prompts,
        seed=flags.seed,
        seeds=1 if flags.seeds is None else flags.seeds,
        size=sample.pixels(flags.size),
        steps=flags.steps,
        guidance=flags.guidance,
        lora=flags.lora,
        batch=flags.batch,
        epoch=flags.epoch,
        out=flags.out,
    )
    sample.job(_settled(config), workdir(flags), wanted)


def _export(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import export

    export.job(
        _settled(config),
        workdir(flags),
        epoch=flags.epoch,
        weights=flags.weights,
        form=flags.format,
        out=flags.out,
    )


def _pretrain(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import pretrain, pretrain_rewards

    parts = {"pipeline": pretrain.job, "rewards": pretrain_rewards.job}
    parts[config.pretrain.part](config, flags.out or workdir(flags))


def _rewards(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import rewards

    rewards.job(_settled(config), workdir(flags), flags.switches, flags.examples)


def _plan(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    from smart_grpo_jax.jobs import plan, plan_sweep

    exact = "exact" in flags.switches
    if flags.sweep:
        plan_sweep.job(config, flags.sweep, exact, flags.json)
        return
    if flags.topology is None:
        raise UserError("--topology: is missing, wanted a slice such as v5e:4x4, cpu:8 or gpu:h200:8")
    plan.job(config, flags.topology, exact, flags.json)


def _report(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    from smart_grpo_jax.jobs import report

    print(report.write(Path(workdir(flags))))


def _compare(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    from smart_grpo_jax.jobs import compare

    compare.job(
        flags.runs,
        against=flags.against,
        costs=flags.costs,
        out=flags.out,
        reference=flags.reference,
        results=flags.results,
        expect=flags.expect,
    )


def _experiment(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the runs need the accelerator; this process only counts
    from smart_grpo_jax.jobs import experiment

    if flags.config is None:
        raise UserError("--config: is missing, wanted an experiment such as configs/paper/table1.py")
    path, words, _ = config_words(flags.config)
    experiment.job(
        path,
        words,
        Path(flags.workdir or "runs/experiments"),
        seeds=flags.seeds,
        first=flags.seed,
        arms=flags.arms.split(",") if flags.arms else (),
        overrides=flags.overrides,
        dry="dry-run" in flags.switches,
        costs=flags.costs,
        results=flags.results,
    )


def _doctor(config: Config, flags: Flags, argv: Sequence[str]) -> None:
    _start()
    from smart_grpo_jax.jobs import doctor

    doctor.job()


MODES: dict[str, Callable[[Config, Flags, Sequence[str]], Any]] = {
    "train": _train,
    "eval": _eval,
    "sample": _sample,
    "export": _export,
    "plan": _plan,
    "pretrain": _pretrain,
    "rewards": _rewards,
    "report": _report,
    "compare": _compare,
    "experiment": _experiment,
    "doctor": _doctor,
}
CHECKED = ("train", "eval", "sample", "export", "rewards")
NEED_NO_CONFIG = ("doctor", "pretrain", "report", "sample", "compare", "experiment")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
