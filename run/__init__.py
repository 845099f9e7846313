"""The parts of a training run: its start, steps, progress, log and output folder."""
