"""The documentation builds without a warning, and contains the API from the docstrings."""

import subprocess
import sys

from conftest import ROOT


def test_documentation_builds_without_a_warning_and_has_the_api(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for page, anchor in (("dhtm", "dhtm.merge.hierarchical_merge"), ("baselines", "baselines.tome.ToMe")):
        assert f'id="{anchor}"' in (tmp_path / "api" / f"{page}.html").read_text(encoding="utf-8")
