"""The opponents of the fair tables: the unfused step, and backpropagation's recipes.

They train the very networks that the engine trains; nothing in the engine imports them.
"""
