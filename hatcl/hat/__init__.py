"""Hard attention to the task: gates, layers, the guard, conversion, proof, forgetting."""
