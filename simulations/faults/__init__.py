"""Faults at named points of real runs: processes are killed or frozen there, and runs go on."""
