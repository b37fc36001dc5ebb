"""Figures are drawn from the recorded files alone, and missing records are reported."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

from megatron_evomoe.cli import main
from megatron_evomoe.commands import plot
from megatron_evomoe.config import LogConfig
from megatron_evomoe.diagnose import diagnostics_file, estimates, figures, plots
from megatron_evomoe.diagnose.routing import LogitSample, ShareCounter
from megatron_evomoe.observe import RunLogger


def test_records_come_back_and_later_ones_replace(tmp_path):
    counts = torch.tensor([[[3, 1], [0, 0]]])
    diagnostics_file.write_shares(tmp_path, "route", 10, [1], torch.zeros_like(counts))
    diagnostics_file.write(tmp_path, "route", 10, "other", values=torch.tensor([0.25, 0.5]))
    diagnostics_file.write_shares(tmp_path, "route", 10, [1], counts)
    diagnostics_file.write_shares(tmp_path, "evolve", 10, [1], counts)
    other, route, evolve = diagnostics_file.read(tmp_path)
    assert (other["kind"], other["values"]) == ("other", [0.25, 0.5])
    assert (
        route["counts"] == counts.tolist()
        and route["divergence"] == ["nan"]
        and math.isnan(float(route["divergence"][0]))
    )
    assert evolve["stage"] == "evolve"
    assert [r["stage"] for r in diagnostics_file.read(tmp_path, "shares")] == ["route", "evolve"]
    assert diagnostics_file.read(tmp_path / "none") == []


def test_a_run_that_cannot_be_plotted_is_named(tmp_path, capsys):
    assert main(["plot", "--run", str(tmp_path / "nowhere")]) == 2
    assert f"error: no run directory {tmp_path / 'nowhere'}" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("damaged\n{}\n")
    assert main(["plot", "--run", str(tmp_path)]) == 2
    assert "metrics.jsonl, line 1 is not JSON" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["plot", "--run", str(tmp_path), "--output", str(tmp_path / "file" / "x")]) == 2
    assert "file/x" in capsys.readouterr().err


def test_logits_are_rounded_and_keep_their_shape(tmp_path):
    sample = LogitSample(1, 2, capacity=5)
    sample.add(0, torch.tensor([0, 0, 1]), torch.tensor([[0.123456, 1.0], [0.2, 2.0], [0.3, 3.0]]))
    diagnostics_file.write_logits(tmp_path, "route", 1, [3], sample)
    (record,) = diagnostics_file.read(tmp_path, "logits")
    assert sorted(record["text"][0]) == [[0.1235, 1.0], [0.2, 2.0]] and record["vision"] == [[[0.3, 3.0]]]


def fill(run_dir, *, num_layers=2, experts=4):
    log = RunLogger(LogConfig(log_interval=1000), run_dir, is_main=True, run_name="r", config_dict={})
    for stage, total in (("align", 5), ("route", 8)):
        log.start_stage(stage, total, 0)
        for step in range(1, total + 1):
            log.log(step, {"lm loss": math.nan if step == 3 else 1.0 / step})
        log.event(
            "eval",
            step=total,
            accuracy={"digit": 0.5, "grid": 0.25},
            blind={"grid": 0.1} if stage == "route" else None,
        )
    log.close()
    layers = list(range(1, 2 * num_layers, 2))
    counter, sample = ShareCounter(num_layers, experts), LogitSample(num_layers, experts, capacity=50)
    for layer in range(num_layers):
        logits = torch.randn(100, experts)
        # The last layer receives no image token: its figures lack that modality, and drawing must not fail.
        types = torch.zeros(100) if layer == num_layers - 1 else torch.arange(100) % 2
        counter.add(
            layer, types, torch.zeros(100, experts).scatter(1, logits.argmax(1, keepdim=True), 1).bool()
        )
        sample.add(layer, types, logits)
    diagnostics_file.write_shares(run_dir, "route", 8, layers, counter.counts)
    diagnostics_file.write_logits(run_dir, "route", 8, layers, sample)
    diagnostics_file.write_similarity(
        run_dir, "route", 8, layers, {"weights": torch.eye(experts).expand(num_layers, -1, -1)}
    )


@pytest.mark.parametrize(("num_layers", "experts"), [(2, 4), (1, 1), (3, 9)])
def test_every_figure_is_drawn_from_the_run_directory(tmp_path, capsys, monkeypatch, num_layers, experts):
    torch.manual_seed(0)
    # With 3 layers some are left out. Few panels keep the test quick.
    monkeypatch.setattr(figures, "MOST_LAYERS", 2)
    monkeypatch.setattr(figures, "STYLE", {**figures.STYLE, "figure.dpi": 50})
    fill(tmp_path / "run", num_layers=num_layers, experts=experts)
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    assert plot.run(parser.parse_args(["--run", str(tmp_path / "run")])) == 0
    names = {"loss.png", "modality_share.png", "router_logits.png", "expert_similarity.png"}
    written = {p.name: p for p in (tmp_path / "run/figures").iterdir()}
    assert set(written) == names and "skipped" not in capsys.readouterr().out
    assert all(p.read_bytes()[:4] == b"\x89PNG" and p.stat().st_size > 2000 for p in written.values())


def test_what_is_missing_is_skipped_with_its_reason(tmp_path, capsys):
    args = argparse.Namespace(run=str(tmp_path), output=str(tmp_path / "out"))
    assert plot.run(args) == 1
    out = capsys.readouterr().out
    assert out.count("skipped") == 4 and "no 'lm loss'" in out and "no 'shares' record" in out
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"stage": "align", "step": 1, "lm loss": 1.0}) + "\n")
    assert plots.plot_all(tmp_path, tmp_path / "out") == [tmp_path / "out/loss.png"]
    with pytest.raises(FileNotFoundError, match="no run directory"):
        plots.plot_all(tmp_path / "nowhere", tmp_path)


def test_stages_stand_in_a_row_and_evaluations_on_their_steps(tmp_path, monkeypatch):
    fill(tmp_path)
    seen = {}
    monkeypatch.setattr(
        figures,
        "loss_curves",
        lambda stages, evaluations: seen.update(stages=stages, evaluations=evaluations),
    )
    plots.draw_loss(tmp_path)
    assert [(s["name"], s["start"], s["steps"][-1]) for s in seen["stages"]] == [
        ("align", 0, 5),
        ("route", 5, 8),
    ]
    assert [(e["x"], e["blind"]) for e in seen["evaluations"]] == [(5, {}), (13, {"grid": 0.1})]
    assert seen["evaluations"][0]["accuracy"] == {"digit": 0.5, "grid": 0.25}


def test_density_integrates_to_one_and_peaks_where_values_are():
    grid = np.linspace(-6, 6, 1201)
    values = np.random.default_rng(0).normal(1.0, 1.0, 2000)
    found = estimates.density(values, grid)
    assert found.sum() * (grid[1] - grid[0]) == pytest.approx(1.0, abs=1e-3)
    # The mode of a kernel estimate varies with the sample; its mean does not.
    assert grid[found.argmax()] == pytest.approx(1.0, abs=0.4)
    assert (found * grid).sum() / found.sum() == pytest.approx(values.mean(), abs=1e-3)
    # Equal values give a narrow peak and no division by zero.
    assert estimates.density(np.full(5, 2.0), grid).max() > 10
    assert not estimates.density(np.array([]), grid).any()


def test_smoothing_averages_neighbours_and_steps_over_nan():
    assert estimates.smooth(np.array([1.0, 2, 6, 3])).tolist() == [1.5, 3, pytest.approx(11 / 3), 4.5]
    assert estimates.smooth(np.array([1.0, math.nan, 3]))[1] == 2.0
    assert np.isnan(estimates.smooth(np.array([math.nan, math.nan]))).all()


def test_spread_keeps_both_ends():
    assert figures.spread(3, 6) == [0, 1, 2]
    assert figures.spread(12, 6) == [0, 2, 4, 7, 9, 11]
