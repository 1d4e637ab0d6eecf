"""Forgetting methods."""
