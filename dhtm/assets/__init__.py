"""The embedded model's weights."""
