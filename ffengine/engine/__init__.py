"""How a network is trained, from a batch to an update.

Top-down: trainer.py (the loop), batch.py and inputs.py (the rows a step trains on), micro.py (a
batch in pieces), program.py and compiling.py (the step as data), execute.py and instructions.py
(running it), context.py (what it carries along), sweep.py, affine.py, label_channel.py, heads.py
and optim.py (a layer's own part), capture.py (a step as a CUDA graph). Rooms: schedules/ (whose
turn it is), memory/ (plan, budget, meter), run/ (settings, checkpoints, history, evaluation).
"""
