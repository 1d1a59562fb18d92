"""The opponents: the unfused step and backpropagation's recipes of the fair tables (`steps`), and
the other methods that papers of local learning compare with.

The first train the very networks that the engine trains; nothing in the engine imports them.
"""
