"""The parts of `scripts.predict`."""
