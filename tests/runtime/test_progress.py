import time

from smart_grpo_jax.runtime import progress


def test_durations_read_like_a_clock():
    cases = {0.2: "0 s", 59.4: "59 s", 59.6: "1m 00s", 184: "3m 04s", 7500: "2h 05m", 273600: "3d 04h"}
    assert {seconds: progress.duration(seconds) for seconds in cases} == cases


def test_the_box_is_closed_and_at_most_100_wide():
    rows = [("model", "x" * 250), ("mesh", "8 × TPU"), ("a name that is much longer than a name", "1")]
    lines = progress.box("smart_grpo_jax: " + "t" * 120, rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 100
    assert lines[0].startswith("╭─ smart_grpo_jax") and lines[-1].endswith("╯")
    assert "".join(lines).count("x") == 250 + lines[0].count("x")
    assert progress.box("empty", []).splitlines()[0] == "╭─ empty ─╮"


def test_the_epoch_line_keeps_the_order_of_its_fields():
    fields = {"reward": 0.41234567, "NFE": 210000, "ckpt": "115 ok"}
    line = progress.epoch_line(120, 2000, fields, 3420.0)
    assert line == "epoch 120/2000 6.0% | reward 0.4123 | NFE 210,000 | ckpt 115 ok | ETA 57m 00s"
    assert progress.epoch_line(1, 4, {}, None) == "epoch 1/4 25.0%"


def test_numbers_in_a_table_stand_to_the_right():
    text = progress.table([("a", 1.5), ("long name", 22)], ("run", "reward"))
    assert text.splitlines() == [
        "run        reward",
        "─────────  ──────",
        "a             1.5",
        "long name      22",
    ]


def test_the_estimate_leaves_out_compilation_and_outliers():
    eta = progress.Eta(100)
    eta.add(60.0)
    assert eta.remaining(1) is None
    for seconds in (2.0, 2.0, 2.0, 50.0, 0.1):
        eta.add(seconds)
    assert eta.remaining(6) == 94 * 2.0
    assert eta.seconds == 60 + 56.1
    assert eta.remaining(100) == 0


def test_the_estimate_goes_on_after_a_restart():
    eta = progress.Eta(10)
    for seconds in (9.0, 1.0, 1.0):
        eta.add(seconds)
    again = progress.Eta(10, carried=eta.state())
    assert (again.seconds, again.remaining(3)) == (11.0, 7.0)
    again.add(30.0)  # compiles again
    assert again.remaining(4) == 6.0


def test_a_quick_body_leaves_no_trace():
    said = []
    with progress.Heartbeat("compiling", every=5.0, say=said.append):
        pass
    assert said == []


def test_a_long_body_gives_signs_of_life_and_an_end():
    said, beats = [], []
    with progress.Heartbeat("compiling rollout", every=0.02, say=said.append, on_beat=beats.append):
        end = time.monotonic() + 120
        while len(beats) < 2 and time.monotonic() < end:
            time.sleep(0.005)
    assert len(beats) >= 2 and beats == sorted(beats)
    assert said[0] == "compiling rollout, 0 s so far"
    assert said[-1].startswith("compiling rollout: done in ")
    assert len(said) == len(beats) + 1


def test_say_writes_at_once_and_survives_a_closed_stream(capsys, monkeypatch):
    progress.say("hello")
    assert capsys.readouterr().out == "hello\n"
    closed = open("/dev/null", "w")
    closed.close()
    monkeypatch.setattr("sys.stdout", closed)
    progress.say("nobody hears this")
