"""What serves the scripts and is no part of the paper: checkpoints, pictures, random streams, the device, the terminal."""
