"""Checks of a machine of a deployment: each says what is wrong, and what to do.

A check is a function of what it needs and has no effects, apart from those that call a server or
read files. `examination` gives each check what was asked for.
"""
