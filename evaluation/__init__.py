"""Metrics, reports and pictures of the predictions of a model."""
