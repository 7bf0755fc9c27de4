"""Figures 1 and 4: the numbers that they show, and how they distinguish methods."""

import matplotlib.colors
import numpy as np
import pytest
from made_up import KS, write_run, write_solved_run
from PIL import Image

from dhtm.report.figures import figure1, figure4
from dhtm.report.registry import METHODS, SERIES
from dhtm.report.runs import load_runs, read_published
from dhtm.report.style import plt, save_figure

TARGETS = (10.0, 20.0, 30.0, 40.0)
DRAWN = {series.label: series for series in SERIES.values() if series.label}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def runs_over_targets(folder, targets=TARGETS, **changes):
    """Write a run of every series at every target, with a top-1 that identifies both; return all runs."""
    for i, series in enumerate(DRAWN.values()):
        for j, target in enumerate(targets):
            top1 = 90 - i - j / 10
            layers = "all" if series.layers == "all" else [int(layer) for layer in series.layers.split(",")]
            numbers = {"top1": top1, "top1_ci95": [top1 - 0.7, top1 + 0.5], "flops_reduction_pct": target + i / 10}
            kl = None if series.trained else 0.01 * (i + 1) * (j + 1)
            settings = {"layers": layers, "trained": series.trained, "kl": kl} | numbers | changes
            write_solved_run(folder, 100 * i + j, series.method, target, **settings)
    write_solved_run(folder, 99_000, "unmerged", top1=95.0, **changes)
    return load_runs(folder)


def lines_of(ax):
    """Return the line and error bars of each series, by its label."""
    return {container.get_label(): container for container in ax.containers}


def check_colours(figure, path, methods):
    """Save a figure and check that each method's colour is among its pixels."""
    pixels = np.asarray(Image.open(save_figure(figure, path)).convert("RGB")).astype(np.int16)
    for method in methods:
        rgb = [round(255 * part) for part in matplotlib.colors.to_rgb(METHODS[method].colour)]
        assert (abs(pixels - np.array(rgb, dtype=np.int16)).max(-1) < 4).sum() > 50


def test_figure_1_shows_the_numbers_of_the_runs(tmp_path):
    write_run(tmp_path, 5000, k=40, top1=10.0)  # not solved for a target
    figure = figure1(runs_over_targets(tmp_path))
    ax, ax_kl, paper, zoom = figure.axes
    assert ax.get_title() == "deit_micro (embedded), digits\n2,000 images, 95% intervals"
    drawn, styles = lines_of(ax), set()
    kls = {label: bars.lines[0].get_ydata().tolist() for label, bars in lines_of(ax_kl).items()}
    assert drawn.keys() == DRAWN.keys()
    for i, (label, series) in enumerate(DRAWN.items()):
        line, _, (bars,) = drawn[label].lines
        assert line.get_xdata().tolist() == pytest.approx([target + i / 10 for target in TARGETS])
        assert line.get_ydata().tolist() == pytest.approx([90 - i - j / 10 for j in range(len(TARGETS))])
        low, high = np.array(bars.get_segments())[0][:, 1]
        assert (low, high) == pytest.approx((90 - i - 0.7, 90 - i + 0.5))
        assert line.get_color() == METHODS[series.method].colour
        styles.add((line.get_color(), line.get_linestyle(), line.get_marker()))
        kl = [] if series.trained else [0.01 * (i + 1) * (j + 1) for j in range(len(TARGETS))]
        assert kls[label] == pytest.approx(kl), "trained models have no KL"
    assert len(styles) == len(DRAWN), "every series has its own style"
    assert lines_of(zoom).keys() == DRAWN.keys() and zoom.get_ylim() == (93, 96)
    (text,) = figure.texts
    caption = text.get_text().replace("\n", " ")
    assert "DPC-KNN changes the outputs least (KL 0.12 nats, top-1 86.8%), DHTM+ threshold most" in caption
    assert 95 in [line.get_ydata()[0] for line in ax.get_lines() if len(set(line.get_ydata())) == 1], (
        "the unmerged model is a horizontal line"
    )
    check_colours(figure, tmp_path / "figure1", {series.method for series in DRAWN.values()})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*DRAWN, "unmerged", "published"]
    bold = [text.get_text() for text in legend.get_texts() if text.get_fontweight() == "bold"]
    assert bold == [label for label, series in DRAWN.items() if not series.trained], "methods off the shelf are bold"

    assert paper.get_title().startswith("DeiT-Small, ImageNet-1K: published only")
    published = {line.get_label(): line for line in paper.get_lines()}
    dhtm, tome = (published[SERIES[name].label + ", published"] for name in ("DHTM", "ToMe OTS"))
    table = read_published("table1").query("backbone == 'deit_small'")
    assert dhtm.get_ydata().tolist() == table.top1.tolist()
    assert dhtm.get_xdata().tolist() == pytest.approx((100 * (1 - table.flops_g / 4.65)).tolist())
    assert (tome.get_xdata()[0], tome.get_ydata()[0]) == (pytest.approx(29.89, abs=0.01), 79.18)
    assert not paper.containers, "none of our runs"


