"""Training: one loop for every model; what is minimised is an objective, what is read is a dataset."""
