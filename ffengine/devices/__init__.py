"""What a device could do: measured or described rates, and steps predicted from them.

catalog.py reads this folder's TOML files and bends a machine to one of them; rates.py measures this
machine; prediction.py says what a step would take elsewhere; energy.py reads a driver's counter.
"""
