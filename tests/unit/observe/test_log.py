"""Every output of the logger, and the effect of a resume on each."""

import importlib.util
import io
import json
import math
import sys
import time

import pytest
import torch

from megatron_evomoe.config import LogConfig
from megatron_evomoe.observe import RunLogger, console, jsonl
from tests.faults import failing, matching


def logger(run_dir, *, is_main=True, wandb_run_id=None, **config):
    return RunLogger(
        LogConfig(**config),
        run_dir,
        is_main=is_main,
        run_name="run",
        config_dict={"a": {"b": 1}},
        wandb_run_id=wandb_run_id,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path):
    return [(r["stage"], r["step"]) for r in lines(path)]


def run_stage(log, name, total, start=0):
    log.start_stage(name, total, start)
    for step in range(start + 1, total + 1):
        log.log(step, {"lm loss": 1 / step})


def test_metrics_keep_every_digit_and_stay_valid_json(tmp_path):
    log = logger(tmp_path)
    log.start_stage("align", 10, 0)
    metrics = {"lm loss": 0.1 + 0.2, "grad-norm": torch.tensor(math.inf), "bad": -math.inf, "none": None}
    log.log(1, metrics, {"keys": ["a/1"], "x": math.nan})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert record.pop("time") == pytest.approx(time.time(), abs=60)
    assert record == {
        "step": 1,
        "stage": "align",
        "lm loss": 0.30000000000000004,
        "grad-norm": "inf",
        "bad": "-inf",
        "samples": {"keys": ["a/1"], "x": "nan"},
    }
    assert float(record["grad-norm"]) == math.inf


def test_a_resumed_file_has_the_steps_of_an_unbroken_one(tmp_path):
    unbroken = logger(tmp_path / "a")
    run_stage(unbroken, "align", 3)
    run_stage(unbroken, "warmup", 5)
    unbroken.close()

    broken = logger(tmp_path / "b")
    run_stage(broken, "align", 3)
    run_stage(broken, "warmup", 4)
    with (tmp_path / "b/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "stage": "warm')  # killed while writing
    (tmp_path / "b/diagnostics.jsonl").write_text(
        '{"stage": "warmup", "step": 1}\n{"stage": "warmup", "step": 2}\n'
    )
    resumed = logger(tmp_path / "b")
    resumed.rewind("warmup", 2)
    run_stage(resumed, "warmup", 5, start=2)
    resumed.close()
    assert steps(tmp_path / "b/metrics.jsonl") == steps(tmp_path / "a/metrics.jsonl")
    # The diagnostics of step 2 are measured again after the resume.
    assert [r["step"] for r in lines(tmp_path / "b/diagnostics.jsonl")] == [1]


def test_appending_to_a_cut_off_file_loses_only_the_cut_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "2" * 200_000)
    assert list(jsonl.read(path)) == [{"a": 1}]
    jsonl.append(path, {"a": 3})
    assert lines(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a": ')
    jsonl.append(path, {"a": 4})
    assert lines(path) == [{"a": 4}]


@pytest.mark.parametrize("room", [0, 5])
def test_a_full_disk_loses_no_line_and_is_said_once(tmp_path, caplog, room):
    """Lines wait in memory, whole and in order.

    The disk accepts either nothing of a line or only its first bytes.
    """
    full = False

    class Disk(io.FileIO):
        def write(self, data):
            if not full:
                return super().write(data)
            if room and self.tell() == end:
                return super().write(data[:room])
            raise OSError(28, "No space left on device")

    log = logger(tmp_path)
    log._metrics._file = Disk(tmp_path / "metrics.jsonl", "a")
    log.start_stage("align", 9, 0)
    for step in range(1, 10):
        full, end = step in (3, 4, 5, 8, 9), (tmp_path / "metrics.jsonl").stat().st_size
        log.log(step, {"lm loss": 1 / step})
        assert len(lines(tmp_path / "metrics.jsonl")) == (2 if full and step < 8 else min(step, 7))
        assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    end = (tmp_path / "metrics.jsonl").stat().st_size
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [("align", step) for step in range(1, 8)]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4, said
    assert "kept in memory" in said[0] and "written again; 4 lines" in said[1] and "lacks 2 lines" in said[3]


def test_a_line_that_must_be_written_raises(tmp_path):
    with failing(matching("x.jsonl"), tmp_path), pytest.raises(OSError, match="No space left"):
        jsonl.append(tmp_path / "x.jsonl", {"a": 1})


def test_a_sink_that_fails_does_not_end_the_run(tmp_path, caplog):
    class Sink:
        def log(self, step, numbers):
            raise OSError(28, "No space left on device")

        start_stage = close = log

    log = logger(tmp_path)
    log._sinks.append(sink := Sink())
    sink.close = lambda: sink.log(0, {})
    run_stage(log, "align", 3)
    log.close()
    assert len(steps(tmp_path / "metrics.jsonl")) == 3
    assert sum("Sink failed" in record.getMessage() for record in caplog.records) == 1


def test_a_damaged_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(jsonl.read(path))


def test_plain_console_lines_at_the_interval_and_the_end(tmp_path, capsys):
    log = logger(tmp_path, log_interval=2)
    log.start_stage("align", 5, 0)
    for step in range(1, 6):
        log.log(step, {"lm loss": 1.2344, "learning-rate": 9.9e-4, "grad-norm": 0.531, "tokens/s": 12_345.0})
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in out] == ["[align 2/5", "[align 4/5", "[align 5/5"]
    assert out[2] == "[align 5/5] lm loss 1.234 | lr 9.9e-04 | grad-norm 0.53 | 12.3k tokens/s | eta 0:00"


