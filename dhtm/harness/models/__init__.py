"""Backbones, methods and their weights, and knobs solved for a cost."""
