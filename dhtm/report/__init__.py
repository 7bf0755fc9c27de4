"""Tables and figures, made from finished runs and the published numbers."""
