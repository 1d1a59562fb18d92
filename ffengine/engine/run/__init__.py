"""A training run around its steps: what was asked, what is written, when it ends.

Read recipe.py and settings.py (what a run is asked to do), history.py and progress.py (what it
shows), evaluation.py (accuracy), state.py, checkpoint.py and saving.py (where it stands, files, and
going on from one), header.py and fingerprint.py (what a file must hold, and what its functions
were), stopping.py and overtraining.py (numbers that are not finite, Ctrl-C, and a run that gets
worse), and callbacks.py (who is told as it goes).
"""