def test_every_method_has_its_own_colour():
    assert len({entry.colour for entry in METHODS.values()}) == len(METHODS)
    assert (METHODS["dhtm"].colour, METHODS["random"].colour) == ("#E69F00", "#0072B2"), "as in the paper"


def test_deit_small_on_imagenet_is_drawn_in_the_papers_panel(tmp_path):
    runs = runs_over_targets(tmp_path, targets=(30.0,), backbone="deit_small", data="imagenet", n_images=50_000)
    ax, _ = figure1(runs).axes  # top-1 and KL, which takes the place of the close-up
    assert ax.get_title() == "DeiT-Small, ImageNet-1K\n50,000 images, 95% intervals"
    assert len(ax.containers) == len(DRAWN)
    assert sum(line.get_label().endswith("published") for line in ax.get_lines()) == 7


def test_unknown_methods_are_drawn_and_untrained_ones_are_not(tmp_path):
    for number, target in enumerate(TARGETS):
        write_solved_run(tmp_path, number, "sit", target, untrained=True, kl=3.0)
        write_solved_run(tmp_path, 10 + number, "dhtm", target, kl=0.1)
        write_solved_run(tmp_path, 20 + number, "own", target, trained=True)
    figure = figure1(load_runs(tmp_path))
    ax, _, _ = figure.axes  # no close-up, because there is no unmerged run
    assert list(lines_of(ax)) == [SERIES["DHTM"].label, "own (trained)"]
    assert "sit" not in figure.texts[0].get_text()


def test_figure_4_has_panels_for_each_backbone_and_data_set(tmp_path):
    for number, k in enumerate(KS):
        write_run(tmp_path, number, k=k, kl=k / 1000)
        write_run(tmp_path, 100 + number, k=k, method="random", top1=80.0, top1_ci95=[79.0, 81.0], kl=k * k / 1000)
        write_run(tmp_path, 200 + number, k=k, backbone="deit_small", data="imagenet", kl=k / 1000)
    figure = figure4(load_runs(tmp_path))
    ax, ax_kl, paper, _ = figure.axes
    assert ax.get_title().startswith("deit_micro (embedded), digits\n2,000 images")
    (text,) = figure.texts
    assert text.get_text().endswith("random merging has 10 to 56 times the KL of DHTM at the same k.")
    assert all(len(bars.lines[0].get_xdata()) == 6 for bars in lines_of(ax_kl).values()), "k = 0 is skipped"
    drawn = {label: container.lines[0].get_ydata().tolist() for label, container in lines_of(ax).items()}
    assert drawn == {"DHTM": [90] * 7, "random merging": [80] * 7}
    assert [text.get_text() for text in paper.get_legend().get_texts()] == [
        "DHTM, published", "random merging, published", "DHTM",
    ]  # fmt: skip
    check_colours(figure, tmp_path / "figure4", ("dhtm", "random"))
