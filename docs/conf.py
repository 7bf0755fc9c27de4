"""Sphinx's configuration of the documentation: the pages of this folder, and the API from docstrings. See `make docs`."""

import re

project = "dhtm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "dhtm"
html_show_copyright = False
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "none"  # docstrings say what arguments are, with shapes
# Else every method repeats the interface, and every module PyTorch's text on forward.
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_rtype = False


def without_links_to_code(app, page: str, source: list[str]) -> None:
    """Keep only the text of links that lead out of this folder: the site contains no code and no results."""
    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", source[0])


def setup(app) -> None:
    app.connect("source-read", without_links_to_code)
