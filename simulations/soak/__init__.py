"""The soak: training and generation under random faults, and whether anything grows meanwhile."""
