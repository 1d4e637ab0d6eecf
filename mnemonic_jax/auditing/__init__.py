"""Measure what a model still knows about the classes that it forgot."""
