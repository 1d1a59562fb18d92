"""Schedules: whose turn it is in a step, and the program that a batch's update is compiled to.

Read schedule.py first (together, interleaved, overlapping), then layerwise.py and cascade.py, which
train a layer at a time; training.py is what they ask of the run. overlap.py, recurrent.py and
backprop.py write programs of their own; what the instructions that only they use do stands in
overlap_ops.py, frames.py and backprop_ops.py.
"""
