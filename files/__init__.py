"""What serves the scripts and is no part of the paper: checkpoints, pictures, random streams, device, terminal."""
