"""What becomes of each run of a sweep."""
