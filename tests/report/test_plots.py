"""Each plot shows the runs' own numbers, or says why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from iapt.report.cells import gather
from iapt.report.plots import Plot, plots
from iapt.report.runs import read_runs
from tests.report.folders import make_failed, make_run, make_sweep


def drawn(root: Path) -> dict[str, Plot]:
    """By the first word of their names."""
    [board] = gather(read_runs([root]))
    return {plot.name.split("_")[0]: plot for plot in plots(board)}


def test_a_sweep(tmp_path: Path):
    found = drawn(make_sweep(tmp_path))
    assert {name for name, plot in found.items() if plot.figure} == {"learning", "parameters", "cost", "activations"}
    assert found["soft"].reason == "no method ran with two numbers of soft tokens or more"

    left = found["learning"].figure.axes[0]
    assert left.get_title() == "toy/entailment"
    assert len(left.lines) == 6
    assert left.lines[0].get_xydata().tolist() == [[0, 1], [10, 1 / 11], [20, 1 / 21]]

    figure = found["activations"].figure
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 1"]
    x, y = figure.axes[0].lines[2].get_data()
    assert (x[0], x[-1]) == (-2, 3), "over the inputs that were seen"
    denominator = 1 + abs(0.257 * 9 + 0.0017 * 81)
    numerator = -0.004 + 0.5 * 3 + 0.42 * 9 + 0.13 * 27 + 0.017 * 81 + 0.0008 * 243 + 4e-6 * 729
    assert y[-1] == pytest.approx(1.1 * numerator / denominator)


def test_soft_tokens_and_spread(tmp_path: Path):
    for tokens in (2, 4, 8):
        for seed, right in enumerate((10, 12, 16)):
            make_run(
                tmp_path / f"{tokens}-{seed}", method="iapt", seed=seed, right=right + tokens // 4, soft_tokens=tokens,
                settings={"method.num_soft_tokens": tokens}, trainable_params=1000 * tokens,
            )  # fmt: skip
    found = drawn(tmp_path)
    for name, xs in (("soft", [2, 4, 8]), ("parameters", [2000, 4000, 8000])):
        [axes] = found[name].figure.axes
        [bars] = axes.containers
        assert bars.lines[0].get_xdata().tolist() == xs
        assert bars.lines[0].get_ydata().tolist() == pytest.approx([60, 65, 70])
        ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
        assert ends == [pytest.approx(e) for e in ([50, 80], [55, 85], [60, 90])]
        assert bars.get_label() == "iapt"
    assert [label.get_text() for label in found["soft"].figure.axes[0].get_xticklabels()] == ["2", "4", "8"]


def test_cost_shows_time_quality_and_memory(tmp_path: Path):
    for i, memory in enumerate((2**30, 3 * 2**30)):
        make_run(tmp_path / str(i), method=["lora", "iapt"][i], peak_memory_bytes=memory, train_seconds=10.0 + i)
    [axes] = drawn(tmp_path)["cost"].figure.axes
    assert [c.get_offsets().tolist() for c in axes.collections] == [[[10, 75]], [[11, 75]]]
    assert [text.get_text() for text in axes.texts] == ["1.00 GiB", "3.00 GiB"]
    small, large = (c.get_sizes()[0] for c in axes.collections)
    assert small < large


def test_labels_do_not_cover_each_other(tmp_path: Path):
    for i, seconds in enumerate((10.0, 10.1, 20.0)):
        make_run(
            tmp_path / str(i), method=["lora", "dora", "iapt"][i], peak_memory_bytes=(i + 1) * 2**30,
            train_seconds=seconds,
        )  # fmt: skip
    [axes] = drawn(tmp_path)["cost"].figure.axes
    assert [text.get_text() for text in axes.texts] == ["1.00 GiB", "3.00 GiB"]
    assert len(axes.collections) == 3


def test_no_two_of_many_rows_look_alike(tmp_path: Path):
    for i in range(24):
        make_run(tmp_path / str(i), method=f"method-{i}", train_seconds=10.0 + i, trainable_params=1000 + i)
    found = drawn(tmp_path)
    lines = found["learning"].figure.axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 24
    points = found["cost"].figure.axes[0].collections
    assert len({(p.get_facecolor().tobytes(), p.get_paths()[0].vertices.tobytes()) for p in points}) == 24
    bars = [container.lines[0] for container in found["parameters"].figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in bars}) == 24


def test_no_two_seeds_nor_the_start_have_one_colour(tmp_path: Path):
    for seed in range(6):
        make_run(tmp_path / str(seed), method="iapt", seed=seed, learned=True)
    lines = drawn(tmp_path)["activations"].figure.axes[0].lines
    assert len({line.get_color() for line in lines}) == len(lines) == 8  # GELU, the start, six seeds


def test_without_data_every_plot_says_why(tmp_path: Path):
    make_failed(tmp_path / "1")
    found = drawn(tmp_path)
    assert len(found) == 5
    assert all(plot.figure is None and plot.reason for plot in found.values())


def test_fixed_activations_are_no_learned_ones(tmp_path: Path):
    folder = make_run(tmp_path / "1", method="iapt")
    (folder / "activations.json").write_text('{"layers": [{"layer": 0, "activation": "gelu", "inputs": {}}]}')
    assert drawn(tmp_path)["activations"].reason == "the activations were fixed, not learned"
