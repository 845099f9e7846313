"""The flags of main.py, the limits of their values, and their final values for a model."""
