"""How a network is trained, from a batch to an update.

Top-down: trainer.py (the loop), batch.py and inputs.py (the rows a step trains on), program.py and
compiling.py (the step as data), execute.py and instructions.py (running it), sweep.py, affine.py,
heads.py and optim.py (a layer's own part). Rooms: schedules/ (whose turn it is), memory/ (plan,
budget, meter), run/ (settings, checkpoints, history, evaluation).
"""
