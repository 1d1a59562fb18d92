"""Memory: what a step will hold, what it may hold, and what it did hold.

The plan: plan.py (what one is), shapes.py, dry_run.py and dry_tensor.py (what a network's layers
hold), planner.py (cuts and tiles), plans.py (every phase of a run), planning.py (those of a run in
progress). The budget: budget.py, costs.py and curves.py (which plan is fastest),
precision_fallback.py (fewer bits where none fits), limit.py. meter.py counts what is live, store.py
keeps features between layers, listing.py prints a program.
"""
