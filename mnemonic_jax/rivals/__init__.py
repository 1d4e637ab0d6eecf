"""Rival ways to forget, which every claim is measured against."""
