"""The tables of docs/tpu.md: their rows, their markers, and what they ask for."""

import pytest

from benchmarks import paper_plans, plan_table, weak_scaling
from smart_grpo_jax.jobs import microbatch, plan
from smart_grpo_jax.runtime import aot
from smart_grpo_jax.runtime.topologies import GIB
from tests.jobs.test_microbatch import PRINT


def page(tmp_path, begin, end):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    return path


def compiler(seen, sent):
    """A stand-in: programs of 2 GiB, and `sent(config, chips)` bytes."""

    def ask(config, topology, program):
        seen.append((config, topology.name, program))
        images = config.prompts.groups * config.prompts.members
        found = {"times": 1, "peak_bytes": 2.0 * GIB, "flops": 1e15 * images, "images": images}
        return aot.Outcome(aot.FITS, found | {"sent_bytes": sent(topology.chips)})

    return ask


@pytest.fixture
def asked(monkeypatch):
    """What the stand-in was asked, where footprints are wanted, too."""
    seen = []
    inner = compiler(seen, lambda chips: {"fsdp": 1e9})

    def ask(config, topology, program):
        if program == "footprint":
            return aot.Outcome(aot.FITS, {"footprint": PRINT.as_dict()})
        return inner(config, topology, program)

    monkeypatch.setattr(plan, "asker", lambda exact, out: ask)
    monkeypatch.setattr(plan, "compiled_for", lambda topology: True)
    return seen


def test_the_papers_lines_are_rows_once_however_many_experiments_have_them(tmp_path, asked):
    path = page(tmp_path, paper_plans.BEGIN, paper_plans.END)
    shared = [f"--folder={tmp_path / 'rows'}", f"--page={path}", "--only=table1", "--only=figure2b"]
    assert paper_plans.main(shared) == 0
    table = [line for line in path.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in table] == [
        "| table1:flow_grpo, figure2b:flow_grpo",
        "| table1:smart_grpo, figure2b:greedy",
        "| table1:windowed",
        "| table1:windowed_searched",
        "| figure2b:random",
    ]
    assert {config.train.epochs for config, *_ in asked} == {360, 720}
    count = len(asked)
    assert paper_plans.main(shared) == 0 and len(asked) == count
    assert [line for line in path.read_text().splitlines() if line.startswith("| ")][1:] == table
    assert paper_plans.main([*shared, "--slice=v5e-16"]) == 0
    assert path.read_text().count("table1:smart_grpo") == 2
    assert paper_plans.main([f"--folder={tmp_path / 'none'}", f"--page={path}", "--minutes=0"]) == 1


def test_the_table_holds_the_cells_that_are_done_and_goes_on(tmp_path, asked):
    path = page(tmp_path, plan_table.BEGIN, plan_table.END)
    elsewhere = "| FLUX.1-dev | Flow-GRPO | v5p-8 | 4 | of another machine |"
    path.write_text(
        path.read_text().replace("old", f"| old |\n{elsewhere}\n| SD3.5-M | Flow-GRPO | v5e-16 | old |")
    )
    shared = [f"--folder={tmp_path / 'cells'}", f"--page={path}"]
    assert plan_table.main([*shared, "--only=sd35_medium", "--only=flow_grpo", "--only=v5e-16"]) == 0
    assert plan_table.main([*shared, "--only=sd35_medium", "--only=smart_grpo", "--only=v5e-16"]) == 0
    text = path.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| SD3.5-M")]
    assert [row.split(" | ")[1:5] for row in rows] == [
        ["Flow-GRPO", "v5e-16", "16", "yes"], ["Smart-GRPO", "v5e-16", "16", "yes"],
    ]  # fmt: skip
    assert text.splitlines()[-3] == elsewhere
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    first, last = asked[0][0], asked[-1][0]
    assert (
        first.search.rounds == 0
        and last.search.rounds == 5
        and set(last.rewards) == {"image_reward", "aesthetic"}
    )
    assert not microbatch.automatic(last) and last.model.resolution == 512 and last.adapter.kind == "lora"
    with pytest.raises(SystemExit, match="wanted one of"):
        plan_table.main([*shared, "--only=v9"])
    assert plan_table.main([f"--folder={tmp_path / 'none'}", f"--page={path}", "--minutes=0"]) == 1


@pytest.mark.parametrize(("growth", "code"), [(0.0, 0), (0.1, 1)])
def test_weak_scaling_keeps_the_work_per_chip_and_notices_growing_traffic(
    tmp_path, monkeypatch, growth, code
):
    """8 chips are one copy and have no data axis; 16 to 256 chips may differ by 5 %."""
    seen = []
    sent = lambda chips: {"fsdp": 1e11, "data": 1e9 * (chips > 8) * (1 + growth * chips)}
    monkeypatch.setattr(plan, "asker", lambda exact, out: compiler(seen, sent))
    monkeypatch.setattr(plan, "compiled_for", lambda topology: True)
    path = page(tmp_path, weak_scaling.BEGIN, weak_scaling.END)
    arguments = [f"--folder={tmp_path}", f"--page={path}", "--fsdp=8"]
    assert weak_scaling.main(arguments) == code
    rollouts = [(config, name) for config, name, program in seen if program == "rollout"]
    chips = [8, 16, 64, 256]
    assert [config.prompts.groups for config, _ in rollouts] == chips
    for (config, _), count in zip(rollouts, chips, strict=True):
        assert (
            config.memory.train == 10 * count
            and config.search.chunk == count
            and config.memory.decode == 4 * count
        )
    rows = [line for line in path.read_text().splitlines() if line.startswith("| v5e:")]
    assert len(rows) == 4 and rows[0].endswith("| 100.0 % |")
