"""Training: data to batches to steps to a checkpoint. Imports neither engine nor backends."""
