"""What `ffengine reproduce` is made of: a results file, a queue of trainings, a budget, tables."""
