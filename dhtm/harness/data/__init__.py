"""Data sets: the embedded scenes, photographs, their labels and their cache."""
