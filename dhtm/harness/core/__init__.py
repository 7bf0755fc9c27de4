"""Errors and the command line, files, devices and ranks."""
