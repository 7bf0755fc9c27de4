"""Training a backbone with a method."""
