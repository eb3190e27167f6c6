"""Quantised weights: making them and reading them."""
