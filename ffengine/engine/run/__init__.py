"""A training run around its steps: what was asked, what is written, when it ends.

Read recipe.py and settings.py (what a run is asked to do), history.py and progress.py (what it
shows), evaluation.py (accuracy), state.py, checkpoint.py and saving.py (where it stands, files, and
going on from one), stopping.py (numbers that are not finite, and Ctrl-C), and callbacks.py (who is
told as it goes).
"""
