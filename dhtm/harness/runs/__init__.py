"""One evaluation: its directory, its provenance, its predictions and its metrics."""
