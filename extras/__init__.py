"""What is not in the paper: other samplers and objectives, guidance, editing, likelihood by the ODE, quality."""