def test_the_terminal_shows_one_live_line_and_rich_tables(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    report = console.ConsoleReport(1)
    assert report.is_live
    report.start_stage("route", 4, 0)
    report.step(4, {"lm loss": 1.5, "tokens/s": 2e6, "grad-norm": 1.0})
    report.say("saved [bold]")
    report.stop()
    report.table("T", ["a"], [[1.0]])
    text = stream.getvalue()
    assert (
        "route" in text
        and "4/4" in text
        and "lm loss 1.500" in text
        and "2.0M tokens/s" in text
        and "eta 0:00" in text
    )
    assert "saved [bold]" in text and "┏" in text and "grad-norm" not in text


def test_tables_are_aligned_and_kept(tmp_path, capsys):
    log = logger(tmp_path)
    log.table("Stages", ["stage", "loss"], [["align", 1.23456], ["warmup-long", None], ["x", 12.0]])
    with pytest.raises(ValueError, match="2 columns"):
        log.table("Stages", ["stage", "loss"], [["align"]])
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "Stages",
        "stage         loss",
        "-----------  -----",
        "align        1.235",
        "warmup-long      –",
        "x               12",
    ]
    (kept,) = lines(tmp_path / "tables.jsonl")
    assert kept["columns"] == ["stage", "loss"] and kept["rows"] == [
        ["align", 1.23456],
        ["warmup-long", None],
        ["x", 12.0],
    ]


def test_events_carry_the_stage(tmp_path):
    log = logger(tmp_path)
    log.event("start", world=2)
    log.start_stage("evolve", 3, 0)
    log.event("eval", step=3, accuracy={"digit": torch.tensor(0.5)})
    log.close()
    first, second = lines(tmp_path / "events.jsonl")
    assert first["event"] == "start" and "stage" not in first and first["world"] == 2
    assert (second["stage"], second["step"], second["accuracy"]) == ("evolve", 3, {"digit": 0.5})


def test_other_ranks_touch_nothing(tmp_path, capsys):
    run_dir = tmp_path / "run"
    log = logger(
        run_dir, is_main=False, wandb_project="p", tensorboard_dir=str(tmp_path / "tb"), wandb_run_id="abc"
    )
    run_stage(log, "align", 3)
    log.rewind("align", 1)
    log.event("x")
    log.table("t", ["a"], [[1]])
    log.say("x")
    log.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "" and log.wandb_run_id == "abc"


def test_metrics_that_would_overwrite_the_line_or_are_no_numbers_are_refused(tmp_path):
    log = logger(tmp_path)
    log.start_stage("align", 3, 0)
    with pytest.raises(ValueError, match="'step'"):
        log.log(1, {"step": 3})
    with pytest.raises(ValueError, match="'text' is a str"):
        log.log(1, {"text": "a"})
    log.close()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_has_one_run_per_stage(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The second run resumes at step 2, although the first one wrote up to step 4.
    for start in (0, 2):
        log = logger(tmp_path, tensorboard_dir=str(tmp_path / "tb"))
        run_stage(log, "align", 4, start)
        log.close()
    events = EventAccumulator(str(tmp_path / "tb/align")).Reload()
    assert [e.step for e in events.Scalars("lm loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("package", "config"),
    [("wandb", {"wandb_project": "p"}), ("torch.utils.tensorboard", {"tensorboard_dir": "tb"})],
)
def test_a_missing_package_names_the_remedy(tmp_path, monkeypatch, package, config):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        RuntimeError, match=r"pip install (wandb|tensorboard), or unset --(wandb-project|tensorboard-dir)"
    ):
        logger(tmp_path, **config)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_resumes_under_the_id_of_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    first = logger(tmp_path, wandb_project="p")
    run_stage(first, "align", 2)
    first.close()
    run_id = first.wandb_run_id
    assert run_id
    second = logger(tmp_path, wandb_project="p", wandb_run_id=run_id)
    run_stage(second, "align", 3, start=2)
    second.close()
    assert second.wandb_run_id == run_id
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    # wandb appends -1 to the name if two runs start within a second.
    assert runs and all(run_id in r.name for r in runs)
    off = logger(tmp_path)
    off.close()
    assert off.wandb_run_id is None  # wandb is off by default
