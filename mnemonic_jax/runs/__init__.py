"""A run: one folder that holds a config, its training, and every forget derived from it."""
