"""What is read and written: checkpoints, weights, datasets, pictures."""
