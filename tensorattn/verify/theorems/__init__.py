"""Theorems that are not about one operator alone, one subject a file."""
