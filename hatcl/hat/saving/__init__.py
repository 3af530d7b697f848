"""Models in files and on hubs."""
