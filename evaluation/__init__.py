"""Measuring and showing what a model finds."""
