"""Figure 1: whose numbers are drawn, and how methods are told apart."""

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image
from test_report import aimed_run, finished_run

from dhtm.report.figure1 import SERIES, figure1
from dhtm.report.runs import load_runs, published
from dhtm.report.style import METHODS, plt, save_figure

TARGETS = (10.0, 20.0, 30.0, 40.0)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def runs_over_targets(folder, targets=TARGETS, **changes):
    """Runs of every series at every target; top-1 says which series and target."""
    for i, (method, layers, trained, *_) in enumerate(SERIES.values()):
        for j, target in enumerate(targets):
            top1 = 90 - i - j / 10
            listed = layers if layers == "all" else [int(layer) for layer in layers.split(",")]
            numbers = {"top1": top1, "top1_ci95": [top1 - 0.7, top1 + 0.5], "flops_reduction_pct": target + i / 10}
            settings = {"layers": listed, "trained": trained} | numbers | changes
            aimed_run(folder, 100 * i + j + changes.get("n_images", 0), method, target, **settings)
    aimed_run(folder, 900 + changes.get("n_images", 0), "unmerged", top1=95.0, **changes)


def lines_of(ax):
    """Each series' line by its label, and its error bars."""
    return {container.get_label(): container for container in ax.containers}


def test_without_runs_the_papers_points_are_drawn(tmp_path):
    figure = figure1(load_runs(str(tmp_path)))
    (ax,) = figure.axes
    assert ax.get_title().startswith("DeiT-Small, ImageNet-1K: published only")
    drawn = {line.get_label(): line for line in ax.get_lines()}
    dhtm = drawn[SERIES["DHTM"][3] + ", published"]
    table = published("table1").query("backbone == 'deit_small'")
    assert dhtm.get_ydata().tolist() == table.top1.tolist()
    assert dhtm.get_xdata().tolist() == pytest.approx((100 * (1 - table.flops_g / 4.65)).tolist())
    tome = drawn[SERIES["ToMe OTS"][3] + ", published"]
    assert (tome.get_xdata()[0], tome.get_ydata()[0]) == (pytest.approx(29.89, abs=0.01), 79.18)
    assert all(line.get_markerfacecolor() == "none" for label, line in drawn.items() if label.endswith("published"))
    assert not ax.containers, "nothing of ours"


def test_a_panel_has_the_numbers_of_the_runs(tmp_path):
    runs_over_targets(tmp_path)
    finished_run(tmp_path, 5000, k=40, top1=10.0)  # for no target
    figure = figure1(load_runs(str(tmp_path)))
    ax, paper = figure.axes
    assert ax.get_title() == "deit_micro (embedded), digits\n2,000 images, 95% intervals"
    assert paper.get_title().startswith("DeiT-Small, ImageNet-1K: published only")
    drawn = lines_of(ax)
    assert set(drawn) == {label for *_, label, _, _ in SERIES.values()}
    for i, (*_, label, line, marker) in enumerate(SERIES.values()):
        data, _, (bars,) = drawn[label].lines
        assert data.get_xdata().tolist() == pytest.approx([target + i / 10 for target in TARGETS])
        assert data.get_ydata().tolist() == pytest.approx([90 - i - j / 10 for j in range(len(TARGETS))])
        low, high = np.array(bars.get_segments())[0][:, 1]
        assert (low, high) == pytest.approx((90 - i - 0.7, 90 - i + 0.5))
        assert (data.get_linestyle(), data.get_marker()) == (line, marker)
    (unmerged,) = [line for line in ax.get_lines() if len(set(line.get_ydata())) == 1 and line.get_ydata()[0] == 95]
    assert unmerged.get_linewidth() < 1
    picture = np.asarray(Image.open(save_figure(figure, tmp_path / "figure1")).convert("RGB")).astype(int)
    for colour in {METHODS[method][1] for method, *_ in SERIES.values()}:
        rgb = [round(255 * part) for part in matplotlib.colors.to_rgb(colour)]
        assert (abs(picture - rgb).max(-1) < 4).sum() > 50


def test_one_colour_a_method_and_no_two_series_look_alike(tmp_path):
    assert len({colour for _, colour, _ in METHODS.values()}) == len(METHODS)
    assert (METHODS["dhtm"][1], METHODS["random"][1]) == ("#E69F00", "#0072B2")
    runs_over_targets(tmp_path)
    ax, paper = figure1(load_runs(str(tmp_path))).axes
    looks = set()
    for method, _, _, label, _, _ in SERIES.values():
        line = lines_of(ax)[label].lines[0]
        assert line.get_color() == METHODS[method][1]
        looks.add((line.get_color(), line.get_linestyle(), line.get_marker()))
        for other in paper.get_lines():
            if other.get_label() == f"{label}, published":
                assert (other.get_color(), other.get_marker()) == (line.get_color(), line.get_marker())
    assert len(looks) == len(SERIES)


def test_the_legend_has_each_series_once_and_those_off_the_shelf_in_bold(tmp_path):
    runs_over_targets(tmp_path)
    (legend,) = figure1(load_runs(str(tmp_path))).legends
    weights = {text.get_text(): text.get_fontweight() for text in legend.get_texts()}
    assert list(weights) == [label for *_, label, _, _ in SERIES.values()] + ["unmerged", "published"]
    assert [label for label, weight in weights.items() if weight == "bold"] == [
        label for _, _, trained, label, _, _ in SERIES.values() if not trained
    ]


def test_a_panel_needs_three_targets_on_the_same_images(tmp_path):
    runs_over_targets(tmp_path, targets=(20.0, 30.0))
    assert len(figure1(load_runs(str(tmp_path))).axes) == 1
    runs_over_targets(tmp_path, targets=(40.0, 50.0), n_images=1000)  # four targets, but two on each set
    assert len(figure1(load_runs(str(tmp_path))).axes) == 1


def test_deit_small_on_imagenet_shares_the_papers_panel(tmp_path):
    runs_over_targets(tmp_path, targets=(30.0,), backbone="deit_small", data="imagenet", n_images=50_000)
    (ax,) = figure1(load_runs(str(tmp_path))).axes
    assert ax.get_title() == "DeiT-Small, ImageNet-1K\n50,000 images, 95% intervals"
    assert len(ax.containers) == len(SERIES)
    assert sum(line.get_label().endswith("published") for line in ax.get_lines()) == 7


def test_untrained_methods_are_left_out(tmp_path):
    for number, target in enumerate(TARGETS):
        aimed_run(tmp_path, number, "sit", target, untrained=True)
        aimed_run(tmp_path, 10 + number, "dhtm", target)
    ax, _ = figure1(load_runs(str(tmp_path))).axes
    assert list(lines_of(ax)) == [SERIES["DHTM"][3]]
