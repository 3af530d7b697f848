"""Reports: tables for the terminal and a picture of a run."""
