"""The flags of main.py, the limits of their values, and what they become for a model."""
