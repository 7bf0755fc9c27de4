"""Tables, figures and pictures, made from finished runs, the published numbers and models."""

from dhtm.report.regions import draw_regions, draw_strips

__all__ = ["draw_regions", "draw_strips"]
