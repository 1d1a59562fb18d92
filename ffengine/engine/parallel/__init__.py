"""Training on several devices, on torch.distributed.

A pipeline (trainer.py, of what pipeline.py lets be one): every process trains consecutive layers,
and what they make of a batch travels on to the next one. cutting.py makes a stage's program of the
network's, stage_ops.py are its two instructions, links.py carries batches from stage to stage,
balance.py says which layers are whose, sharing.py brings them together in one checkpoint. ranks.py
are the processes, watch.py ends them together, launch.py starts them on one machine.
"""
