"""The map of the network: units, the trace that finds them, and the grains in which methods speak."""
