"""Readers: one function a kind of file, from a path to an array and what its axes are."""
