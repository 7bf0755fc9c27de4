"""Records and states of the runs of a sweep."""
