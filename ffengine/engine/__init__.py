"""How a network is trained: steps, plans, meters, checkpoints, and the trainer over them."""
