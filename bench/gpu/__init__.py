"""What `bash bench/gpu.sh` does: stages under one deadline, from the most informative on.

run: deadline, stages, processes; plan: which stages there are; jobs: a stage's rows in a process
that may die; records: JSON lines; scale: sizes of a run and of its rehearsal without a GPU. One
module a stage: facts, build, smoke, suite, sanitize, sweeps, steps, memory, ncu, counters.
"""
