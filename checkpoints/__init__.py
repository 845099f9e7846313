"""Reading and writing of models; files from other people are checked, never trusted."""
