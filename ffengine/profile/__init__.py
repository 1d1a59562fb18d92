"""What a training step does with time and memory: `ffengine profile`.

watch: whose calls are noted, from outside; costs: what they must move and compute; record: the
steps that are run; recorder, timeline: how they become spans; then table, plot (PNG), page (HTML)
and trace (Chrome, Perfetto).
"""
