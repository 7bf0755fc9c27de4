"""The documentation builds without a warning, and contains the API from the docstrings."""

import multiprocessing
import sys

from conftest import ROOT
from sphinx.cmd.build import build_main


def build(folder):
    sys.exit(build_main(["-q", "-W", "--keep-going", str(ROOT / "docs"), str(folder)]))


def test_documentation_builds_without_a_warning_and_has_the_api(tmp_path, capfd):
    """Sphinx changes defaults of functions that it documents, so it runs in its own process, forked to save the imports."""
    process = multiprocessing.get_context("fork").Process(target=build, args=[tmp_path])
    process.start()
    process.join(300)
    assert process.exitcode == 0, capfd.readouterr().err
    for page, anchor in (("dhtm", "dhtm.merge.hierarchical_merge"), ("baselines", "baselines.tome.ToMe")):
        assert f'id="{anchor}"' in (tmp_path / "api" / f"{page}.html").read_text(encoding="utf-8")
