"""How a step is run: the device, the JIT, flat buffers, a run's folder, random streams, the terminal."""
