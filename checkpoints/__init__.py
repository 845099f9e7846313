"""Reading and writing models: files of other people are checked, never trusted."""
